"""How many optimiser steps from the same starts reach what one pass reaches.

Dimensions: N networks, K evaluated steps, P parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mole.checkpoints import History, train_population
from mole.seeding import derived
from mole.tasks import Task


@dataclass(frozen=True)
class OptimiserCurve:
    """Means over the starts at each evaluated step."""

    optimizer: str
    learning_rate: float
    steps: list[int]
    prompt_loss: list[float]
    score: list[float]
    """On the test split: the task's own, accuracy from 0 to 1 or return."""


def best_curve(
    task: Task,
    starts: Tensor,
    optimizer: Literal["adam", "sgd"],
    learning_rates: Sequence[float],
    steps: int,
    seeds: Sequence[int] | None = None,
) -> OptimiserCurve:
    """Train from `starts` (N, P) at every learning rate; keep the one with the lowest loss on prompt images.

    The lowest loss at any step counts, so that a rate is not punished for overfitting later. `seeds` are those of the
    runs whose sub-tasks are learned, if there are such.
    """
    keep = sorted({*range(0, min(steps, 30)), *range(30, min(steps, 100), 5), *range(100, steps, 20), steps})
    curves = []
    for rate in learning_rates:
        recipe = task.config.model_copy(
            update={"optimizer": optimizer, "learning_rate": rate, "schedule": "constant", "weight_decay": 0.0}
        )
        trial = task.with_config(recipe)
        orders = seeds or [derived("trial", index) for index in range(len(starts))]  # data orders of no harvested run
        history = train_population(trial, orders, keep, initial=starts)
        own = None if seeds is None else [seeds[run] for run in history.runs.tolist()]
        prompt = _mean_at(keep, history, task.measure(history.weights, "prompt", own)["loss"])
        score = _mean_at(keep, history, task.measure(history.weights, "test", own)[task.score])
        curves.append(OptimiserCurve(optimizer, rate, keep, prompt, score))
    return min(curves, key=lambda curve: min(torch.tensor(curve.prompt_loss).nan_to_num(torch.inf).tolist()))


def _mean_at(keep: Sequence[int], history: History, values: Tensor) -> list[float]:
    """Mean over the runs at each step; NaN from where a run diverged."""
    runs = len(history.diverged)
    found = [values[history.steps == step] for step in keep]
    return [float(here.mean()) if len(here) == runs else float("nan") for here in found]


def steps_to_match(curve: OptimiserCurve, score: float) -> int | None:
    """The first evaluated step whose mean test score is at least `score`; None if there is none."""
    return next((step for step, found in zip(curve.steps, curve.score, strict=True) if found >= score), None)
