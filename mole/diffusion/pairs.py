"""Training pairs: a start and a later state of the same run, noised.

Dimensions: R runs, K kept states, P parameters, B pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mole.checkpoints import Zoo
from mole.config import TrainConfig
from mole.diffusion.conditions import Conditions
from mole.diffusion.process import noise_level, noise_schedule
from mole.representations import EntryScale


class Batch(NamedTuple):
    """Pairs for one step; weights are normalised, (B, P)."""

    noised: Tensor
    start: Tensor
    clean: Tensor
    level: Tensor
    conditions: Conditions


class PairBatches(IterableDataset[Batch]):
    """The batches of a training, from `first_step` to its end.

    A batch depends on the seed and its step alone, so a resumed training sees what it would have seen.
    """

    def __init__(self, zoo: Zoo, scale: EntryScale, config: TrainConfig, *, seed: int, first_step: int = 0) -> None:
        super().__init__()
        self.weights = scale.normalise(zoo.weights)
        self.loss = zoo.loss
        self.config, self.seed, self.first_step = config, seed, first_step
        self.schedule = noise_schedule()

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first_step, self.config.steps):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """The pairs of one step.

        States are drawn uniformly and put in order of time; a share aims at the last quarter of the
        kept states, a share starts from the initialisation; noise levels are uniform, and a share is
        pure noise.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        size, (runs, states, _) = self.config.batch_size, self.weights.shape
        run = torch.randint(runs, (size,), generator=generator)
        first, second = torch.randint(states, (2, size), generator=generator).sort(0).values
        late = torch.rand(size, generator=generator) < self.config.late_fraction
        recent = torch.randint(states - max(1, states // 4), states, (size,), generator=generator)
        second = torch.where(late, torch.maximum(second, recent), second)
        from_start = torch.rand(size, generator=generator) < self.config.initial_fraction
        first = torch.where(from_start, 0, first)
        last = self.schedule.config["num_train_timesteps"] - 1
        timestep = torch.randint(last + 1, (size,), generator=generator)
        pure = torch.rand(size, generator=generator) < self.config.one_pass_fraction
        timestep = torch.where(pure, last, timestep)
        start, clean = self.weights[run, first], self.weights[run, second]
        noise = torch.randn(clean.shape, generator=generator)
        noised = self.schedule.add_noise(clean, noise, cast(torch.IntTensor, timestep))
        conditions = Conditions(self.loss[run, first], self.loss[run, second])
        return Batch(noised, start, clean, noise_level(self.schedule, timestep), conditions)
