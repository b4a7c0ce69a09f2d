"""What the stages of one run share."""

from dataclasses import dataclass
from functools import cached_property

import torch

from mole.checkpoints import Zoo
from mole.checkpoints.backends import make_backend
from mole.checkpoints.groups import plan_groups
from mole.checkpoints.layouts import own_part
from mole.config import Config
from mole.diffusion import Generator
from mole.metrics import MetricsFile
from mole.provenance import Ledger
from mole.reporting import Reporter
from mole.stages import RunFolder, StageName
from mole.tasks import Task, load_task
from mole.tracking import Tracker


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
        """Training runs and held-out runs on disk."""
        return Zoo(self.folder.zoo).finished().split_by_run(self.config.harvest.heldout_runs)

    @cached_property
    def training(self) -> Zoo:
        """Training runs; while streaming the first of them, trained again."""
        settings = self.config.harvest
        return self.zoo[0] if settings.mode == "disk" else self._again(range(settings.runs))

    @cached_property
    def heldout(self) -> Zoo:
        """Runs that the generator never sees; while streaming they are trained for the occasion."""
        settings = self.config.harvest
        runs = range(settings.runs, settings.runs + settings.heldout_runs)
        return self.zoo[1] if settings.mode == "disk" else self._again(runs)

    def starts(self, wanted: int) -> torch.Tensor:
        """Where in `own_heldout` the first states of `wanted` runs are, or of all there are if some diverged."""
        found = self.own_heldout.first[:wanted]
        if len(found) < wanted:
            why = "diverged" if self.own_heldout.runs == self.heldout.runs else "diverged or have other networks"
            self.reporter.say(f"{wanted - len(found)} held-out runs {why}: {len(found)} starts instead of {wanted}")
        return found

    @cached_property
    def own_heldout(self) -> Zoo:
        """Held-out runs with the networks of the configuration's task, where there are others too."""
        return own_part(self.heldout, self.task)

    def _again(self, runs: range) -> Zoo:
        """These runs in memory."""
        config = self.config
        total = len(runs) * config.task.steps
        groups = plan_groups(config.task, config.harvest, config.seed, runs)
        with self.reporter.stage("again", total, "steps") as advance:
            found = list(make_backend(self.task, config.harvest).run(groups, advance))
        columns = {name: [value for part in found for value in part.values(name)] for name in found[0].columns}
        return Zoo.of(
            self.task.spec,
            columns,
            torch.cat([part.weights for part in found]),
            table=torch.cat([part.table for part in found]),
        ).finished()

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
