"""YAML files layered left to right, then command-line overrides; every mistake at once."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mole.config.mistakes import explain, show
from mole.config.sections import Config
from mole.errors import MOST_MISTAKES, ConfigError, CorruptFileError
from mole.reading.text import read_text
from mole.reading.yaml_text import parse_yaml

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Where configurations lie: in an installed package, in a checkout."""
MOST_BYTES = 2**20
"""Of a configuration file."""


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
        details = error.errors(include_url=False)
        mistakes += [explain(detail, origin) for detail in details[:MOST_MISTAKES]]
        if len(details) > MOST_MISTAKES:
            mistakes.append(f"configuration: {len(details) - MOST_MISTAKES} more mistakes of this kind")
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


def _read(path: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        content = parse_yaml(read_text(path, MOST_BYTES))
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
    except CorruptFileError as error:
        mistakes.append(str(error).replace(": not UTF-8", ": not valid YAML, not UTF-8"))
        return {}
    except ValueError as error:
        mistakes.append(f"{path}: not valid YAML ({str(error)[:300]})")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        mistakes.append(f"{path}: holds {show(content)}; legal is a mapping of sections, as in configs/digits.yaml")
        return {}
    return content


def _parse_value(key: str, text: str, mistakes: list[str]) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        mistakes.append(f"command line: {key}: {text[:100]!r} is not a value ({str(error)[:300]})")
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
