"""Which stages there are, what each depends on, and whether it has been done. Imports no torch.

A finished stage leaves `stages/<name>.json` in the run folder: the configuration and the fingerprint of what went in,
the code that did it, the digests of what came out, the seconds it took and its part of the report, sealed by a digest.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from mole.config import Config, load, to_yaml
from mole.errors import ConfigError, CorruptFileError
from mole.files import file_digest, read_sealed, sealed, sweep, value_digest, write_json, write_text
from mole.metrics import MetricsFile
from mole.provenance import Ledger
from mole.reading.text import read_json
from mole.revision import revision

StageName = Literal["harvest", "train", "sample", "evaluate", "rank"]
STAGES: tuple[StageName, ...] = get_args(StageName)

_UPSTREAM: dict[StageName, StageName] = {
    "train": "harvest", "sample": "train", "evaluate": "train", "rank": "sample",
}  # fmt: skip
_SECTIONS: dict[StageName, tuple[str, ...]] = {
    "harvest": ("seed", "task", "harvest"),
    "train": ("generator", "train"),
    "sample": ("sample",),
    "evaluate": ("evaluate",),
    "rank": ("rank",),
}


def unlearnable(config: Config, stages: tuple[StageName, ...]) -> list[str]:
    """What of a configuration can be harvested, but generators cannot learn; nothing if only a harvest is asked for."""
    if not {"train", "sample", "evaluate"} & set(stages):
        return []
    task, vary = config.task, config.harvest.vary
    faults = []
    if vary.labels is not None:
        faults.append(
            "harvest.vary.labels: generators are not told which labels a network knows; legal is --only harvest, or "
            "task.subtasks with generator.data"
        )
    several = [name for name in ("width", "depth", "activation") if getattr(vary, name) is not None]
    generator = config.generator
    if several and (generator.symmetry != "equivariant" or config.harvest.mode == "stream"):
        faults.append(
            f"harvest.vary.{several[0]}: networks of several kinds are learned from a zoo on disk, by generators of "
            f"symmetry equivariant; found {config.harvest.mode} and {generator.symmetry}"
        )
    for name in several:
        values, own = getattr(vary, name), getattr(task, name)
        if own not in values:
            faults.append(f"harvest.vary.{name} is {values}, but task.{name} is {own}; legal is to have it among them")
    if task.subtasks.differ != generator.data:
        differ = "differ" if task.subtasks.differ else "do not differ"
        faults.append(
            f"generator.data is {str(generator.data).lower()}, and task.subtasks {differ}; legal is generator.data "
            "where sub-tasks differ, and only there"
        )
    train = config.train
    if generator.model == "gpt" and (train.drop_fraction or train.drop_start_fraction):
        faults.append(
            "generator.model gpt needs a start, its loss and a wanted loss; legal is train.drop_fraction 0 and "
            "train.drop_start_fraction 0"
        )
    single = [name for name, widths in (("evaluate.widths", config.evaluate.widths), ("harvest.vary.width", vary.width))
              if widths and 1 in widths and task.width > 1]  # fmt: skip
    faults += [
        f"{name}: a layer of one neuron has none to be exchanged with it, so a generator of wider ones cannot make it; "
        "legal is 2 and more" for name in single
    ]  # fmt: skip
    if config.evaluate.widths and task.subtasks.differ:
        faults.append("evaluate.widths: networks of other widths are judged without sub-tasks only; legal is []")
    measured = ("loss", "return") if task.name == "cartpole" else ("loss", "accuracy")
    unknown = [n for n in generator.conditions if n.startswith(("start_", "target_")) and not n.endswith(measured)]
    if unknown:
        faults.append(
            f"generator.conditions: {', '.join(unknown)} is not measured by {task.name}; legal: {', '.join(measured)}"
        )
    return faults


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    root: Path

    @property
    def zoo(self) -> Path:
        return self.root / "zoo"

    @property
    def generator(self) -> Path:
        return self.root / "generator"

    @property
    def training_state(self) -> Path:
        return self.root / "training.ckpt"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def leaderboard(self) -> Path:
        return self.root / "rank" / "leaderboard.csv"

    @property
    def ledger(self) -> Path:
        return self.root / "provenance" / "ledger.jsonl"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def parts(self) -> Path:
        """Where a stage keeps what it has done before it has finished."""
        return self.root / "stages" / "parts"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    def has_traces(self, stage: StageName) -> bool:
        """Whether there is anything of a stage's work, done or half done."""
        paths = {
            "harvest": [self.zoo / "zoo.json"], "train": [self.generator / "config.json", self.training_state],
            "sample": [self.samples], "evaluate": [self.figures, self.parts], "rank": [self.leaderboard],
        }[stage]  # fmt: skip
        return any(path.exists() for path in (self.marker(stage), *paths))

    def marker(self, stage: StageName) -> Path:
        return self.root / "stages" / f"{stage}.json"


@dataclass(frozen=True)
class Marker:
    """What a finished stage leaves behind."""

    fingerprint: str
    config: dict[str, Any]
    """The sections of the configuration that decided its result, its own ones."""
    code: dict[str, Any]
    """The revision of MOLE that did it."""
    outputs: dict[str, str]
    """Path in the run folder to SHA-256."""
    checked: dict[str, str]
    """The same for files that decide nothing of what comes after, but must be whole."""
    records: list[dict[str, Any]]
    """What it wrote into the ledger."""
    rows: str
    """Digest of its rows of `metrics.csv`."""
    seconds: float
    result: dict[str, Any]
    """The stage's part of the report."""


_MARKER = TypeAdapter(Marker)


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs, and why."""

    run: bool
    reason: str


def sections(config: Config, stage: StageName) -> dict[str, Any]:
    """The sections of a configuration that a stage reads, as plain values."""
    values = config.model_dump(mode="json")
    return {key: values[key] for key in _SECTIONS[stage]}


def fingerprint(config: Config, folder: RunFolder, stage: StageName) -> str:
    """Identity of all that decides a stage's result beside the code: configuration and inputs."""
    upstream = _UPSTREAM.get(stage)
    marker = read_marker(folder, upstream) if upstream else None
    inputs = [marker.fingerprint, marker.outputs] if marker else None
    return value_digest({"stage": stage, "config": sections(config, stage), "inputs": inputs})


def read_marker(folder: RunFolder, stage: StageName) -> Marker | None:
    """The marker of a stage; None where there is none or it does not hold what was written."""
    try:
        value = read_sealed(folder.marker(stage), set(Marker.__dataclass_fields__))
        del value["seal"]
        return _MARKER.validate_python(value)
    except (FileNotFoundError, NotADirectoryError, CorruptFileError, ValidationError):
        return None


@dataclass(frozen=True)
class Work:
    """What a stage has done."""

    outputs: list[Path]
    result: dict[str, Any]
    """Its part of the report."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """For the ledger, in which they stand already."""
    checked: list[Path] = field(default_factory=list)
    """Files that must stay whole, but decide nothing of what comes after."""


def write_marker(folder: RunFolder, config: Config, stage: StageName, work: Work, seconds: float) -> None:
    """Declare a stage finished, with the digests of its files."""
    outputs, checked = (
        {path.relative_to(folder.root).as_posix(): file_digest(path) for path in sorted(paths)}
        for paths in (work.outputs, work.checked)
    )
    marker = Marker(
        fingerprint(config, folder, stage), sections(config, stage), revision().as_dict(), outputs, checked,
        work.records, MetricsFile(folder.metrics).digest(stage), seconds, work.result,
    )  # fmt: skip
    write_json(folder.marker(stage), sealed(asdict(marker)))


def decide(config: Config, folder: RunFolder, stage: StageName, *, redo: bool = False) -> Decision:
    """Whether a stage must run: it has not finished, its inputs changed, or its files were damaged.

    Work of other code is kept, and that is said, unless `redo` asks for it to be done again.
    """
    marker = read_marker(folder, stage)
    if marker is None:
        damaged = folder.marker(stage).exists()
        return Decision(True, "its marker is damaged or of an earlier version" if damaged else "not done yet")
    if marker.fingerprint != fingerprint(config, folder, stage):
        return Decision(True, "its configuration or its inputs changed")
    for name, digest in {**marker.outputs, **marker.checked}.items():
        path = folder.root / name
        if not path.is_file():
            return Decision(True, f"{name} is missing")
        if file_digest(path) != digest:
            return Decision(True, f"{name} is truncated or altered")
    if marker.code.get("source") == revision().source:
        return Decision(False, "unchanged")
    then, now = marker.code.get("version"), revision()
    commit = f", commit {str(marker.code['commit'])[:10]}" if marker.code.get("commit") else ""
    told = f"by other code: mole {then}{commit} then, {now} now"
    return Decision(True, told) if redo else Decision(False, f"{told}; kept, --redo does it again")


def plan(
    config: Config, folder: RunFolder, stages: tuple[StageName, ...], *, redo: bool = False
) -> dict[StageName, Decision]:
    """What each of these stages would do now; a stage after one that runs is expected to run."""
    decisions: dict[StageName, Decision] = {}
    for stage in stages:
        upstream = _UPSTREAM.get(stage)
        if upstream and upstream in decisions and decisions[upstream].run:
            decisions[stage] = Decision(True, f"after {upstream}")
        else:
            decisions[stage] = decide(config, folder, stage, redo=redo)
    return decisions


def clashes(config: Config, folder: RunFolder, stages: tuple[StageName, ...]) -> list[str]:
    """Every key in which the work in a folder differs from a configuration that would replace it, in words.

    Work is a finished stage, or what there is of one that is half done or whose marker is damaged.
    """
    wanted: dict[str, Any] = {}
    there: dict[str, Any] = {}
    for stage in stages:
        marker = read_marker(folder, stage)
        own = sections(config, stage)
        if marker is not None:
            wanted, there = wanted | own, there | marker.config
        elif folder.has_traces(stage):
            wanted, there = wanted | own, there | _begun(folder, own)
            if stage == "harvest" and (recipe := _harvested(folder)) is not None:
                wanted, there = wanted | harvest_recipe(config), there | recipe
    return differences(there, wanted)


def harvest_recipe(config: Config) -> dict[str, Any]:
    """What decides the bits of a zoo; its `zoo.json` holds it."""
    kept = config.harvest.model_dump(mode="json", include={"checkpoints", "keep", "vary"})
    return {"seed": config.seed, "task": config.task.model_dump(mode="json"), **kept}


def _harvested(folder: RunFolder) -> dict[str, Any] | None:
    """The recipe of a half-harvested zoo; None where there is nothing of it yet."""
    if not any((folder.zoo / "shards").glob("[!.]*.parquet")):
        return None
    with suppress(OSError, CorruptFileError):
        recipe = read_sealed(folder.zoo / "zoo.json", {"recipe"})["recipe"]
        return recipe if isinstance(recipe, dict) and "task" in recipe else None
    return None


def _begun(folder: RunFolder, own: dict[str, Any]) -> dict[str, Any]:
    """These sections as `config.yaml` has them, which a stage that is half done was begun with."""
    try:
        begun = load([folder.config]).model_dump(mode="json")
    except ConfigError:
        return own
    return {key: begun[key] for key in own}


def differences(there: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ, each as `train.steps: 1500 there, 60 asked for`."""
    told: list[str] = []
    for key in dict.fromkeys((*there, *wanted)):
        one, other = there.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            told += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            told.append(f"{prefix}{key}: {one} there, {other} asked for")
    return told


def unmet(config: Config, folder: RunFolder, stages: tuple[StageName, ...]) -> dict[StageName, str]:
    """Stages that these ones need, that are not among them and would have to run first, and why.

    Nothing may stand on the work of another configuration: what is held out in one is trained on in another.
    """
    needed = _needed_by(stages)
    if any(read_marker(folder, stage) is None for stage in needed):  # known without reading the zoo
        return {stage: "not done yet" for stage in needed if read_marker(folder, stage) is None}
    return {stage: decision.reason for stage, decision in plan(config, folder, needed).items() if decision.run}


def _needed_by(stages: tuple[StageName, ...]) -> tuple[StageName, ...]:
    """Stages that these ones need and that are not among them, in order."""
    needed: set[StageName] = set()
    for stage in stages:
        upstream = _UPSTREAM.get(stage)
        while upstream and upstream not in stages:
            needed.add(upstream)
            upstream = _UPSTREAM.get(upstream)
    return tuple(stage for stage in STAGES if stage in needed)


def mend_records(config: Config, folder: RunFolder, stages: tuple[StageName, ...] = STAGES) -> list[str]:
    """Write again what was deleted or altered of `config.yaml`, the ledger and the report; a line for each.

    Raises:
        CorruptFileError: the ledger is damaged; the message says what to do.
    """
    lines: list[str] = []
    markers: dict[StageName, Marker] = {
        stage: marker for stage in STAGES if (marker := read_marker(folder, stage)) is not None
    }
    ledger = Ledger(folder.ledger)
    before = len(ledger.records)
    for marker in markers.values():
        ledger.append(marker.records)
    if lost := len(ledger.records) - before:
        lines.append(f"{folder.ledger}: {lost} records were missing, and are written again")
    rows = MetricsFile(folder.metrics)
    if odd := [stage for stage, marker in markers.items() if rows.digest(stage) != marker.rows]:
        missing = "" if folder.metrics.exists() else " (it is missing)"
        lines.append(
            f"{folder.metrics}{missing}: the rows of {', '.join(odd)} are not those that were measured; report.json "
            "has the figures, and a stage that runs again writes its rows"
        )
    text = to_yaml(_recorded(config, folder, stages, markers))
    if not folder.config.is_file() or folder.config.read_bytes() != text.encode():
        write_text(folder.config, text)
    return lines


def _recorded(
    config: Config, folder: RunFolder, stages: tuple[StageName, ...], markers: dict[StageName, Marker]
) -> Config:
    """The configuration of a folder: that of its finished stages, of what is asked for now, and of what was begun."""
    values = config.model_dump(mode="json")
    for stage in STAGES:
        if stage not in stages and folder.has_traces(stage):
            values |= _begun(folder, sections(config, stage))
    for stage, marker in markers.items():
        values |= {key: value for key, value in marker.config.items() if key in _SECTIONS[stage]}
    try:
        return Config.model_validate(values)
    except ValidationError:
        return config


def clear_leftovers(folder: RunFolder) -> None:
    """Remove the temporary files of killed processes from the folders that MOLE writes into."""
    inner = (folder.zoo, folder.generator, folder.samples, folder.leaderboard.parent, folder.ledger.parent,
             folder.figures, folder.parts.parent)  # fmt: skip
    sweep(folder.root, inner)


def write_report(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Merge what the finished stages found into `report.json`, and return it."""
    report: dict[str, Any] = {"name": config.name, "seed": config.seed}
    seconds: dict[str, float] = {}
    machines: dict[str, Any] = {}
    for stage in STAGES:
        marker = read_marker(folder, stage)
        if marker is not None and marker.fingerprint == fingerprint(config, folder, stage):
            result = dict(marker.result)
            machines[stage] = {**(result.pop("machine", None) or {}), "code": marker.code}
            report |= result
            seconds[stage] = marker.seconds
    report["seconds"] = {**seconds, "total": sum(seconds.values())}
    report["machine"] = machines
    with suppress(FileNotFoundError, CorruptFileError):
        if read_json(folder.report) == report:
            return report
    write_json(folder.report, report)
    return report
