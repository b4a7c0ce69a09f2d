"""Networks that are no networks: the one rule by which they are left out of every figure.

A network is sound if all of its weights and its loss are finite numbers. The others are counted (`finite_fraction`) and
left out of means and distances; a figure of which no sound network is left is NaN, and null in the report.

Dimensions: N networks, P parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mole.tasks import Metrics, SplitName, Task


def is_finite(flat: Tensor) -> Tensor:
    """Which networks (N, P) have finite weights alone: (N,) bool."""
    return flat.isfinite().all(1)


def measure_sound(task: Task, flat: Tensor, split: SplitName, seeds: Sequence[int] | None = None) -> Metrics:
    """Metrics (N,) of networks (N, P) on a split; NaN where a network is not sound."""
    metrics = task.measure(flat, split, seeds)
    sound = is_finite(flat).to(metrics["loss"].device) & metrics["loss"].isfinite()
    return {name: torch.where(sound, values.float(), torch.nan) for name, values in metrics.items()}


def mean(values: Tensor) -> float:
    """Mean of the finite ones of these numbers; NaN if there are none."""
    return float(values[values.isfinite()].double().mean())


def deviation(values: Tensor) -> float:
    """Standard deviation of the finite ones of these numbers; 0 for a single one, NaN if there are none."""
    finite = values[values.isfinite()]
    return float(finite.std()) if len(finite) > 1 else 0.0 * mean(values)
