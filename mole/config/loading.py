"""YAML files layered left to right, then command-line overrides; every mistake at once."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mole.config.mistakes import explain, show
from mole.config.sections import Config
from mole.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Where configurations lie: in an installed package, in a checkout."""


def load(paths: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Layer the files left to right, then the overrides (`("train.steps", "100")`), and validate.

    Raises:
        ConfigError: with every mistake of every layer.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    mistakes: list[str] = []
    for path in paths:
        layer = _read(path, mistakes)
        _merge(merged, layer, origin, str(path))
    for key, text in overrides:
        layer = _nest(key, _parse_value(key, text, mistakes))
        _merge(merged, layer, origin, "command line")
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        mistakes += [explain(detail, origin) for detail in error.errors()]
    else:
        if not mistakes:
            return config
    raise ConfigError(mistakes)


def shipped(path: Path) -> Path:
    """A configuration file where it is, or the one of that name that comes with the package.

    `configs/tiny.yaml`, `tiny.yaml` and `tiny` are found from any folder.
    """
    if path.exists() or path.is_absolute() or path.parent not in (Path(), Path("configs")):
        return path
    name = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
    return next((found for folder in SHIPPED if (found := folder / name).is_file()), path)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-3` as the number it looks like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _read(path: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        near = [path.parent / name for name in difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")], 1)]  # fmt: skip
        near = near or [found for found in [Path("configs") / f"{path.stem}.yaml"] if found.is_file()]
        hint = f"; did you mean {near[0]}?" if near else ""
        mistakes.append(f"{path}: no such file{hint}")
        return {}
    except OSError as error:
        mistakes.append(f"{path}: cannot be read ({error.strerror})")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        mistakes.append(f"{path}: not valid YAML ({' '.join(str(error).split())})")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        mistakes.append(f"{path}: holds {show(content)}; legal is a mapping of sections, as in configs/digits.yaml")
        return {}
    return content


def _parse_value(key: str, text: str, mistakes: list[str]) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mistakes.append(f"command line: {key}: {text!r} is not a value ({' '.join(str(error).split())})")
        return None


def _nest(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nest(rest, value) if rest else value}


def _merge(base: dict[str, Any], layer: dict[str, Any], origin: dict[str, str], source: str, prefix: str = "") -> None:
    for key, value in ((str(name), value) for name, value in layer.items()):
        path = f"{prefix}{key}"
        origin[path] = source
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, origin, source, f"{path}.")
        elif isinstance(value, dict):
            base[key] = {}
            _merge(base[key], value, origin, source, f"{path}.")
        else:
            base[key] = value
