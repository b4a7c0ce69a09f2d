"""Training pairs: a start and a later state of the same run, noised.

Dimensions: P parameters, B pairs.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mole.checkpoints import Zoo
from mole.checkpoints.stream import Reservoir
from mole.config import TrainConfig
from mole.diffusion.codec import Codec
from mole.diffusion.conditions import Conditions
from mole.diffusion.process import noise_level, noise_schedule
from mole.files import value_digest
from mole.representations import WeightSpec
from mole.representations.handling import Augmentation, Canonical, Elements


class Batch(NamedTuple):
    """Pairs for one step; weights are normalised, (B, P)."""

    noised: Tensor
    start: Tensor
    clean: Tensor
    level: Tensor
    conditions: Conditions


class Pairs(NamedTuple):
    """Starts and later states of the same runs; weights (B, P) as they are, losses (B,)."""

    start: Tensor
    clean: Tensor
    start_loss: Tensor
    target_loss: Tensor


class PairSource(Protocol):
    """Where pairs come from: a zoo, or populations that are still training."""

    @property
    def spec(self) -> WeightSpec:
        """Layout of the networks."""
        ...

    @property
    def digest(self) -> str:
        """Identity of what has been read so far."""
        ...

    @property
    def losses(self) -> tuple[float, float]:
        """Lowest and highest loss so far."""
        ...

    def chunks(self) -> Iterable[Tensor]:
        """Weights in parts (n, P), for their scale."""
        ...

    def best(self) -> Tensor:
        """The weights (P,) of the lowest loss so far."""
        ...

    def canonicalise(self, canonical: Canonical) -> None:
        """From now on bring every run into canonical form: its last state decides, and all of it follows."""
        ...

    def note(self) -> str:
        """What a person would like to watch; may be empty."""
        ...

    def state(self) -> dict[str, Any]:
        """Where a training that is resumed goes on: plain values."""
        ...

    def pairs(self, config: TrainConfig, generator: torch.Generator) -> Pairs:
        """As many pairs as a batch has, drawn with this generator."""
        ...


class ZooPairs:
    """Pairs from a zoo; its weights stay where they are."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo, self.spec, self.digest = zoo, zoo.spec, zoo.digest
        self.counts = zoo.bounds.diff()
        self.losses = (float(zoo.loss.min()), float(zoo.loss.max()))
        self.elements: Elements | None = None

    def chunks(self) -> Iterable[Tensor]:
        low, runs = 0, torch.repeat_interleave(self.counts)
        for part in self.zoo.chunks():
            yield self._acted(part, runs[low : low + len(part)])
            low += len(part)

    def _acted(self, weights: Tensor, runs: Tensor) -> Tensor:
        return weights if self.elements is None else self.elements[runs].act(weights)

    def best(self) -> Tensor:
        return self.zoo.read(self.zoo.loss.argmin()[None])[0]

    def canonicalise(self, canonical: Canonical) -> None:
        self.elements = canonical.elements(self.zoo.read(self.zoo.last))

    def note(self) -> str:
        return ""

    def state(self) -> dict[str, Any]:
        return {}

    def pairs(self, config: TrainConfig, generator: torch.Generator) -> Pairs:
        run = torch.randint(len(self.counts), (config.batch_size,), generator=generator)
        first, second = choose_states(self.counts[run], config, generator)
        start, clean = self.zoo.bounds[run] + first, self.zoo.bounds[run] + second
        weights = self._acted(self.zoo.read(torch.cat([start, clean])), run.repeat(2))
        return Pairs(weights[: len(run)], weights[len(run) :], self.zoo.loss[start], self.zoo.loss[clean])


class StreamPairs:
    """Pairs from populations in transit; which ones depends on how fast they train."""

    def __init__(self, reservoir: Reservoir) -> None:
        self.reservoir, self.spec = reservoir, reservoir.task.spec

    @property
    def digest(self) -> str:
        return value_digest(self.reservoir.flow.digests)

    @property
    def losses(self) -> tuple[float, float]:
        return self.reservoir.flow.low, self.reservoir.flow.high

    def chunks(self) -> Iterable[Tensor]:
        return [run.weights for run in self.reservoir.runs]

    def best(self) -> Tensor:
        losses = [run.loss[-1] for run in self.reservoir.runs]
        return self.reservoir.runs[int(torch.stack(losses).argmin())].weights[-1]

    def canonicalise(self, canonical: Canonical) -> None:
        self.reservoir.prepare(lambda weights: canonical.elements(weights[-1:]).act_on_all(weights))

    def note(self) -> str:
        return self.reservoir.flow.note()

    def state(self) -> dict[str, Any]:
        return self.reservoir.state()

    def pairs(self, config: TrainConfig, generator: torch.Generator) -> Pairs:
        rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        while len(rows) < config.batch_size:
            runs = self.reservoir.choose(generator, config.batch_size - len(rows))
            states = choose_states(torch.tensor([len(run.uses) for run in runs]), config, generator)
            for run, first, second in zip(runs, *(part.tolist() for part in states), strict=True):
                if self.reservoir.use(run, first, second):
                    rows.append((run.weights[first], run.weights[second], run.loss[first], run.loss[second]))
        return Pairs(*(torch.stack(part) for part in zip(*rows, strict=True)))


def choose_states(counts: Tensor, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which two states of a run of `counts` (B,) states: the first is not later than the second.

    They are drawn uniformly and put in order of time; a share aims at the last quarter of the kept
    states, a share starts from the initialisation.
    """
    size = len(counts)
    first, second = (torch.rand(2, size, generator=generator) * counts).long().sort(0).values
    late = torch.rand(size, generator=generator) < config.late_fraction
    quarter = (counts // 4).clamp_min(1)
    recent = counts - quarter + (torch.rand(size, generator=generator) * quarter).long()
    second = torch.where(late, torch.maximum(second, recent), second)
    from_start = torch.rand(size, generator=generator) < config.initial_fraction
    return torch.where(from_start, 0, first), second


class PairBatches(IterableDataset[Batch]):
    """The batches of a training, from `first_step` to its end.

    From a zoo, a batch depends on the seed and its step alone, so a resumed training sees what it would have seen.
    """

    def __init__(
        self, source: PairSource, codec: Codec, config: TrainConfig, *, seed: int, first_step: int = 0
    ) -> None:
        super().__init__()
        self.source, self.codec = source, codec
        augmented = codec.config.symmetry == "augment"
        self.augmentation = Augmentation(codec.spec, seed=seed) if augmented else None
        self.config, self.seed, self.first_step = config, seed, first_step
        self.schedule = noise_schedule()

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first_step, self.config.steps):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """The pairs of one step; noise levels are uniform, and a share is pure noise."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        size = self.config.batch_size
        pairs = self.source.pairs(self.config, generator)
        last = self.schedule.config["num_train_timesteps"] - 1
        timestep = torch.randint(last + 1, (size,), generator=generator)
        pure = torch.rand(size, generator=generator) < self.config.one_pass_fraction
        timestep = torch.where(pure, last, timestep)
        plain = pairs.start, pairs.clean
        if self.augmentation is not None:
            elements = self.augmentation.draw(size, generator)  # the same for a start and its target
            plain = elements.act(pairs.start), elements.act(pairs.clean)
        with torch.no_grad():
            device = self.codec.scale.device  # noise is drawn on the CPU, wherever the codec lies
            start, clean = (self.codec.normalise(weights.to(device)).cpu() for weights in plain)
        noise = torch.randn(clean.shape, generator=generator)
        noised = self.schedule.add_noise(clean, noise, cast(torch.IntTensor, timestep))
        conditions = Conditions(pairs.start_loss, pairs.target_loss)
        return Batch(noised, start, clean, noise_level(self.schedule, timestep), conditions)
