"""The networks that the released checkpoints of G.pt hold (Peebles et al. 2022)."""

import re
from dataclasses import dataclass
from functools import cached_property

from mole.representations import WeightSpec
from mole.tasks import Architecture


@dataclass(frozen=True)
class GptNetwork:
    """One of G.pt's network families."""

    architecture: Architecture
    steps_per_epoch: int

    @cached_property
    def spec(self) -> WeightSpec:
        return WeightSpec.of(self.architecture.build(seed=0))

    def fits(self, sizes: list[int]) -> bool:
        """Whether tensors of these sizes are of this family; a critic may follow a policy."""
        mine = [entry.size for entry in self.spec.entries]
        return sizes == mine or (self.architecture.kind == "policy" and sizes[: len(mine)] == mine)


NETWORKS = (
    GptNetwork(Architecture(kind="mlp", widths=[784, 10, 10]), 468),
    GptNetwork(Architecture(kind="convnet", widths=[3, 16, 32, 10]), 390),
    GptNetwork(Architecture(kind="policy", widths=[4, 32, 32, 1], activation="selu"), 1),
)


def step_of_key(key: str, sizes: list[int], place: int) -> int:
    """Optimiser steps (CartPole: iterations) of a key like `000001/ep002_it00010.pt`; else its place."""
    found = re.search(r"(?:ep(\d+)_)?it(\d+)", key)
    if not found:
        return place
    per_epoch = next((known.steps_per_epoch for known in NETWORKS if known.fits(sizes)), 1)
    return int(found[1] or 0) * per_epoch + int(found[2])
