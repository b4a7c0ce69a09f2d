"""The typed configuration: YAML files layered left to right, then command-line overrides.

Imports neither torch nor anything else of MOLE but its errors, so that a mistake is told at once.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mole.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRates = Annotated[list[Positive], Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: frozen, strict types, unknown keys refused, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TaskConfig(Section):
    """What the small networks learn, and how each of them is trained."""

    name: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """Data set."""
    hidden: Count = 16
    """Width of the hidden layer of the ReLU network."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """`sgd` is with Nesterov momentum 0.9."""
    learning_rate: Positive = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: NonNegative = 0.0
    batch_size: Count = 128
    """Images per step and network."""
    steps: Count = 300
    """Optimiser steps per network."""


class HarvestConfig(Section):
    """How many networks are trained, and which of their states are kept."""

    runs: Count = 2048
    """Networks whose histories train the generator."""
    heldout_runs: Count = 64
    """Further networks that the generator never sees."""
    checkpoints: Annotated[int, Field(ge=2)] = 30
    """States kept per run: the first, the last, and log-spaced ones between."""
    group_size: Count = 256
    """Networks trained at once, and written as one shard."""


class GeneratorConfig(Section):
    """The diffusion transformer."""

    width: Count = 128
    layers: Count = 4
    heads: Count = 4
    mlp_ratio: Count = 4

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "GeneratorConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class TrainConfig(Section):
    """How the generator is trained."""

    steps: Count = 3000
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    warmup_steps: Natural = 100
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Largest decay of the moving average of the weights; it is smaller in the first steps."""
    function_weight: NonNegative = 100.0
    """Weight of the divergence between what the predicted and the true network compute on training images."""
    function_images: Count = 128
    """Training images per step for that divergence."""
    one_pass_fraction: Fraction = 0.67
    """Share of a batch that is noised completely: what a single evaluation sees."""
    initial_fraction: Fraction = 0.67
    """Share of a batch that starts from the run's first state."""
    log_every: Count = 50
    """Steps between two rows of `metrics.csv`."""
    validate_every: Count = 500
    """Steps between two validations on held-out runs."""
    checkpoint_every: Count = 200
    """Steps between two training states on disk; a killed training continues from the last."""


class SampleConfig(Section):
    """Which networks are generated and kept."""

    networks: Count = 64
    """Generated networks, one per held-out start."""
    target_loss: Positive | None = None
    """Prompt; null asks for the best loss in the zoo."""
    evaluations: Count = 1
    """Evaluations of the generator per network."""


class EvaluateConfig(Section):
    """How the generated networks are judged."""

    starts: Count = 64
    """Held-out starts of the one-pass and the alignment figures."""
    prompts: Annotated[int, Field(ge=2)] = 20
    """Prompts per start, from the zoo's best loss to the start's loss."""
    optimizer_steps: Count = 600
    """Steps the optimisers get to match one pass."""
    adam_learning_rates: LearningRates = [0.003, 0.01, 0.03]
    """Tried on the prompt images; the best one is reported."""
    sgd_learning_rates: LearningRates = [0.03, 0.1, 0.3]


class RankConfig(Section):
    """How the generated networks are screened."""

    components: Natural = 10
    """Principal components before the silhouette; 0 uses the features as they are."""


class TrackingConfig(Section):
    """Where the run can be watched; `metrics.csv` and `report.json` are the record."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: `WANDB_MODE` if set, online where a key is found and the server answers, else offline."""
    project: Annotated[str, Field(min_length=1)] = "mole"


class RuntimeConfig(Section):
    """On what it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Natural = 0
    """CPU threads; 0 uses every core."""


class Config(Section):
    """Everything `python train.py` can be told."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "digits"
    """Name of the run; the default run folder is `runs/<name>`."""
    seed: Natural = 0
    task: TaskConfig = TaskConfig()
    harvest: HarvestConfig = HarvestConfig()
    generator: GeneratorConfig = GeneratorConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    rank: RankConfig = RankConfig()
    tracking: TrackingConfig = TrackingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _enough_starts(self) -> "Config":
        heldout = self.harvest.heldout_runs
        for section, key, value in (
            ("sample", "networks", self.sample.networks),
            ("evaluate", "starts", self.evaluate.starts),
        ):
            if value > heldout:
                raise ValueError(
                    f"{section}.{key} is {value}, but there are only {heldout} held-out runs to start from; "
                    f"lower it or raise harvest.heldout_runs"
                )
        if self.harvest.checkpoints > self.task.steps + 1:
            raise ValueError(
                f"harvest.checkpoints is {self.harvest.checkpoints}, but a run of task.steps {self.task.steps} "
                f"has only {self.task.steps + 1} states"
            )
        return self


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
        mistakes += [_explain(detail, origin) for detail in error.errors()]
    else:
        if not mistakes:
            return config
    raise ConfigError(mistakes)


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
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
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
        mistakes.append(f"{path}: holds {_show(content)}; legal is a mapping of sections, as in configs/digits.yaml")
        return {}
    return content


def _parse_value(key: str, text: str, mistakes: list[str]) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
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


def _explain(detail: Any, origin: dict[str, str]) -> str:
    """One mistake as: file, key, what was found, what is legal, the nearest legal name."""
    parts = [str(part) for part in detail["loc"] if part not in ("float", "int", "str", "none")]
    key = ".".join(parts)
    source = next((origin[k] for k in _ancestors(parts) if k in origin), "configuration")
    if detail["type"] == "extra_forbidden":
        legal = sorted(_fields_at(parts[:-1]))
        near = difflib.get_close_matches(parts[-1], legal, 1)
        everywhere = [k for k in keys() if k.endswith(f".{parts[-1]}")]
        hint = f"; did you mean {'.'.join([*parts[:-1], near[0]])}?" if near else ""
        if not near and everywhere:
            hint = f"; did you mean {everywhere[0]}?"
        return f"{source}: {key}: unknown key; legal here: {', '.join(legal)}{hint}"
    if detail["type"] == "value_error":
        where = f"{key}: " if key else ""
        return f"{source}: {where}{detail['msg'].removeprefix('Value error, ')}"
    found, legal = detail["input"], _legal(parts) or detail["msg"]
    hint = ""
    if detail["type"] == "literal_error" and isinstance(found, str):
        near = difflib.get_close_matches(found, re.findall(r"'([^']*)'", str(detail["ctx"]["expected"])), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
    return f"{source}: {key}: found {_show(found)}; legal: {legal}{hint}"


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _ancestors(parts: list[str]) -> Iterator[str]:
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _fields_at(parts: Sequence[str]) -> dict[str, Any]:
    model: Any = Config
    for part in parts:
        field = model.model_fields.get(part)
        if field is None or not _is_section(field.annotation):
            return {}
        model = field.annotation
    return model.model_fields


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def keys() -> list[str]:
    """Every key of the configuration, dotted."""
    result: list[str] = []
    for name, field in Config.model_fields.items():
        annotation: Any = field.annotation
        result += [f"{name}.{key}" for key in annotation.model_fields] if _is_section(annotation) else [name]
    return result


def _legal(parts: list[str]) -> str:
    """What may stand at a key, read off its type: `a whole number of at least 1`."""
    names = [part for part in parts if not part.isdigit()]
    field = _fields_at(names[:-1]).get(names[-1]) if names else None
    if field is None:
        return ""
    if _is_section(field.annotation):
        return f"a mapping with {', '.join(field.annotation.model_fields)}"
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *rest = typing.get_args(annotation)
        extra = [m for r in rest for m in (getattr(r, "metadata", None) or [r])]
        return _describe(inner, extra)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part, metadata) for part in typing.get_args(annotation))
    if origin is list:
        return "a list of, each, " + _describe(typing.get_args(annotation)[0])
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    words = {"ge": "of at least", "gt": "above", "le": "up to", "lt": "below", "pattern": "matching"}
    limits = [f"{words[k]} {getattr(m, k)}" for m in metadata for k in words if getattr(m, k, None) is not None]
    return " ".join([names.get(annotation, str(annotation)), *([] if annotation is type(None) else limits)])
