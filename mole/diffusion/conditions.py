"""What is known and what is asked of the generator, and how the denoiser reads it.

Dimensions: B networks, S scalars, K examples, C classes, D width, P parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.checkpoints.recipes import subject
from mole.errors import MoleError

FEATURES = 64
"""Fourier features per scalar."""


@dataclass(frozen=True)
class Conditions:
    """Everything is optional, row by row: NaN is a scalar that nobody gave, label -1 an example that is not there."""

    scalars: Tensor
    """(B, S), in the order of the generator's `conditions`."""
    started: Tensor
    """(B,) bool: whether there is a start network."""
    images: Tensor | None = None
    """(B, K, M): a labelled support set of the data, as networks read it."""
    labels: Tensor | None = None
    """(B, K) int64, -1 for none."""
    gradient: Tensor | None = None
    """(B, P): of the start's loss on the support set, normalised; 0 where there is no start or no support set."""

    @classmethod
    def of(cls, names: Sequence[str], size: int, given: Mapping[str, Tensor | float]) -> "Conditions":
        """Scalars by their names, the others unknown; every network has a start."""
        if unknown := set(given) - set(names):
            raise MoleError(
                f"{', '.join(sorted(unknown))}: no condition of this generator; it knows {', '.join(names)}"
            )
        columns = [torch.as_tensor(given.get(name, math.nan), dtype=torch.float32).expand(size) for name in names]
        return cls(torch.stack(columns, 1), torch.ones(size, dtype=torch.bool))

    def to(self, device: torch.device) -> "Conditions":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def double(self) -> "Conditions":
        """In float64, for tests of exactness."""
        return self._each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def part(self, rows: Tensor) -> "Conditions":
        """Those of some rows: a mask (B,)."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return Conditions(**changed)

    def without(
        self, columns: Tensor | None = None, *, started: Tensor | None = None, data: Tensor | None = None
    ) -> "Conditions":
        """The same with some things taken away.

        Args:
            columns: (B, S) bool, scalars to forget.
            started: (B,) bool, rows to lose their start.
            data: (B,) bool, rows to lose their support set.
        """
        left = self
        if columns is not None:
            left = replace(left, scalars=left.scalars.masked_fill(columns, math.nan))
        if data is not None and left.labels is not None:
            left = replace(left, labels=left.labels.masked_fill(data[:, None], -1))
        if started is not None:
            left = replace(left, started=left.started & ~started)
        gone = [rows for rows in (started, data) if rows is not None]
        if gone and left.gradient is not None:
            lost = torch.stack(gone).any(0)
            left = replace(left, gradient=left.gradient.masked_fill(lost[:, None], 0.0))
        return left


def scale_of(name: str, value: Tensor) -> Tensor:
    """A scalar brought to order 1: losses, rates and counts by their logarithm, accuracies by that of the error."""
    kind = subject(name)
    if kind == "accuracy":
        return (1.003 - value).log()
    if kind == "return":
        return value / 100
    if kind in ("loss", "learning_rate", "batch_size", "steps"):
        return (value.clamp_min(0) + 1e-3).log()
    return value


class ConditionEmbedding(nn.Module):
    """Noise level and scalars as Fourier features, mixed by a small MLP into (B, D).

    Args:
        names: of the scalars.
        width: D.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.names = list(names)
        inputs = (1 + len(self.names)) * FEATURES
        self.absent = nn.Parameter(torch.zeros(len(self.names), FEATURES))
        self.no_start = nn.Parameter(torch.zeros(FEATURES))
        self.mix = nn.Sequential(nn.Linear(inputs + FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, level: Tensor, conditions: Conditions) -> Tensor:
        features = [fourier(level)]
        for column, name in enumerate(self.names):
            value = conditions.scalars[:, column]
            missing = value.isnan()
            known = fourier(scale_of(name, value.masked_fill(missing, 1.0)))
            features.append(torch.where(missing[:, None], self.absent[column].to(known), known))
        nothing = torch.zeros_like(self.no_start)
        features.append(torch.where(conditions.started[:, None], nothing, self.no_start).to(level))
        return self.mix(torch.cat(features, -1))


class SetEncoder(nn.Module):
    """A labelled support set as one vector per class: the order of the examples means nothing.

    Per class the mean of what a small network makes of each example (Zaheer et al. 2017), and the mean example.

    Args:
        numbers: per example, M.
        width: D.
    """

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.example = nn.Sequential(nn.Linear(numbers, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.mean = nn.Linear(numbers, width, bias=False)
        self.mix = nn.Linear(width, width)
        self.empty = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """(B, C, D) of images (B, K, M) and labels (B, K); a class without examples has a vector of its own."""
        member = F.one_hot(labels + 1, classes + 1)[:, :, 1:].to(images)  # (B, K, C)
        count = member.sum(1)[..., None]  # (B, C, 1)
        share = member.mT / count.clamp_min(1)  # (B, C, K)
        found = self.mix(share @ self.example(images)) + share @ self.mean(images)
        return torch.where(count > 0, found, self.empty)


def fourier(values: Tensor) -> Tensor:
    """Sines and cosines of (B,) values of order 1, at log-spaced frequencies from 0.5 to 64: (B, FEATURES)."""
    exponents = torch.linspace(math.log(0.5), math.log(64), FEATURES // 2, device=values.device)
    angles = values[:, None] * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], -1)
