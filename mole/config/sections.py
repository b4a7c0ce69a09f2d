"""Every key of the configuration: its type, its legal values, its default and what it is for."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=10**6)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Natural = Annotated[int, Field(ge=0, le=10**6)]
Positive = Annotated[float, Field(ge=1e-12, le=1e38)]
NonNegative = Annotated[float, Field(ge=0, le=1e38)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRates = Annotated[list[Positive], Field(min_length=1, max_length=100)]


class Section(BaseModel):
    """Base of every section: frozen, strict types, unknown keys refused, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist": {
        "width": 10, "optimizer": "sgd", "learning_rate": 0.1, "schedule": "epoch_cosine", "weight_decay": 5e-4,
        "steps": 11_325,
    },
    "cifar10": {
        "width": 16, "depth": 2, "optimizer": "sgd", "learning_rate": 0.1, "schedule": "epoch_cosine",
        "weight_decay": 5e-4, "steps": 18_750,
    },
    "cartpole": {
        "width": 32, "depth": 2, "activation": "selu", "learning_rate": 3e-4, "schedule": "cosine",
        "gradient_clip": 0.5, "steps": 8_000,
    },
    "iris": {"width": 8, "batch_size": 30},
    "wine": {"width": 8, "batch_size": 32},
    "breast_cancer": {"batch_size": 64},
}  # fmt: skip
"""Per data set what differs from the defaults below. MNIST, CIFAR-10 and CartPole are G.pt's recipes: 25 and 50
epochs of the training images left after the prompt images are taken off, and 500 iterations of 16 steps."""
RECIPES["fashion_mnist"] = RECIPES["mnist"]

Condition = Literal[
    "start_loss", "target_loss", "start_accuracy", "target_accuracy", "start_return", "target_return",
    "learning_rate", "optimizer", "batch_size", "activation", "steps",
]  # fmt: skip

TaskName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cartpole", "iris", "wine", "breast_cancer"]


ScorerName = Literal[
    "neuralrank", "neuralrank_centroid", "silhouette", "class_mean", "h_score", "h_score_shrunk", "knn", "logme",
    "ridge", "gbc", "transrate", "parc", "leep", "nce", "linear_probe", "minus_loss", "mutual_information",
    "coding_rate", "kmeans", "confidence", "nuclear_norm",
]  # fmt: skip


class SubtaskConfig(Section):
    """Tasks within the task, one of its own for every run, drawn by the run's seed; nothing differs by default."""

    labels: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=2, max_length=2)] | None = None
    """Fewest and most labels that are there; null leaves all."""
    rename: bool = False
    """Whether labels exchange their names."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Images are turned by up to so many degrees, either way."""
    pixels: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of the pixels that can be seen; the others are blank."""

    @property
    def differ(self) -> bool:
        """Whether there are sub-tasks at all."""
        return self != SubtaskConfig()

    @model_validator(mode="after")
    def _fewest_first(self) -> "SubtaskConfig":
        if self.labels is not None and self.labels[0] > self.labels[1]:
            raise ValueError(f"labels {self.labels}: legal is the smaller number first")
        return self


class TaskConfig(Section):
    """What the small networks learn, and how each of them is trained; defaults depend on the data set."""

    name: TaskName = "digits"
    """Data set, or environment."""
    width: Width = 16
    """Hidden neurons per layer; of a convolutional network the channels of the first layer."""
    depth: Annotated[int, Field(ge=1, le=62)] = 1
    """Hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "selu"] = "relu"
    optimizer: Literal["adam", "sgd"] = "adam"
    """`sgd` is with Nesterov momentum 0.9."""
    learning_rate: Positive = 0.01
    schedule: Literal["constant", "cosine", "epoch_cosine"] = "constant"
    """`epoch_cosine` changes the learning rate between epochs only."""
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive | None = None
    """Largest norm of a network's gradient; null does not clip."""
    batch_size: Count = 128
    """Images per step and network."""
    steps: Steps = 300
    """Optimiser steps per network."""
    labels: Annotated[list[Natural], Field(min_length=2)] | None = None
    """Only images of these labels; null takes all."""
    data_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training images that a run sees, drawn by its seed."""
    subtasks: SubtaskConfig = SubtaskConfig()

    @model_validator(mode="before")
    @classmethod
    def _recipe_of_the_data_set(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("name", "digits")
        return {**RECIPES.get(name, {}), **values} if isinstance(name, str) else values

    @model_validator(mode="after")
    def _data_are_there(self) -> "TaskConfig":
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels {self.labels}: legal is each label once")
        if self.name == "cartpole" and (self.labels is not None or self.data_fraction != 1 or self.subtasks.differ):
            raise ValueError(
                "cartpole has neither labels nor images; legal is to leave labels, data_fraction and subtasks out"
            )
        if self.subtasks.differ and (self.labels is not None or self.data_fraction != 1 or self.name == "cifar10"):
            raise ValueError(
                "subtasks choose labels by themselves, of flat images; legal is to leave labels and data_fraction out, "
                "and a task other than cifar10"
            )
        return self


class VaryConfig(Section):
    """Keys of `task` that differ between runs: each run draws one value of every list given here."""

    width: Annotated[list[Width], Field(min_length=1, max_length=1000)] | None = None
    depth: Annotated[list[Annotated[int, Field(ge=1, le=62)]], Field(min_length=1, max_length=62)] | None = None
    activation: Annotated[list[Literal["relu", "gelu", "silu", "tanh", "selu"]], Field(min_length=1)] | None = None
    optimizer: Annotated[list[Literal["adam", "sgd"]], Field(min_length=1)] | None = None
    learning_rate: LearningRates | None = None
    batch_size: Annotated[list[Count], Field(min_length=1)] | None = None
    labels: Annotated[list[Annotated[list[Natural], Field(min_length=2)]], Field(min_length=1)] | None = None
    data_fraction: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = None


class HarvestConfig(Section):
    """How many networks are trained, and which of their states are kept."""

    mode: Literal["disk", "stream"] = "disk"
    """`stream` trains the generator on populations while they train; no zoo is written."""
    backend: Literal["local", "ray"] = "local"
    """Where populations train: in this process, or on every machine of a Ray cluster (`pip install ray`)."""
    runs: Annotated[int, Field(ge=2, le=2**19)] = 2048
    """Networks whose histories train the generator; while streaming, those that it is judged against."""
    heldout_runs: Annotated[int, Field(ge=1, le=2**19)] = 64
    """Further networks that the generator never sees."""
    checkpoints: Annotated[int, Field(ge=2, le=10**6)] = 30
    """States kept per run, at most."""
    keep: Literal["log", "even", "random", "loss"] = "log"
    """Which ones beside the first and the last: log-spaced, evenly spaced or random steps (G.pt's), or whenever the
    training loss has fallen by a constant factor."""
    vary: VaryConfig = VaryConfig()
    group_size: Count = 256
    """Networks trained at once, and written as one shard."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights on disk."""
    reuse: Steps = 64
    """While streaming: times that the generator may read a checkpoint."""
    reservoir: Annotated[int, Field(ge=2, le=2**19)] = 512
    """While streaming: runs held in memory."""


class GeneratorConfig(Section):
    """The diffusion transformer, and how it sees weights."""

    model: Literal["mole", "gpt"] = "mole"
    """`gpt` is G.pt (Peebles et al. 2022), the baseline."""
    process: Literal["cosine", "linear"] = "cosine"
    """Noise schedule: cosine down to pure noise, sampled in one evaluation or a few (DDIM), or G.pt's: linear, sampled
    by ancestral steps (DDPM)."""
    scale: Literal["tensor", "global"] = "tensor"
    """Weights are divided by the standard deviation of their tensor, or all by one."""
    view: Literal["neurons", "classes", "chunks", "graph", "flat", "latent"] = "neurons"
    """What its tokens are: neurons, neurons and outputs, pieces of tensors (G.pt's), the parameter graph, all at once,
    or a learned code."""
    symmetry: Literal["none", "augment", "canonical", "equivariant"] = "equivariant"
    """What is done about interchangeable neurons: nothing, random orders, one order for all by matching to a reference,
    or tokens without a position (neurons and graph only)."""
    roles: bool = True
    """Whether interchangeable tokens are told their rank, by a number of their own weights (equivariant only, and only
    where all networks have one layout)."""
    common: bool = False
    """Whether what generated networks have in common is learned weight by weight, in the order of ranks: for networks
    with several layers of interchangeable neurons whose mean is wanted; all of one layout."""
    chunk: Count = 64
    """Numbers per token of `chunks`."""
    latent: Count = 128
    """Numbers of the learned code."""
    latent_steps: Steps = 2000
    """Training steps of the autoencoder."""
    conditions: Annotated[list[Condition], Field(min_length=1)] = ["start_loss", "target_loss"]
    """What can be asked for or told, each of it optional: metrics of the start and of the wanted network, and how it is
    trained."""
    data: bool = False
    """Whether it also reads a labelled support set of the data, and the start's gradient on it (`classes` only)."""
    parameters: Annotated[int, Field(ge=10_000, le=10**12)] | None = None
    """Size dial: the widest transformer of at most so many parameters; null takes `width`."""
    width: Width = 128
    layers: Annotated[int, Field(ge=1, le=1000)] = 4
    heads: Annotated[int, Field(ge=1, le=1000)] = 4
    mlp_ratio: Annotated[int, Field(ge=1, le=100)] = 4

    @model_validator(mode="after")
    def _settings_agree(self) -> "GeneratorConfig":
        if self.data and self.view != "classes":
            raise ValueError(f"data needs view classes, whose outputs are told by their examples; found {self.view}")
        if self.model == "gpt" and (
            (self.view, self.conditions) != ("chunks", ["start_loss", "target_loss"]) or self.symmetry == "equivariant"
        ):
            raise ValueError(
                f"model gpt has view chunks, conditions [start_loss, target_loss] and symmetry none, augment or "
                f"canonical; found {self.view}, {self.conditions}, {self.symmetry}"
            )
        if "target_loss" not in self.conditions:
            raise ValueError(
                f"conditions {self.conditions}: target_loss must be among them, by which generators are judged"
            )
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions {self.conditions}: legal is each one once")
        if self.symmetry == "equivariant" and self.view not in ("neurons", "classes", "graph"):
            raise ValueError(
                f"symmetry equivariant is not defined for view {self.view}; legal there: none, augment, canonical"
            )
        if self.common and (self.symmetry != "equivariant" or not self.roles or self.view == "graph" or self.data):
            raise ValueError(
                f"common needs symmetry equivariant, roles true, view neurons or classes, and data false; found "
                f"{self.symmetry}, roles {self.roles}, {self.view}, data {self.data}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class TrainConfig(Section):
    """How the generator is trained."""

    steps: Steps = 3000
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 100
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Largest decay of the moving average of the weights; it is smaller in the first steps."""
    objective: Literal["energy", "mean", "consistency"] = "energy"
    """How what one evaluation gives is scored: from pure noise by the energy scores of two draws, least where draws are
    distributed as what comes true; by squared error and divergence, least for the mean of what may come true (below
    pure noise always); or by where a chain of smaller steps ends (consistency)."""
    function_weight: NonNegative = 100.0
    """Weight of the divergence between what the predicted and the true network compute on training images; of an
    energy score its root."""
    function_images: Count = 128
    """Training images per network and step for that divergence."""
    gap_weight: NonNegative = 1.0
    """Weight, within that, of how far the loss of the predicted network lies from that of the true one."""
    one_pass_fraction: Fraction = 0.67
    """Share of a batch that is noised completely: what a single evaluation sees."""
    late_fraction: Fraction = 0.5
    """Share of a batch that aims at the last quarter of the kept states: where the best losses are."""
    initial_fraction: Fraction = 0.67
    """Share of a batch that starts from the run's first state."""
    drop_fraction: Fraction = 0.1
    """Share of a batch in which each condition is left out, so that it may be left out when sampling."""
    drop_start_fraction: Fraction = 0.1
    """Share of a batch that has no start network."""
    support_images: Count = 128
    """Labelled images that tell the generator of the data, where it reads them."""
    layouts: Count = 4
    """Layouts of networks in one batch, where the zoo has several."""
    log_every: Steps = 50
    """Steps between two rows of `metrics.csv`."""
    validate_every: Steps = 500
    """Steps between two validations on held-out runs."""
    checkpoint_every: Steps = 200
    """Steps between two training states on disk; a killed training continues from the last."""


class SampleConfig(Section):
    """Which networks are generated and kept."""

    networks: Count = 64
    """Generated networks, one per held-out start."""
    target_loss: Annotated[float, Field(gt=0, lt=1e6)] | None = None
    """Prompt; null asks for the best loss in the zoo."""
    guidance: Annotated[float, Field(ge=0, le=20)] = 1.0
    """How far the prompt is overdone (classifier-free guidance); other values than 1 cost a second evaluation."""
    evaluations: Annotated[int, Field(ge=1, le=1000)] = 1
    """Evaluations of the generator per network."""


class EvaluateConfig(Section):
    """How the generated networks are judged."""

    starts: Count = 64
    """Held-out starts of the one-pass and the alignment figures."""
    prompts: Annotated[int, Field(ge=2, le=10**6)] = 20
    """Prompts per start, from the zoo's best loss to the start's loss."""
    optimizer_steps: Count = 400
    """Steps the optimisers get to match one pass."""
    adam_learning_rates: LearningRates = [0.003, 0.01, 0.03]
    """Tried on the prompt images; the best one is reported."""
    sgd_learning_rates: LearningRates = [0.03, 0.1, 0.3]
    passes: Annotated[int, Field(ge=1, le=1000)] = 4
    """One pass after another, each from what the last one made."""
    unseen: Natural = 32
    """Starts of each initialisation, and networks of each width, that the zoo does not have; 0 leaves both out."""
    widths: Annotated[list[Width], Field(max_length=100)] = []
    """Widths to generate networks of, whether the zoo has them or not."""
    evaluations: Annotated[int, Field(ge=1, le=1000)] = 1
    """Evaluations of the generator per network."""
    repeats: Annotated[int, Field(ge=0, le=1000)] = 8
    """Draws from one start, for the spread within one condition; 0 leaves it out."""
    support_images: Count = 256
    """Labelled examples of each held-out sub-task, where there are such."""


class RankConfig(Section):
    """How the generated networks are screened."""

    scorers: Annotated[list[ScorerName], Field(min_length=1)] = [
        "leep", "neuralrank", "class_mean", "minus_loss"
    ]  # fmt: skip
    """By name; the first one decides, the others are reported beside it."""


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
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How the processes of `torchrun` share a training: each has the whole generator (ddp), or a part of its weights
    and of the optimiser's state (fsdp), for generators that do not fit into one device."""
    compile: bool = False
    """Whether the generator's blocks are compiled for its training; worth it on a GPU."""


class Config(Section):
    """Everything `python train.py` can be told."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] = "digits"
    """Name of the run; the default run folder is `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**12)] = 0
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
        if self.train.objective == "energy" and (
            self.generator.process == "linear" or not self.train.one_pass_fraction
        ):
            raise ValueError(
                f"train.objective energy draws from pure noise, which generator.process {self.generator.process} with "
                f"train.one_pass_fraction {self.train.one_pass_fraction:g} does not train for; legal: "
                "train.objective mean, or generator.process cosine with a train.one_pass_fraction above 0"
            )
        harvest = self.harvest
        if harvest.mode == "stream" and harvest.group_size > harvest.reservoir // 2:
            raise ValueError(
                f"harvest.group_size is {harvest.group_size}, but a reservoir of {harvest.reservoir} runs takes groups "
                f"of at most {harvest.reservoir // 2}; lower it or raise harvest.reservoir"
            )
        kinds = ("width", "depth", "activation")
        differ = [f"harvest.vary.{n}" for n in kinds if len(set(getattr(harvest.vary, n) or ())) > 1]
        differ += ["evaluate.widths"] * bool(set(self.evaluate.widths) - {*(harvest.vary.width or [self.task.width])})
        if self.generator.common and differ:
            raise ValueError(
                f"{', '.join(differ)}: networks of several architectures have no network in common; legal is one "
                "architecture, or generator.common false"
            )
        given = [n for n in ("labels", "data_fraction", "batch_size") if getattr(harvest.vary, n) is not None]
        if self.task.name == "cartpole" and given:
            raise ValueError(
                f"harvest.vary.{given[0]}: cartpole has neither labels nor images; legal is to leave it out"
            )
        return self


def keys(section: type[Section] | None = None) -> list[str]:
    """Every key of the configuration, or of a section of it, dotted."""
    result: list[str] = []
    for name, field in (section or Config).model_fields.items():
        annotation: Any = field.annotation
        result += [f"{name}.{key}" for key in keys(annotation)] if is_section(annotation) else [name]
    return result


def is_section(annotation: Any) -> bool:
    """Whether a field's type is a section of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)
