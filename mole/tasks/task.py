"""A task: data in three splits, the network that learns them, the recipe, and its metrics.

Dimensions: N networks, P parameters, B images, D numbers per image, C classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mole.config import TaskConfig
from mole.representations import WeightSpec


@dataclass(frozen=True)
class Split:
    """Images (B, D) float32 and labels (B,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same images and labels on another device."""
        return Split(self.images.to(device), self.labels.to(device))


class Metrics(NamedTuple):
    """Mean cross-entropy in nats and accuracy in 0..1, each (N,)."""

    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Task:
    """Data and recipe of one experiment; `train`, `prompt` and `test` share no image.

    Harvested networks learn from `train`; prompts and every choice read `prompt`; results read `test`.
    """

    config: TaskConfig
    train: Split
    prompt: Split
    test: Split
    classes: int

    @property
    def features(self) -> int:
        """Numbers per image, D."""
        return self.train.images.shape[1]

    @property
    def layers(self) -> list[int]:
        """Widths from input to output."""
        return [self.features, self.config.hidden, self.classes]

    @cached_property
    def network(self) -> nn.Module:
        """One network of the family, for its structure; its weights mean nothing."""
        return build_network(self.layers, seed=0)

    @cached_property
    def spec(self) -> WeightSpec:
        return WeightSpec.of(self.network)

    def initial(self, seeds: Sequence[int]) -> Tensor:
        """Weights (N, P) of freshly initialised networks, one per seed."""
        states = [build_network(self.layers, seed).state_dict() for seed in seeds]
        return torch.stack([self.spec.flatten(state) for state in states])

    def to(self, device: torch.device) -> "Task":
        """The same task with its data on another device."""
        train, prompt, test = (s.to(device) for s in (self.train, self.prompt, self.test))
        return replace(self, train=train, prompt=prompt, test=test)

    def loss(self, state: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of one network; differentiable, and fit for `vmap`."""
        return F.cross_entropy(functional_call(self.network, state, (images,)), labels)

    def logits(self, flat: Tensor, images: Tensor) -> Tensor:
        """Outputs (N, B, C) of networks (N, P) on the same images (B, D); differentiable."""
        network, spec = self.network, self.spec  # built outside vmap, which refuses random numbers
        forward = vmap(lambda weights: functional_call(network, spec.unflatten(weights), (images,)))
        with warnings.catch_warnings():  # vmap announces operators without a batching rule of their own
            warnings.simplefilter("ignore", UserWarning)
            return forward(flat)

    @torch.no_grad()
    def measure(self, flat: Tensor, split: Split, *, numbers_at_once: int = 2**22) -> Metrics:
        """Loss and accuracy of networks (N, P) on a split, in slices of bounded memory."""
        slice_size = max(1, numbers_at_once // (len(split) * max(self.config.hidden, self.classes)))
        losses, accuracies = [], []
        for part in flat.split(slice_size):
            logits = self.logits(part, split.images)  # (n, B, C)
            labels = split.labels.expand(len(part), -1)
            losses.append(F.cross_entropy(logits.mT, labels, reduction="none").mean(1))
            accuracies.append((logits.argmax(-1) == labels).float().mean(1))
        return Metrics(torch.cat(losses), torch.cat(accuracies))


def build_network(layers: Sequence[int], seed: int) -> nn.Module:
    """A ReLU network of the given widths in PyTorch's default initialisation.

    The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(layers):
            parts += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*parts[:-1])
