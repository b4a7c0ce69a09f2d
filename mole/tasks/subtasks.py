"""Tasks within a task: which labels there are, what they are called, how images are turned, which pixels are seen.

Every run draws its own from its seed, so that no two runs learn the same, and runs held out have tasks held out.

Dimensions: N runs, K labels, B images, D numbers per image.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.config import SubtaskConfig
from mole.errors import MoleError
from mole.seeding import stream


class Subtasks(NamedTuple):
    """The sub-tasks of some runs."""

    names: Tensor
    """(N, K) int64: what each label of the data is called; -1 where its images are left out."""
    angles: Tensor
    """(N,), by how much images are turned, in radians."""
    seen: Tensor
    """(N, D) bool: pixels that are not blanked."""

    def labels(self, labels: Tensor) -> Tensor:
        """What labels (B,) or (N, B) of the data are called in each sub-task: (N, B), -1 for those left out."""
        return self.names.gather(1, labels.expand(len(self.names), -1))

    def images(self, images: Tensor) -> Tensor:
        """Images (B, D), or each run's own (N, B, D), as each sub-task shows them: (N, B, D)."""
        runs, numbers = self.seen.shape
        images = images.expand(runs, -1, -1)
        if bool((self.angles != 0).any()):
            side, cos, sin = isqrt(numbers), self.angles.cos(), self.angles.sin()
            zero = torch.zeros_like(cos)
            turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)  # (N, 2, 3)
            grid = F.affine_grid(turn, [runs, 1, side, side], align_corners=False)
            plain = images.unflatten(-1, (side, side))
            images = F.grid_sample(plain, grid, align_corners=False).flatten(2)
        return images * self.seen[:, None]


def draw(config: SubtaskConfig, seeds: Sequence[int], *, classes: int, numbers: int) -> Subtasks:
    """The sub-tasks of the runs with these seeds.

    Args:
        config: what may differ.
        seeds: of the runs; a run's sub-task depends on its own seed alone.
        classes: labels of the data, K.
        numbers: per image, D.

    Raises:
        MoleError: more labels than there are, or images to be turned that are not square.
    """
    settings = config.model_dump_json()
    rows = [_one(settings, seed, classes, numbers) for seed in seeds]
    names, angles, seen = zip(*rows, strict=True)
    return Subtasks(torch.stack(names), torch.tensor(angles), torch.stack(seen))


@lru_cache(2**16)
def _one(settings: str, seed: int, classes: int, numbers: int) -> tuple[Tensor, float, Tensor]:
    """Names (K,), angle, and seen pixels (D,)."""
    config = SubtaskConfig.model_validate_json(settings)
    low, high = config.labels or (classes, classes)
    if high > classes:
        raise MoleError(f"task.subtasks.labels is {config.labels}; legal is at most {classes} labels")
    if config.rotate and isqrt(numbers) ** 2 != numbers:
        raise MoleError(f"task.subtasks.rotate: rows of {numbers} numbers are no square images; legal is 0")
    generator = stream("sub-task", seed)
    count = int(torch.randint(low, high + 1, (), generator=generator))
    left = torch.randperm(classes, generator=generator)[count:]
    order = torch.randperm(classes, generator=generator)
    names = (order if config.rename else torch.arange(classes)).index_fill(0, left, -1)
    angle = math.radians(config.rotate) * float(2 * torch.rand((), generator=generator) - 1)
    share = config.pixels + (1 - config.pixels) * float(torch.rand((), generator=generator))
    kept = torch.randperm(numbers, generator=generator)[: max(1, round(share * numbers))]
    return names, angle, torch.zeros(numbers, dtype=torch.bool).index_fill(0, kept, value=True)
