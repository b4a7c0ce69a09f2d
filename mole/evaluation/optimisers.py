"""How many optimiser steps from the same starts reach what one pass reaches.

Dimensions: N networks, K evaluated steps, P parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mole.checkpoints import train_population
from mole.tasks import Task


@dataclass(frozen=True)
class OptimiserCurve:
    """Means over the starts at each evaluated step."""

    optimizer: str
    learning_rate: float
    steps: list[int]
    prompt_loss: list[float]
    accuracy: list[float]
    """On the test images, 0..1."""


def best_curve(
    task: Task, starts: Tensor, optimizer: Literal["adam", "sgd"], learning_rates: Sequence[float], steps: int
) -> OptimiserCurve:
    """Train from `starts` (N, P) at every learning rate; keep the one with the lowest loss on prompt images.

    The lowest loss at any step counts, so that a rate is not punished for overfitting later.
    """
    keep = sorted({*range(0, min(steps, 30)), *range(30, min(steps, 100), 5), *range(100, steps, 20), steps})
    curves = []
    for rate in learning_rates:
        recipe = task.config.model_copy(
            update={"optimizer": optimizer, "learning_rate": rate, "schedule": "constant", "weight_decay": 0.0}
        )
        trial = replace(task, config=recipe)
        seeds = [2**41 + index for index in range(len(starts))]  # data orders of no harvested run
        states = train_population(trial, seeds, keep, initial=starts)  # (N, K, P)
        flat = states.flatten(0, 1)
        shape = states.shape[:2]
        prompt = task.measure(flat, task.prompt).loss.unflatten(0, shape).mean(0)
        accuracy = task.measure(flat, task.test).accuracy.unflatten(0, shape).mean(0)
        curves.append(OptimiserCurve(optimizer, rate, keep, prompt.tolist(), accuracy.tolist()))
    return min(curves, key=lambda curve: min(torch.tensor(curve.prompt_loss).nan_to_num(torch.inf).tolist()))


def steps_to_match(curve: OptimiserCurve, accuracy: float) -> int | None:
    """The first evaluated step whose mean test accuracy is at least `accuracy`; None if there is none."""
    return next((s for s, a in zip(curve.steps, curve.accuracy, strict=True) if a >= accuracy), None)
