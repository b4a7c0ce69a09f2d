"""Populations in transit: runs are drawn from while others train, and no zoo is written.

Dimensions: K kept states of a run, P parameters.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mole.checkpoints.backends import Background, make_backend
from mole.checkpoints.groups import Group, Harvested, plan_groups
from mole.checkpoints.recipes import RECIPE, coded
from mole.config import HarvestConfig
from mole.errors import MoleError
from mole.tasks import Task

GIVE_UP = 4
"""Group sizes of runs that may diverge in a row."""


@dataclass
class LiveRun:
    """One run in the reservoir."""

    weights: Tensor
    """(K, P)."""
    loss: Tensor
    """(K,)."""
    values: dict[str, Tensor]
    """Steps and metrics, each (K,)."""
    seed: int
    uses: list[int]
    """Times that each state has been read."""


@dataclass
class Flow:
    """What has come through a reservoir."""

    began: float = field(default_factory=time.monotonic)
    before: int = 0
    """Checkpoints of earlier sessions of the same training."""
    runs: int = 0
    checkpoints: int = 0
    diverged: int = 0
    reads: int = 0
    waited: float = 0.0
    """Seconds that the reader had to wait."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest value of every metric."""
    digests: list[str] = field(default_factory=list)
    """Of every group."""

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> "Flow":
        """Goes on from the `state` of an earlier session."""
        return cls(**{**state, "before": state["checkpoints"]})

    def widen(self, values: Mapping[str, Tensor]) -> None:
        """Take these values (n,) into the ranges."""
        for name, found in values.items():
            low, high = self.ranges.get(name, (float("inf"), -float("inf")))
            self.ranges[name] = min(low, float(found.min())), max(high, float(found.max()))

    def state(self) -> dict[str, Any]:
        """What a training that is resumed shall still know."""
        return {name: value for name, value in asdict(self).items() if name != "began"}

    @property
    def reuse(self) -> float:
        """Reads per checkpoint so far."""
        return self.reads / max(1, self.checkpoints)

    @property
    def rate(self) -> float:
        """Fresh checkpoints per second in this session."""
        return (self.checkpoints - self.before) / max(1e-9, time.monotonic() - self.began)

    def report(self) -> dict[str, float | int]:
        """The numbers for `report.json`."""
        return {
            "runs": self.runs, "diverged_runs": self.diverged, "checkpoints": self.checkpoints,
            "checkpoints_per_second": self.rate, "reads_per_checkpoint": self.reuse, "waited_seconds": self.waited,
        }  # fmt: skip

    def note(self) -> str:
        """What a person watches."""
        return f"{self.rate:,.0f} fresh checkpoints/s, each read {self.reuse:.1f} times"


class Reservoir:
    """A bounded number of runs; each of their states is read at most `reuse` times.

    It fills from a thread that trains populations. That thread waits while the reservoir is full, and a
    reader waits while fewer than `floor` runs are left.

    Args:
        task: the whole task.
        harvest: the configuration's section.
        seed: of the configuration.
        state: of the reservoir that an earlier session of the same training had; the runs that it held are gone.
        record: told of every group before one of its runs is read: its runs, seeds, factors and digest,
            enough to train it again, bit for bit on the same machine.
    """

    def __init__(
        self,
        task: Task,
        harvest: HarvestConfig,
        seed: int,
        *,
        state: Mapping[str, Any] | None = None,
        record: Callable[[dict[str, Any]], None] = lambda group: None,
    ) -> None:
        self.task, self.harvest, self.record = task, harvest, record
        self.runs: list[LiveRun] = []
        self.change: Callable[[Tensor], Tensor] = lambda weights: weights
        self.lost = 0
        """Runs in a row that diverged, whole groups of them."""
        self.flow = Flow.resumed(state["flow"]) if state else Flow()
        self.floor = min(harvest.group_size, harvest.reservoir // 2)
        self.batches = _Batches(task, harvest, seed, state["next_batch"] if state else 0)
        self.source = Background(make_backend(task, harvest), self.batches)
        try:
            self._refill()
        except BaseException:
            self.close()
            raise

    def state(self) -> dict[str, Any]:
        """Where a training that is resumed goes on; no run of the batches from the next one on has been read."""
        return {"next_batch": self.batches.number + 1, "flow": self.flow.state()}

    def choose(self, generator: torch.Generator, count: int) -> list[LiveRun]:
        """Random runs, more of them if there are too few."""
        self._refill()
        return [self.runs[i] for i in torch.randint(len(self.runs), (count,), generator=generator).tolist()]

    def use(self, run: LiveRun, first: int, second: int) -> bool:
        """Count one read of two states; False, and the run is retired, if one has been read often enough."""
        reads = {first: 2} if first == second else {first: 1, second: 1}
        if any(run.uses[state] + more > self.harvest.reuse for state, more in reads.items()):
            self.runs = [other for other in self.runs if other is not run]
            if not self.runs:
                self._refill()
            return False
        for state, more in reads.items():
            run.uses[state] += more
        self.flow.reads += 2
        return True

    def prepare(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the weights (K, P) of every run, of those that are here and of those to come."""
        self.change = change
        for run in self.runs:
            run.weights = change(run.weights)

    def _refill(self) -> None:
        while len(self.runs) + self.harvest.group_size <= self.harvest.reservoir:
            needed = len(self.runs) < self.floor
            began = time.monotonic()
            found = self.source.take(wait=needed)
            self.flow.waited += time.monotonic() - began if needed else 0.0
            if found is None:
                return
            self._add(found)

    def _add(self, found: Harvested) -> None:
        spec = self.task.with_config(found.group.config).spec
        if spec != self.task.spec:
            raise MoleError("harvest.vary: networks of several widths or depths cannot be streamed to one generator")
        loss, names = found.columns["loss"], found.columns["run"]
        diverged = found.columns["diverged"]
        measured = {"steps": "step"} | {n: n for n, column in found.columns.items()
                                        if isinstance(column, Tensor) and column.is_floating_point()}  # fmt: skip
        starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
        for low, high in zip(starts, [*starts[1:], len(names)], strict=True):
            if not diverged[low] and bool(loss[low:high].isfinite().all()):
                weights = self.change(found.weights[low:high].clone())  # a view would keep its whole group in memory
                values = {name: found.columns[column][low:high].float() for name, column in measured.items()}
                recipe = {name: coded(name, value) for name, value in found.group.factors.items() if name in RECIPE}
                values |= {name: torch.full((high - low,), value) for name, value in recipe.items()}
                seed = int(found.columns["seed"][low])
                self.runs.append(LiveRun(weights, loss[low:high], values, seed, [0] * (high - low)))
                self.flow.runs += 1
                self.flow.checkpoints += high - low
                self.flow.widen(values)
        self.flow.diverged += found.diverged
        group = found.group
        self.flow.digests.append(found.digest)
        self.record({"runs": group.runs, "seeds": group.seeds, "factors": group.factors, "digest": found.digest})
        self.lost = self.lost + len(group.runs) if found.diverged == len(group.runs) else 0
        if self.lost >= GIVE_UP * self.harvest.group_size:
            raise MoleError(f"{self.lost} runs in a row diverged; lower task.learning_rate")

    def close(self) -> None:
        """Stop training populations."""
        self.source.stop()


class _Batches:
    """Groups without end, held-out runs left out."""

    def __init__(self, task: Task, harvest: HarvestConfig, seed: int, first: int) -> None:
        self.task, self.harvest, self.seed, self.number = task, harvest, seed, first

    def __iter__(self) -> Iterator[Group]:
        size, heldout = self.harvest.group_size, self.harvest.heldout_runs
        while True:
            low = self.number * size
            numbers = [run if run < self.harvest.runs else run + heldout for run in range(low, low + size)]
            if numbers[-1] >= 2**20:
                raise MoleError("harvest: all 1,048,576 runs of this seed have been streamed; choose another seed")
            yield from plan_groups(self.task.config, self.harvest, self.seed, numbers)
            self.number += 1
