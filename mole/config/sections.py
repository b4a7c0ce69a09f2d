"""Every key of the configuration: its type, its legal values, its default and what it is for."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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

    runs: Annotated[int, Field(ge=2, le=2**19)] = 2048
    """Networks whose histories train the generator."""
    heldout_runs: Annotated[int, Field(ge=1, le=2**19)] = 64
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
    late_fraction: Fraction = 0.5
    """Share of a batch that aims at the last quarter of the kept states: where the best losses are."""
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
    evaluations: Annotated[int, Field(ge=1, le=1000)] = 1
    """Evaluations of the generator per network."""


class EvaluateConfig(Section):
    """How the generated networks are judged."""

    starts: Count = 64
    """Held-out starts of the one-pass and the alignment figures."""
    prompts: Annotated[int, Field(ge=2)] = 20
    """Prompts per start, from the zoo's best loss to the start's loss."""
    optimizer_steps: Count = 400
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
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 uses every core."""


class Config(Section):
    """Everything `python train.py` can be told."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] = "digits"
    """Name of the run; the default run folder is `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**20)] = 0
    """Decides every random choice; run r of a harvest has the seed `seed * 2**20 + r`."""
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


def keys() -> list[str]:
    """Every key of the configuration, dotted."""
    result: list[str] = []
    for name, field in Config.model_fields.items():
        annotation: Any = field.annotation
        result += [f"{name}.{key}" for key in annotation.model_fields] if is_section(annotation) else [name]
    return result


def is_section(annotation: Any) -> bool:
    """Whether a field's type is a section of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)
