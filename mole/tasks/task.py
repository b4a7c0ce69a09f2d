"""A task: data, the network that learns them, the recipe, and its metrics.

Dimensions: N networks, P parameters, B images of a batch, D numbers per image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from mole.config import TaskConfig
from mole.representations import WeightSpec
from mole.tasks.batched import batched
from mole.tasks.networks import Architecture

T = TypeVar("T")

SplitName = Literal["train", "prompt", "test"]

Metrics = dict[str, Tensor]
"""Name to values (N,). Every task has `loss`, which is smaller for better networks."""


class Comparison(NamedTuple):
    """How far networks compute other things than others; scalars, 0 between a network and itself up to rounding."""

    divergence: Tensor
    """Mean Kullback-Leibler divergence, in nats, from what the true networks say to what the predicted ones say, and
    whatever a task adds; or of two draws the energy score, a proper scoring rule of distributions (Gneiting & Raftery
    2007)."""
    gap: Tensor
    """Mean distance of the predicted networks' losses from the true ones', each pair on the same inputs, or of two
    draws its energy score; 0 where inputs alone say nothing of the loss."""


def energy_score(distance: Callable[[T, T], Tensor], one: T, other: T, true: T) -> Tensor:
    """Energy score of two draws for what came true: a proper scoring rule, least where draws are distributed as what
    comes true (Gneiting & Raftery 2007; De Bortoli et al. 2025).

    `distance` gives (N,); it must be a metric that embeds into a Hilbert space.
    """
    return (distance(one, true) + distance(other, true) - distance(one, other)).mean() / 2


class Feed(Protocol):
    """The experience that a population learns from, each run its own."""

    def batch(self, step: int, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What optimiser step `step` learns from: tensors (N, B, ...), asked for in order of steps.

        Args:
            step: counted from 0.
            state: the learners' present state, each tensor (N, *shape).
        """
        ...

    def keep(self, runs: Tensor) -> None:
        """Go on with these runs only: indices (n,) into the present ones."""
        ...


@dataclass(frozen=True)
class Task(ABC):
    """Data and recipe of one experiment.

    Harvested networks learn from the split `train`; prompts and every choice read `prompt`; results
    read `test`. The three share nothing. A task of a new kind fills in the abstract methods; what any
    task must hold is in `tests/tasks/conformance.py`.
    """

    config: TaskConfig

    score: ClassVar[str]
    """The metric that people read; larger is better."""

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """The network family."""

    @abstractmethod
    def feed(self, seeds: Sequence[int]) -> Feed:
        """Experience of the runs with these seeds; a run's depends on its own seed alone."""

    @abstractmethod
    def loss(self, state: dict[str, Tensor], *batch: Tensor) -> Tensor:
        """Training loss of one learner on its part of a batch; differentiable, and fit for `vmap`."""

    @abstractmethod
    def measure(self, flat: Tensor, split: SplitName, seeds: Sequence[int] | None = None) -> Metrics:
        """Metrics of networks (N, P) on a split, in slices of bounded memory; no gradients.

        `seeds` are those of the runs (N,), where each run has a sub-task of its own.
        """

    @abstractmethod
    def compare(
        self, predicted: Tensor, true: Tensor, count: int, generator: torch.Generator, seeds: Sequence[int],
        again: Tensor | None = None,
    ) -> Comparison:  # fmt: skip
        """How far networks (N, P) compute other things than `true` ones (N, P), differentiable.

        They are given `count` inputs of the training split, or as a task makes them; `seeds` are those of the runs
        (N,), where each has a sub-task of its own. With `again` (N, P), a second draw from where the first was drawn,
        both numbers are energy scores.
        """

    @abstractmethod
    def with_architecture(self, architecture: Architecture) -> Self:
        """The same data with other networks.

        Raises:
            MoleError: they read or tell other numbers than the data have.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same task with its data on another device."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its data lie, and where its networks train."""

    @property
    @abstractmethod
    def numbers_per_step(self) -> int:
        """Numbers that one run reads in one step, B * D: how many runs fit into a cache is computed from it."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """How much each split holds, for the report."""

    @property
    def numbers(self) -> int:
        """Numbers per labelled example of the data, D; 0 where there are none."""
        return 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps between two changes of the `epoch_cosine` learning rate."""
        return 1

    def with_config(self, config: TaskConfig) -> Self:
        """The same data with another recipe."""
        return replace(self, config=config)

    def learner(self, seed: int) -> nn.Module:
        """What is trained: the network, and whatever learns beside it and is not kept."""
        return self.architecture.build(seed)

    @cached_property
    def template(self) -> nn.Module:
        """A learner for its structure, in the form that is fast under `vmap`; to be had before entering `vmap`."""
        return batched(self.learner(seed=0))

    prefix = ""
    """Before the names of the kept network within the learner's state."""

    @cached_property
    def network(self) -> nn.Module:
        """One network of the family, for its structure; its weights mean nothing."""
        return self.architecture.build(seed=0)

    @cached_property
    def spec(self) -> WeightSpec:
        return WeightSpec.of(self.network)

    def initial(self, seeds: Sequence[int]) -> Tensor:
        """Weights (N, P) of freshly initialised networks, one per seed."""
        return torch.stack([self.spec.flatten(self.architecture.build(seed).state_dict()) for seed in seeds])
