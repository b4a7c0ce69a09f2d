"""Runs planned, put into groups that train at once, trained and measured.

Dimensions: n kept checkpoints of a group, P parameters.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mole.checkpoints.population import Progress, train_population
from mole.checkpoints.schedules import schedule_for
from mole.config import HarvestConfig, TaskConfig
from mole.files import value_digest
from mole.representations import weights_digest
from mole.seeding import stream
from mole.tasks import Metrics, Task

SEEDS_PER_CONFIG = 2**20
"""Run r of a harvest has the seed `config.seed * SEEDS_PER_CONFIG + r`."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, trained together."""

    name: str
    config: TaskConfig
    runs: list[int]
    """Numbers of the runs within their harvest."""
    seeds: list[int]
    factors: dict[str, Any]
    """What is varied in this harvest, with this group's values."""


@dataclass(frozen=True)
class Harvested:
    """The kept checkpoints of one group, measured on the prompt images."""

    group: Group
    columns: dict[str, Any]
    """`run`, `step`, `seed`, `diverged`, factors and metrics, each with n values."""
    weights: Tensor
    """(n, P) float32."""
    table: Tensor
    """(n, Q) int64."""
    diverged: int
    """Runs of the group that diverged."""
    seconds: float

    def only(self, rows: Tensor) -> "Harvested":
        """The checkpoints of these rows (n,) bool; their runs, which lose some, count as diverged."""
        if rows.all():
            return self
        lost = {run for run, kept in zip(self.columns["run"], rows.tolist(), strict=True) if not kept}
        kept = rows.nonzero()[:, 0].tolist()
        columns = {name: [values[i] for i in kept] for name in self.columns for values in [self.values(name)]}
        columns["diverged"] = [run in lost or was for run, was in zip(columns["run"], columns["diverged"], strict=True)]
        return replace(self, columns=columns, weights=self.weights[rows], table=self.table[rows])

    def values(self, column: str) -> list[Any]:
        """A column as plain values."""
        found = self.columns[column]
        return found.tolist() if isinstance(found, Tensor) else list(found)

    @property
    def digest(self) -> str:
        """SHA-256 of the runs, the steps and every bit of the weights."""
        named = [self.values("run"), self.values("step")]
        return value_digest([named, weights_digest(self.weights), weights_digest(self.table)])


def plan_groups(task: TaskConfig, harvest: HarvestConfig, seed: int, runs: Sequence[int]) -> list[Group]:
    """The groups of these runs: each run draws its varied factors by its own seed, and runs alike train together."""
    lists = {name: values for name, values in harvest.vary if values is not None}
    alike: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for run in runs:
        generator = stream("factors", seed, run)
        drawn = [int(torch.randint(len(values), (), generator=generator)) for values in lists.values()]
        factors = {name: values[i] for (name, values), i in zip(lists.items(), drawn, strict=True)}
        alike.setdefault(str(factors), (factors, []))[1].append(run)
    groups = []
    for _, (factors, members) in sorted(alike.items(), key=lambda item: item[1][1][0]):
        config = task.model_copy(update=factors)
        for low in range(0, len(members), harvest.group_size):
            part = members[low : low + harvest.group_size]
            seeds = [seed * SEEDS_PER_CONFIG + run for run in part]
            groups.append(Group(f"group-{len(groups):05d}", config, part, seeds, factors))
    return groups


def train_group(task: Task, group: Group, harvest: HarvestConfig, progress: Progress | None = None) -> Harvested:
    """Train the runs of a group by its own recipe, and measure what is kept.

    Args:
        task: the whole task, as its configuration loads it; its data lie where the group shall train.
        group: of `plan_groups`.
        harvest: which states are kept.
        progress: told the network-steps done so far.
    """
    began = time.perf_counter()
    varied = task.with_config(group.config)
    schedule = schedule_for(harvest, group.config.steps, group.seeds)
    history = train_population(varied, group.seeds, schedule, progress=progress)
    metrics: Metrics = {}
    if len(history.weights):
        seeds = [group.seeds[run] for run in history.runs.tolist()]
        metrics = varied.measure(history.weights.to(task.device), "prompt", seeds)
    which = history.runs
    columns: dict[str, Any] = {
        "run": [run_name(group.runs[run]) for run in which.tolist()],
        "step": history.steps,
        "seed": torch.tensor(group.seeds)[which],
        "diverged": history.diverged[which],
        **{name: [value] * len(which) for name, value in group.factors.items()},
        **{name: values.float().cpu() for name, values in metrics.items()},
    }
    diverged = int(history.diverged.sum())
    return Harvested(group, columns, history.weights, history.table, diverged, time.perf_counter() - began)


def run_name(run: int) -> str:
    """Name of a run in the index: its number, in the order of texts."""
    return f"{run:07d}"
