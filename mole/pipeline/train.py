"""Stage 2: train the generator."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mole.checkpoints.stream import Flow, Reservoir
from mole.diffusion.generator import Generator, versions
from mole.diffusion.pairs import PairSource, StreamPairs, ZooPairs
from mole.pipeline.current import Run
from mole.stages import Work, fingerprint


def train(current: Run) -> Work:
    """Train the generator; its state is on disk every few hundred steps."""
    config, folder = current.config, current.folder
    made = learn(current)
    generator = made.generator.save(folder.generator)
    record = _record(current, generator)
    current.ledger.append([record])
    report = {
        "parameters": sum(p.numel() for p in generator.denoiser.parameters()), "steps": config.train.steps,
        "seconds": made.seconds, "steps_per_second": config.train.steps / max(made.seconds, 1e-9),
        "resumed_from_step": made.resumed_from, "digest": generator.digest,
    }  # fmt: skip
    if made.flow is not None:
        report["stream"] = made.flow.report()
    outputs = [folder.generator / name for name in ("config.json", "model.safetensors", "README.md")]
    return Work(outputs, {"train": report, "seconds_before": made.before}, [*made.records, record])


@dataclass(frozen=True)
class Learned:
    """What a training leaves."""

    generator: Generator
    seconds: float
    before: float
    """Seconds of earlier sessions."""
    resumed_from: int
    flow: Flow | None
    """Of a stream."""
    records: list[dict[str, Any]]
    """Of the groups that were streamed, for the ledger."""


def learn(current: Run, *, first: bool = True) -> Learned:
    """Train the generator, or take part in its training: only the `first` process writes."""
    from mole.diffusion.training import Data, train_generator  # Lightning takes seconds to import

    config, folder = current.config, current.folder
    stream: list[Reservoir] = []
    recipe = {name: getattr(config, name).model_dump(mode="json") for name in ("task", "harvest")}
    streamed = {"activity": "harvest", "recipe": {"seed": config.seed, **recipe}, "versions": versions()}
    resumed_from, records = 0, list[dict[str, Any]]()

    def record(group: dict[str, Any]) -> None:
        if first:
            records.append({"kind": "entity", "type": "streamed group", **group, "wasGeneratedBy": streamed})
            current.ledger.append(records[-1:])

    task = current.task

    def source(state: dict[str, Any]) -> PairSource:
        if config.harvest.mode == "disk":
            return ZooPairs(current.training, task, config.generator)
        stream.append(Reservoir(current.task, config.harvest, config.seed, state=state, record=record))
        return StreamPairs(stream[0], task, config.generator)

    def on_resume(step: int) -> None:
        nonlocal resumed_from
        resumed_from = step
        if first:
            current.metrics.rewind("train", step)
        if first and step:
            current.reporter.say(f"train: continues after step {step:,}")

    def log(step: int, values: Mapping[str, float]) -> None:
        if first:
            current.log("train", step, dict(values))

    data = Data(task, source, current.heldout)
    try:
        with current.reporter.stage("train", config.train.steps, "steps") as advance:
            generator, seconds, before = train_generator(
                config, data, folder.training_state, identity=fingerprint(config, folder, "train"),
                device=current.device, progress=advance, log=log, on_resume=on_resume,
            )  # fmt: skip
    finally:
        for reservoir in stream:
            reservoir.close()
    return Learned(generator, seconds, before, resumed_from, stream[0].flow if stream else None, records)


def _record(current: Run, generator: Generator) -> dict[str, Any]:
    """What the ledger says of a generator."""
    settings = current.config.train.model_dump(mode="json")
    made = {"activity": "train", "settings": settings, "seed": current.config.seed, "versions": versions()}
    return {
        "kind": "entity", "type": "generator", "digest": generator.digest,
        "wasDerivedFrom": {"zoo": generator.card.zoo}, "config": generator.card.denoiser.model_dump(mode="json"),
        "wasGeneratedBy": made,
    }  # fmt: skip
