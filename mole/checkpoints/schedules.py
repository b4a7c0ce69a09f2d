"""Which states of a training are kept.

Dimensions: n runs that are still training, K kept states.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mole.config import HarvestConfig
from mole.seeding import stream

SMALLEST_SHARE = 0.01
"""`ByLoss` spreads its thresholds from the first loss down to this share of it."""


class Schedule(Protocol):
    """Decides after every step which runs keep their state; first and last states are always kept."""

    def due(self, step: int, runs: Tensor, losses: Tensor | None) -> Tensor | None:
        """Which of the runs keep the state after `step` optimiser steps.

        Args:
            step: optimiser steps taken.
            runs: (n,), which runs are still training, as indices into the population.
            losses: (n,), training losses of the step that led here; None before the first.

        Returns:
            (n,) bool, or None for no run.
        """
        ...


class AtSteps:
    """The same steps for every run."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)

    def due(self, step: int, runs: Tensor, losses: Tensor | None) -> Tensor | None:
        return torch.ones(len(runs), dtype=torch.bool) if step in self.steps else None


class AtRandom:
    """The first state, the last, and random ones between, each run its own (Peebles et al. 2022)."""

    def __init__(self, seeds: Sequence[int], steps: int, count: int) -> None:
        self.runs: dict[int, list[int]] = {}
        for run, seed in enumerate(seeds):
            generator = stream("kept steps", seed)
            between = torch.randperm(steps - 1, generator=generator)[: count - 2] + 1
            for step in [0, *between.tolist(), steps]:
                self.runs.setdefault(step, []).append(run)

    def due(self, step: int, runs: Tensor, losses: Tensor | None) -> Tensor | None:
        if step not in self.runs:
            return None
        return torch.isin(runs, torch.tensor(self.runs[step]))


class ByLoss:
    """The first state, the last, and one whenever the smoothed training loss has fallen by a constant factor."""

    def __init__(self, runs: int, steps: int, count: int) -> None:
        self.last, self.factor = steps, SMALLEST_SHARE ** (1 / max(1, count - 2))
        self.smooth, self.threshold = torch.full((2, runs), torch.inf)
        self.left = torch.full((runs,), count - 2)

    def due(self, step: int, runs: Tensor, losses: Tensor | None) -> Tensor | None:
        if losses is None or step == self.last:
            return torch.ones(len(runs), dtype=torch.bool)
        losses, before = losses.cpu(), self.smooth[runs]
        smooth = torch.where(before.isinf(), losses, 0.9 * before + 0.1 * losses)
        threshold = torch.where(before.isinf(), smooth * self.factor, self.threshold[runs])
        due = (smooth <= threshold) & (self.left[runs] > 0)
        self.left[runs] -= due.long()
        self.smooth[runs], self.threshold[runs] = smooth, torch.where(due, smooth * self.factor, threshold)
        return due if due.any() else None


def schedule_for(config: HarvestConfig, steps: int, seeds: Sequence[int]) -> Schedule:
    """The schedule that a configuration asks for, for runs of `steps` steps with these seeds."""
    count = config.checkpoints
    if config.keep == "random":
        return AtRandom(seeds, steps, count)
    if config.keep == "loss":
        return ByLoss(len(seeds), steps, count)
    return AtSteps(kept_steps(steps, count) if config.keep == "log" else even_steps(steps, count))


def even_steps(steps: int, count: int) -> list[int]:
    """`count` steps from 0 to `steps`, as evenly spaced as whole numbers allow."""
    return sorted({round(steps * index / (count - 1)) for index in range(count)})


def kept_steps(steps: int, count: int) -> list[int]:
    """The first step, the last, and log-spaced ones between: `count` of them, all different.

    Example:
        >>> kept_steps(300, 6)
        [0, 1, 4, 17, 72, 300]
    """
    if count < 2 or steps < count - 1:
        raise ValueError(f"cannot keep {count} of {steps + 1} states; legal is 2 to {steps + 1}")
    kept: list[int] = [0]
    for left in range(count - 1, 0, -1):  # equal ratios from here to the end, but at least one step
        here = kept[-1]
        ratio = (steps / max(here, 1)) ** (1 / left) if here else 1.0
        kept.append(min(max(here + 1, round(here * ratio)), steps - left + 1))
    kept[-1] = steps
    return kept
