"""Training pairs: a start and a later state of the same run, noised, with what is known of both.

Dimensions: P parameters, B pairs, n checkpoints.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mole.checkpoints import Zoo
from mole.checkpoints.layouts import variants
from mole.checkpoints.recipes import CODES, RECIPE, coded, subject
from mole.checkpoints.stream import Reservoir
from mole.config import GeneratorConfig, TrainConfig
from mole.diffusion.codec import Codec
from mole.diffusion.conditions import Conditions
from mole.diffusion.process import noise_level, noise_schedule
from mole.files import value_digest
from mole.representations import WeightSpec
from mole.representations.handling import Augmentation, Canonical, Elements
from mole.seeding import stream
from mole.tasks import Task, labelled


class Pairs(NamedTuple):
    """Starts and later states of the same runs, as they are: weights (B, P)."""

    start: Tensor
    clean: Tensor
    known: dict[str, Tensor]
    """Condition to what is known of it, (B,)."""
    seeds: list[int]
    """Of the runs."""


class Batch(NamedTuple):
    """Pairs of one layout for one step; weights are normalised, (B, P)."""

    layout: int
    """Which one of the source's."""
    noised: Tensor
    start: Tensor
    clean: Tensor
    level: Tensor
    conditions: Conditions
    seeds: list[int]
    again: Tensor | None = None
    """(B, P): other pure noise, where the part is of pure noise; for `energy`."""
    earlier: tuple[Tensor, Tensor] | None = None
    """(B, P) and levels (B,): under the same noise at a lower level, or without noise; for `consistency`."""

    def rows(self, chosen: Tensor) -> "Batch":
        """The part of it where a mask (B,) says so; not for `consistency`."""
        seeds = [seed for seed, kept in zip(self.seeds, chosen.tolist(), strict=True) if kept]
        noised, start, clean, level = (each[chosen] for each in (self.noised, self.start, self.clean, self.level))
        return Batch(self.layout, noised, start, clean, level, self.conditions.part(chosen), seeds)


class PairSource(Protocol):
    """Where pairs come from: a zoo, or populations that are still training."""

    tasks: list[Task]
    """Of every layout, the whole task with networks of that layout; the first is the configuration's own, if it is
    there."""

    @property
    def digest(self) -> str:
        """Identity of what has been read so far."""
        ...

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of every metric so far."""
        ...

    def chunks(self, layout: int) -> Iterable[Tensor]:
        """Weights of a layout in parts (n, P), for their scale."""
        ...

    def spec(self, layout: int) -> WeightSpec | None:
        """What the weights of a layout mean, as their source says; None where they come from the task itself."""
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

    def pairs(self, config: TrainConfig, generator: torch.Generator) -> list[tuple[int, Pairs]]:
        """As many pairs as a batch has, drawn with this generator, by layout."""
        ...


@dataclass(frozen=True)
class ZooPart:
    """The networks of one layout in a zoo."""

    zoo: Zoo
    task: Task
    names: Sequence[str]
    """Conditions of the generator."""

    @cached_property
    def counts(self) -> Tensor:
        """Checkpoints per run."""
        return self.zoo.bounds.diff()

    @cached_property
    def seeds(self) -> np.ndarray:
        return self.zoo.column("seed") if "seed" in self.zoo.columns else np.zeros(len(self.zoo), np.int64)

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Columns of the index that conditions need: (n,)."""
        bare = {subject(name) for name in self.names}
        found: dict[str, Tensor] = {"steps": torch.from_numpy(self.zoo.column("step").astype(np.float32))}
        for name in bare - {"steps"}:
            if name in self.zoo.columns:
                column = self.zoo.column(name)
                codes = [coded(name, value) for value in column] if name in CODES else column.astype(np.float32)
                found[name] = torch.as_tensor(codes, dtype=torch.float32)
            elif hasattr(self.task.config, name):
                found[name] = torch.tensor(coded(name, getattr(self.task.config, name))).expand(len(self.zoo))
        return found

    def known(self, start: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """What conditions say of pairs of checkpoints (B,)."""
        return known_of(self.names, {k: v[start] for k, v in self.values.items()},
                        {k: v[clean] for k, v in self.values.items()})  # fmt: skip


def known_of(names: Sequence[str], start: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Conditions by their names, from what is known of starts and of later states."""
    found = {}
    for name in names:
        bare = subject(name)
        if name == "steps":
            found[name] = clean["steps"] - start["steps"]
        elif bare in clean:
            found[name] = (start if name.startswith("start_") else clean)[bare]
    return found


def _metrics(conditions: Sequence[str]) -> list[str]:
    """The metrics that conditions are about, and the loss."""
    return sorted({subject(name) for name in conditions if name != subject(name)} | {"loss"})


class ZooPairs:
    """Pairs from a zoo; its weights stay where they are."""

    def __init__(self, zoo: Zoo, task: Task, config: GeneratorConfig) -> None:
        self.zoo, self.digest = zoo, zoo.digest
        self.parts = [ZooPart(part, variant, config.conditions) for part, variant in variants(zoo, task)]
        self.tasks = [part.task for part in self.parts]
        self.runs = torch.tensor([float(part.zoo.runs) for part in self.parts])
        self.elements: Elements | None = None
        values = {name: zoo.loss if name == zoo.metric else torch.from_numpy(zoo.column(name))
                  for name in _metrics(config.conditions) if name == zoo.metric or name in zoo.columns}  # fmt: skip
        self.ranges = {name: (float(found.min()), float(found.max())) for name, found in values.items()}

    def spec(self, layout: int) -> WeightSpec | None:
        return self.parts[layout].zoo.spec

    def chunks(self, layout: int) -> Iterable[Tensor]:
        part = self.parts[layout]
        low, runs = 0, torch.repeat_interleave(part.counts)
        for weights in part.zoo.chunks():
            yield self._acted(weights, runs[low : low + len(weights)])
            low += len(weights)

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

    def pairs(self, config: TrainConfig, generator: torch.Generator) -> list[tuple[int, Pairs]]:
        count = min(config.layouts, len(self.parts), config.batch_size)
        chosen = [0] if len(self.parts) == 1 else torch.multinomial(self.runs, count, generator=generator).tolist()
        whole, rest = divmod(config.batch_size, count)
        return [(which, self._pairs(self.parts[which], whole + (number < rest), config, generator))
                for number, which in enumerate(chosen)]  # fmt: skip

    def _pairs(self, part: ZooPart, size: int, config: TrainConfig, generator: torch.Generator) -> Pairs:
        run = torch.randint(len(part.counts), (size,), generator=generator)
        first, second = choose_states(part.counts[run], config, generator)
        start, clean = part.zoo.bounds[run] + first, part.zoo.bounds[run] + second
        weights = self._acted(part.zoo.read(torch.cat([start, clean])), run.repeat(2))
        seeds = part.seeds[start.numpy()].tolist()
        return Pairs(weights[:size], weights[size:], part.known(start, clean), seeds)


class StreamPairs:
    """Pairs from populations in transit; which ones depends on how fast they train."""

    def __init__(self, reservoir: Reservoir, task: Task, config: GeneratorConfig) -> None:
        self.reservoir, self.tasks, self.names = reservoir, [task], config.conditions

    @property
    def digest(self) -> str:
        return value_digest(self.reservoir.flow.digests)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        found = self.reservoir.flow.ranges
        return {name: found[name] for name in _metrics(self.names) if name in found}

    def spec(self, layout: int) -> WeightSpec | None:
        return None

    def chunks(self, layout: int) -> Iterable[Tensor]:
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

    def pairs(self, config: TrainConfig, generator: torch.Generator) -> list[tuple[int, Pairs]]:
        weights: list[tuple[Tensor, Tensor]] = []
        starts, cleans, seeds = list[dict[str, float]](), list[dict[str, float]](), list[int]()
        while len(weights) < config.batch_size:
            runs = self.reservoir.choose(generator, config.batch_size - len(weights))
            states = choose_states(torch.tensor([len(run.uses) for run in runs]), config, generator)
            for run, first, second in zip(runs, *(part.tolist() for part in states), strict=True):
                if self.reservoir.use(run, first, second):
                    weights.append((run.weights[first], run.weights[second]))
                    starts.append({name: float(values[first]) for name, values in run.values.items()})
                    cleans.append({name: float(values[second]) for name, values in run.values.items()})
                    seeds.append(run.seed)
        start, clean = ({name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
                        for rows in (starts, cleans))  # fmt: skip
        for name in RECIPE:
            if name not in start:
                value = torch.tensor(coded(name, getattr(self.tasks[0].config, name))).expand(len(weights))
                start, clean = {**start, name: value}, {**clean, name: value}
        first, second = (torch.stack(part) for part in zip(*weights, strict=True))
        return [(0, Pairs(first, second, known_of(self.names, start, clean), seeds))]


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


class PairBatches(IterableDataset[list[Batch]]):
    """The batches of a training, from `first_step` to its end: one part per layout of networks.

    From a zoo, a batch depends on the seed and its step alone, so a resumed training sees what it would have seen.
    """

    def __init__(
        self, source: PairSource, codecs: Sequence[Codec], config: TrainConfig, *, seed: int, first_step: int = 0
    ) -> None:
        super().__init__()
        self.source, self.codecs = source, codecs
        augmented = codecs[0].config.symmetry == "augment"
        self.augmentations = [Augmentation(codec.spec, seed=seed) for codec in codecs] if augmented else None
        self.rank, world = (int(os.environ.get(name, other)) for name, other in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.config = config.model_copy(update={"batch_size": max(1, config.batch_size // world)})
        self.seed, self.first_step = seed, first_step
        self.schedule = noise_schedule(codecs[0].config.process)

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in range(self.first_step, self.config.steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[Batch]:
        """The pairs of one step; noise levels are uniform, and a share is pure noise.

        Where several processes train together, each draws its own part.
        """
        generator = stream("pairs", self.seed, step, self.rank)
        parts = [self._noised(*part, step, generator) for part in self.source.pairs(self.config, generator)]
        if self.config.objective != "energy":
            return parts
        return [one for part in parts for one in self._drawn(part, generator)]

    def _drawn(self, part: Batch, generator: torch.Generator) -> list[Batch]:
        """A part in two: what is pure noise is drawn twice; the rest is denoised, noise alone does not decide it."""
        pure = part.level == 1
        drawn, rest = part.rows(pure), part.rows(~pure)
        again = torch.randn(drawn.noised.shape, generator=generator)
        return [one for one in (drawn._replace(again=again), rest) if len(one.level)]

    def _noised(self, layout: int, pairs: Pairs, step: int, generator: torch.Generator) -> Batch:
        config, codec, size = self.config, self.codecs[layout], len(pairs.start)
        last = self.schedule.config["num_train_timesteps"] - 1
        timestep = torch.randint(last + 1, (size,), generator=generator)
        pure = torch.rand(size, generator=generator) < config.one_pass_fraction
        timestep = torch.where(pure, last, timestep)
        plain = pairs.start, pairs.clean
        if self.augmentations is not None:
            elements = self.augmentations[layout].draw(size, generator)  # the same for a start and its target
            plain = elements.act(pairs.start), elements.act(pairs.clean)
        conditions = self._conditions(layout, plain[0], pairs, generator)
        with torch.no_grad():
            device = codec.scale.device  # noise is drawn on the CPU, wherever the codec lies
            start, clean = (codec.normalise(weights.to(device)).cpu() for weights in plain)
        start = start * conditions.started[:, None]
        noise = torch.randn(clean.shape, generator=generator)
        noised = self.schedule.add_noise(clean, noise, cast(torch.IntTensor, timestep))
        level = noise_level(self.schedule, timestep)
        earlier = None
        if config.objective == "consistency":
            before = timestep - max(1, round(self._gap(step) * (last + 1)))
            there, lower = before >= 0, cast(torch.IntTensor, before.clamp_min(0))
            less = torch.where(there[:, None], self.schedule.add_noise(clean, noise, lower), clean)
            earlier = less, torch.where(there, noise_level(self.schedule, lower), 0.0)
        return Batch(layout, noised, start, clean, level, conditions, pairs.seeds, earlier=earlier)

    def _gap(self, step: int) -> float:
        """Distance between two levels of a chain of consistent predictions: it halves from 1/2 to 1/32 (Song &
        Dhariwal 2023)."""
        return 2.0 ** -(1 + int(5 * step / self.config.steps))

    def _conditions(self, layout: int, start: Tensor, pairs: Pairs, generator: torch.Generator) -> Conditions:
        """What is known of the pairs, with parts of it left out at random."""
        config, codec, task = self.config, self.codecs[layout], self.source.tasks[layout]
        names, size = codec.config.conditions, len(start)
        found = Conditions.of(names, size, pairs.known)
        if codec.config.data:
            support = labelled(task).support(pairs.seeds, config.support_images, generator)
            found = with_data(found, codec, task, start, *support)
        forgotten = torch.rand(size, len(names), generator=generator) < config.drop_fraction
        unstarted = torch.rand(size, generator=generator) < config.drop_start_fraction
        forgotten |= unstarted[:, None] & torch.tensor([name.startswith("start_") for name in names])
        untold = torch.rand(size, generator=generator) < config.drop_fraction
        return found.without(forgotten, started=unstarted, data=untold)


def with_data(
    conditions: Conditions, codec: Codec, task: Task, start: Tensor, images: Tensor, labels: Tensor
) -> Conditions:
    """Conditions with support sets (B, K, M), (B, K), and the gradients of the starts (B, P) on them."""
    gradient = labelled(task).gradient(start.to(images.device), images, labels).cpu() * codec.scale.cpu()
    size = gradient.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    return replace(conditions, images=images.cpu(), labels=labels.cpu(), gradient=gradient / size)
