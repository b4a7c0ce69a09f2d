"""How many optimiser steps from the same starts reach what one pass reaches.

Dimensions: N networks, K evaluated steps, P parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from torch import Tensor

from mole.checkpoints import History, train_population
from mole.seeding import derived
from mole.tasks import Task

OptimizerName = Literal["adam", "sgd"]


@dataclass(frozen=True)
class OptimiserCurve:
    """Means over the starts at each evaluated step; None or NaN from where a run diverged."""

    optimizer: str
    learning_rate: float
    steps: list[int]
    prompt_loss: list[float | None]
    score: list[float | None]
    """On the test split: the task's own, accuracy from 0 to 1 or return."""


def best_curve(
    task: Task,
    starts: Tensor,
    optimizer: OptimizerName,
    learning_rates: Sequence[float],
    steps: int,
    seeds: Sequence[int] | None = None,
) -> OptimiserCurve:
    """Train from `starts` (N, P) at every learning rate; keep the one with the lowest loss on prompt images.

    `seeds` are those of the runs whose sub-tasks are learned, if there are such.
    """
    return best_of([curve_of(task, starts, optimizer, rate, steps, seeds) for rate in learning_rates])


def best_of(curves: Sequence[OptimiserCurve]) -> OptimiserCurve:
    """The curve with the lowest loss on prompt images.

    The lowest loss at any step counts, so that a rate is not punished for overfitting later.
    """
    return min(curves, key=lambda curve: min((x for x in curve.prompt_loss if x is not None and x == x), default=inf))


def curve_of(
    task: Task, starts: Tensor, optimizer: OptimizerName, rate: float, steps: int, seeds: Sequence[int] | None = None
) -> OptimiserCurve:
    """Train from `starts` (N, P) at one learning rate."""
    keep = sorted({*range(0, min(steps, 30)), *range(30, min(steps, 100), 5), *range(100, steps, 20), steps})
    recipe = task.config.model_copy(
        update={"optimizer": optimizer, "learning_rate": rate, "schedule": "constant", "weight_decay": 0.0}
    )
    trial = task.with_config(recipe)
    orders = seeds or [derived("trial", index) for index in range(len(starts))]  # data orders of no harvested run
    history = train_population(trial, orders, keep, initial=starts)
    own = None if seeds is None else [seeds[run] for run in history.runs.tolist()]
    prompt = _mean_at(keep, history, task.measure(history.weights, "prompt", own)["loss"])
    score = _mean_at(keep, history, task.measure(history.weights, "test", own)[task.score])
    return OptimiserCurve(optimizer, rate, keep, prompt, score)


def _mean_at(keep: Sequence[int], history: History, values: Tensor) -> list[float | None]:
    """Mean over the runs at each step; NaN from where a run diverged."""
    runs = len(history.diverged)
    found = [values[history.steps == step] for step in keep]
    return [float(here.mean()) if len(here) == runs else float("nan") for here in found]


def steps_to_match(curve: OptimiserCurve, score: float | None) -> int | None:
    """The first evaluated step whose mean test score is at least `score`; None if there is none."""
    if score is None:
        return None
    steps = zip(curve.steps, curve.score, strict=True)
    return next((step for step, reached in steps if reached is not None and reached >= score), None)
