"""What the stages of one run share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mole.checkpoints import Zoo
from mole.config import Config
from mole.diffusion import Generator
from mole.metrics import MetricsFile
from mole.provenance import Ledger
from mole.reporting import Reporter
from mole.stages import RunFolder, StageName
from mole.tasks import Task, load_task
from mole.tracking import Tracker

Result = tuple[list[Path], dict[str, Any]]
"""Files that a stage wrote, and its part of the report."""


@dataclass(frozen=True)
class Run:
    """One configuration in one folder, with what the stages share."""

    config: Config
    folder: RunFolder
    reporter: Reporter
    tracker: Tracker
    device: torch.device

    @cached_property
    def task(self) -> Task:
        """The task, its data on the device."""
        return load_task(self.config.task).to(self.device)

    @cached_property
    def zoo(self) -> tuple[Zoo, Zoo]:
        """Training runs and held-out runs."""
        return Zoo.open(self.folder.zoo).split_by_run(self.config.harvest.heldout_runs)

    @cached_property
    def generator(self) -> Generator:
        return Generator.load(self.folder.generator, self.device)

    @cached_property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.folder.metrics)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.folder.ledger)

    def log(self, stage: StageName, step: int, values: dict[str, float]) -> None:
        """Into `metrics.csv`, and to the tracker."""
        self.metrics.append(stage, step, values)
        self.tracker.log({**values, f"{stage}/step": step})
