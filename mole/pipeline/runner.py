"""Run the stages of a configuration in a run folder, skipping what is done."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mole.config import Config
from mole.diffusion.generator import versions
from mole.errors import MoleError
from mole.files import remove
from mole.pipeline.current import Run
from mole.pipeline.evaluate import evaluate
from mole.pipeline.harvest import check_drawn, harvest
from mole.pipeline.rank import rank
from mole.pipeline.sample import sample
from mole.pipeline.train import train
from mole.reporting import Reporter
from mole.revision import revision
from mole.stages import (
    RunFolder,
    StageName,
    Work,
    clashes,
    clear_leftovers,
    decide,
    mend_records,
    read_marker,
    sections,
    unlearnable,
    write_marker,
    write_report,
)
from mole.tracking import Tracker

STAGE_FUNCTIONS: dict[StageName, Callable[[Run], Work]] = {
    "harvest": harvest, "train": train, "sample": sample, "evaluate": evaluate, "rank": rank,
}  # fmt: skip


def run(
    config: Config,
    root: Path,
    stages: tuple[StageName, ...],
    reporter: Reporter,
    *,
    began: float,
    replace: bool = False,
    redo: bool = False,
) -> dict[str, Any]:
    """Run the stages that are not done yet; returns the report, which is also written.

    Args:
        config: what to do.
        root: the run folder.
        stages: which stages, in order; those they depend on must have finished.
        reporter: told the progress.
        began: `time.perf_counter()` when the process began; the start-up counts for the first stage.
        replace: whether finished work of another configuration may be replaced.
        redo: whether work of other code is done again.

    Raises:
        MoleError: something the user can mend.
    """
    if faults := unlearnable(config, stages):
        raise MoleError("; ".join(faults))
    folder = RunFolder(root)
    if not replace and (differences := clashes(config, folder, stages)):
        raise MoleError(f"{root} holds work of another configuration ({'; '.join(differences)}); choose another folder")
    device = choose_device(config)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    clear_leftovers(folder)
    for stage in stages:
        marker = read_marker(folder, stage)
        if marker is not None and marker.config != sections(config, stage):
            remove(folder.marker(stage))
    for line in mend_records(config, folder, stages):
        reporter.say(line)
    if {"train", "sample", "evaluate"} & set(stages) and config.harvest.mode == "disk":
        check_drawn(config)
    tracker = Tracker(config.tracking, name=config.name, folder=root, settings=config.model_dump(mode="json"))
    reporter.say(tracker.line)
    current = Run(config, folder, reporter, tracker, device)
    try:
        _ = current.ledger  # a damaged one is said before hours are spent, not after
        for stage in stages:
            decision = decide(config, folder, stage, redo=redo)
            if not decision.run:
                reporter.say(f"{stage}: done already, {decision.reason}; skipped")
                continue
            if (marker := read_marker(folder, stage)) is not None:
                reporter.say(f"{stage}: runs again, {decision.reason}")
                if redo and marker.code.get("source") != revision().source:
                    _forget(folder, stage)
            began = _finish(current, stage, STAGE_FUNCTIONS[stage], began)
    finally:
        tracker.finish()
    mend_records(config, folder, stages)
    return write_report(config, folder)


def _finish(current: Run, stage: StageName, function: Callable[[Run], Work], began: float) -> float:
    """Run one stage and declare it finished; returns when that was."""
    folder = current.folder
    remove(folder.marker(stage))
    if stage != "train":  # a training may continue, and keeps the rows of what it has done
        current.metrics.rewind(stage, -1)
    work = function(current)
    ended = time.perf_counter()
    seconds = ended - began + work.result.pop("seconds_before", 0.0)
    work.result["machine"] = _machine(current.device)
    write_marker(folder, current.config, stage, work, seconds)
    if stage == "train":
        remove(folder.training_state)  # not before the result counts
    if stage == "evaluate":
        remove(folder.parts)
    write_report(current.config, folder)
    return ended


def _forget(folder: RunFolder, stage: StageName) -> None:
    """Remove what a stage would take over of the work of other code."""
    if stage == "harvest":
        for name in ("zoo.json", "shards", "layouts"):
            remove(folder.zoo / name)
    if stage == "train":
        remove(folder.training_state)


def choose_device(config: Config) -> torch.device:
    """CUDA where there is one, unless told otherwise.

    Raises:
        MoleError: CUDA was asked for and is not there.
    """
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise MoleError("runtime.device is cuda, but PyTorch finds no such device; legal here: auto, cpu")
    if config.runtime.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _machine(device: torch.device) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "peak_memory_bytes": peak, "versions": versions()}
