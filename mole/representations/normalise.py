"""Weights of different tensors brought to one scale; separate from any layout."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mole.errors import MoleError
from mole.representations.spec import WeightSpec


@dataclass(frozen=True)
class EntryScale:
    """Divides every tensor of a network by its own standard deviation over a population."""

    scale: Tensor
    """(P,) float32, constant within a tensor."""

    @classmethod
    def fit(cls, spec: WeightSpec, chunks: Iterable[Tensor]) -> "EntryScale":
        """From networks in parts (n, P), with float64 statistics; a constant tensor keeps its scale."""
        total, square = torch.zeros(2, spec.size, dtype=torch.float64)
        rows = 0
        for part in chunks:
            total += part.double().sum(0).cpu()
            square += part.double().square().sum(0).cpu()
            rows += len(part)
        stds = []
        for entry in spec.entries:
            here, numbers = slice(entry.offset, entry.stop), entry.size * rows
            mean = total[here].sum() / numbers
            std = float((square[here].sum() / numbers - mean.square()).clamp_min(0).sqrt())
            stds.append(std if std > 1e-12 else 1.0)
        return cls.of(spec, stds)

    @classmethod
    def of(cls, spec: WeightSpec, stds: list[float]) -> "EntryScale":
        """From one standard deviation per tensor.

        Raises:
            MoleError: a value is not a positive number, or there are too few or too many.
        """
        if len(stds) != len(spec.entries) or not all(0 < s < float("inf") for s in stds):
            raise MoleError(f"scales {stds}: legal is one positive number for each of {len(spec.entries)} tensors")
        parts = [torch.full((e.size,), s) for e, s in zip(spec.entries, stds, strict=True)]
        return cls(torch.cat(parts))

    def stds(self, spec: WeightSpec) -> list[float]:
        """One number per tensor, as `of` takes them."""
        return [float(self.scale[e.offset]) for e in spec.entries]

    def normalise(self, flat: Tensor) -> Tensor:
        return flat / self.scale.to(flat.device)

    def restore(self, flat: Tensor) -> Tensor:
        return flat * self.scale.to(flat.device)
