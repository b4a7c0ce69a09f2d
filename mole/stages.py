"""Which stages there are, what each depends on, and whether it has been done. Imports no torch.

A finished stage leaves `stages/<name>.json` in the run folder: the fingerprint of what went in, the
digests of what came out, the seconds it took and its part of the report.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

import mole
from mole.config import Config
from mole.errors import CorruptFileError
from mole.files import file_digest, read_json, value_digest, write_json

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
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    def marker(self, stage: StageName) -> Path:
        return self.root / "stages" / f"{stage}.json"


@dataclass(frozen=True)
class Marker:
    """What a finished stage leaves behind."""

    fingerprint: str
    outputs: dict[str, str]
    """Path in the run folder to SHA-256."""
    seconds: float
    result: dict[str, Any]
    """The stage's part of the report."""


_MARKER = TypeAdapter(Marker)


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs, and why."""

    run: bool
    reason: str


def fingerprint(config: Config, folder: RunFolder, stage: StageName) -> str:
    """Identity of all that decides a stage's result: configuration, inputs and version."""
    values = config.model_dump(mode="json")
    upstream = _UPSTREAM.get(stage)
    marker = read_marker(folder, upstream) if upstream else None
    return value_digest(
        {
            "stage": stage,
            "version": mole.__version__,
            "config": {key: values[key] for key in _SECTIONS[stage]},
            "inputs": [marker.fingerprint, marker.outputs] if marker else None,
        }
    )


def read_marker(folder: RunFolder, stage: StageName) -> Marker | None:
    """The marker of a stage; None where there is none or it is damaged."""
    try:
        return _MARKER.validate_python(read_json(folder.marker(stage)))
    except (OSError, CorruptFileError, ValidationError):
        return None


def write_marker(folder: RunFolder, config: Config, stage: StageName, outputs: list[Path], seconds: float,
                 result: dict[str, Any]) -> None:  # fmt: skip
    """Declare a stage finished, with the digests of its files."""
    digests = {path.relative_to(folder.root).as_posix(): file_digest(path) for path in sorted(outputs)}
    mark = {"fingerprint": fingerprint(config, folder, stage), "outputs": digests, "seconds": seconds, "result": result}
    write_json(folder.marker(stage), mark)


def decide(config: Config, folder: RunFolder, stage: StageName) -> Decision:
    """Whether a stage must run: it has not finished, its inputs changed, or its files were damaged."""
    marker = read_marker(folder, stage)
    if marker is None:
        return Decision(True, "not done yet")
    if marker.fingerprint != fingerprint(config, folder, stage):
        return Decision(True, "its configuration or its inputs changed")
    for name, digest in marker.outputs.items():
        path = folder.root / name
        if not path.is_file():
            return Decision(True, f"{name} is missing")
        if file_digest(path) != digest:
            return Decision(True, f"{name} is truncated or altered")
    return Decision(False, "unchanged")


def plan(config: Config, folder: RunFolder, stages: tuple[StageName, ...]) -> dict[StageName, Decision]:
    """What each of these stages would do now; a stage after one that runs is expected to run."""
    decisions: dict[StageName, Decision] = {}
    for stage in stages:
        upstream = _UPSTREAM.get(stage)
        if upstream and upstream in decisions and decisions[upstream].run:
            decisions[stage] = Decision(True, f"after {upstream}")
        else:
            decisions[stage] = decide(config, folder, stage)
    return decisions


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


def write_report(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Merge what the finished stages found into `report.json`, and return it."""
    report: dict[str, Any] = {"name": config.name, "seed": config.seed}
    seconds: dict[str, float] = {}
    machines: dict[str, Any] = {}
    for stage in STAGES:
        marker = read_marker(folder, stage)
        if marker is not None and marker.fingerprint == fingerprint(config, folder, stage):
            result = dict(marker.result)
            machines[stage] = result.pop("machine", None)
            report |= result
            seconds[stage] = marker.seconds
    report["seconds"] = {**seconds, "total": sum(seconds.values())}
    report["machine"] = machines
    with suppress(FileNotFoundError, CorruptFileError):
        if read_json(folder.report) == report:
            return report
    write_json(folder.report, report)
    return report
