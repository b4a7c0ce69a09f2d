"""Classification: labelled images or rows, in three splits.

Dimensions: N networks, P parameters, B images, D numbers per image (or C, H, W), K classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log, prod
from typing import Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mole.config import TaskConfig
from mole.errors import MoleError, check_choice
from mole.seeding import stream
from mole.tasks.batched import batched, singly
from mole.tasks.networks import Architecture
from mole.tasks.subtasks import Subtasks, draw
from mole.tasks.task import Comparison, Metrics, SplitName, Task, energy_score

AT_ONCE = 500
"""Images at once where networks are computed one after the other: what they become then stays in a cache."""


@dataclass(frozen=True)
class Split:
    """Images (M, ...) float32, as networks read them, and labels (M,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same images and labels on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def of_labels(self, labels: Sequence[int]) -> "Split":
        """The part with these labels."""
        chosen = torch.isin(self.labels, torch.tensor(labels, device=self.labels.device))
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Classification(Task):
    """Networks that learn to name the class of an image, by mini-batches and cross-entropy."""

    train: Split
    prompt: Split
    test: Split
    classes: int
    score = "accuracy"
    augmented: bool = False
    """Images are flipped and shifted at random while training (G.pt's CIFAR-10 recipe)."""
    chosen: Architecture | None = None
    """Networks of another architecture than the configuration's."""

    @property
    def architecture(self) -> Architecture:
        if self.chosen is not None:
            return self.chosen
        shape, config = self.train.images.shape[1:], self.config
        if len(shape) == 3:  # each further convolution has twice the channels
            widths = [shape[0], *(config.width * 2**layer for layer in range(config.depth)), self.classes]
            return Architecture(kind="convnet", widths=widths, activation=config.activation)
        widths = [prod(shape), *[config.width] * config.depth, self.classes]
        return Architecture(kind="mlp", widths=widths, activation=config.activation)

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def batch_size(self) -> int:
        """Images per step; fewer than asked for where there are not so many."""
        return min(self.config.batch_size, self.images_per_run)

    @property
    def images_per_run(self) -> int:
        """Training images that each run sees."""
        return max(1, round(self.config.data_fraction * len(self.train)))

    @property
    def numbers_per_step(self) -> int:
        return self.batch_size * self.numbers

    @property
    def numbers(self) -> int:
        return self.train.images[0].numel()

    @property
    def sizes(self) -> dict[str, int]:
        names: tuple[SplitName, ...] = ("train", "prompt", "test")
        return {f"{name}_images": len(self.split(name)) for name in names}

    @property
    def steps_per_epoch(self) -> int:
        return self.images_per_run // self.batch_size

    def to(self, device: torch.device) -> Self:
        train, prompt, test = (split.to(device) for split in (self.train, self.prompt, self.test))
        return replace(self, train=train, prompt=prompt, test=test)

    def with_config(self, config: TaskConfig) -> Self:
        """The same data with another recipe; another choice of labels needs the whole data.

        Raises:
            MoleError: a label is not one of the data's, or the data are already a part of them.
        """
        if config.labels == self.config.labels:
            return replace(self, config=config)
        if self.config.labels is not None:
            raise MoleError(f"only labels {self.config.labels} are left; start from the whole task")
        labels = config.labels or []
        unknown = [label for label in labels if not 0 <= label < self.classes]
        if unknown:
            raise MoleError(f"task.labels: {unknown} are not labels of {config.name}; legal is 0 to {self.classes - 1}")
        parts = (split.of_labels(labels) for split in (self.train, self.prompt, self.test))
        train, prompt, test = parts
        return replace(self, config=config, train=train, prompt=prompt, test=test)

    def with_architecture(self, architecture: Architecture) -> Self:
        own = replace(self, chosen=None).architecture
        ends, found = (own.widths[0], own.widths[-1]), (architecture.widths[0], architecture.widths[-1])
        if (architecture.kind, found) != (own.kind, ends):
            raise MoleError(
                f"architecture {architecture.kind} from {found[0]} to {found[1]} numbers; legal for {self.config.name} "
                f"is {own.kind} from {ends[0]} to {ends[1]}"
            )
        return replace(self, chosen=architecture)

    def compare(
        self, predicted: Tensor, true: Tensor, count: int, generator: torch.Generator, seeds: Sequence[int],
        again: Tensor | None = None,
    ) -> Comparison:  # fmt: skip
        index = torch.randint(len(self.train), (len(true), count), generator=generator).to(self.device)
        images = self.train.images.index_select(0, index.flatten()).unflatten(0, index.shape)  # (N, B, ...)
        labels = self.train.labels[index]  # (N, B)
        if self.config.subtasks.differ:  # as each run sees them; of labels that a run has never seen no image counts
            images, labels = self.shown(images, labels, seeds)
        there = (labels >= 0).float()
        there = there / there.sum(1, keepdim=True).clamp_min(1)
        with torch.no_grad():
            wanted = self.logits(true, images, own=True).log_softmax(-1)  # (N, B, K)
        found = self.logits(predicted, images, own=True).log_softmax(-1)  # (N, B, K)
        own = labels.clamp_min(0)[..., None]

        def loss(said: Tensor) -> Tensor:
            return -(said.gather(-1, own)[..., 0] * there).sum(1)  # (N,)

        if again is None:
            return Comparison((_kl(wanted, found) * there).sum(1).mean(), (loss(found) - loss(wanted)).abs().mean())
        other = self.logits(again, images, own=True).log_softmax(-1)
        divergence = energy_score(lambda one, two: _apart(one, two, there), found, other, wanted)
        gap = energy_score(lambda one, two: (loss(one) - loss(two)).abs(), found, other, wanted)
        return Comparison(divergence, gap)

    @cached_property
    def _judged(self) -> nn.Module:
        return batched(self.network).eval()

    def feed(self, seeds: Sequence[int]) -> "Minibatches":
        return Minibatches(self, seeds)

    def loss(self, state: dict[str, Tensor], *batch: Tensor) -> Tensor:
        """Mean cross-entropy of one network on images (B, ...) and labels (B,), in nats."""
        images, labels = batch
        return cross_entropy(functional_call(self.template, state, (images,)), labels).mean()

    def logits(self, flat: Tensor, images: Tensor, *, own: bool = False) -> Tensor:
        """Outputs (N, B, K) of networks (N, P) on the same images (B, ...), or each on its own (N, B, ...)."""
        network, spec = self._judged, self.spec  # built outside vmap, which refuses random numbers

        def forward(weights: Tensor, images: Tensor) -> Tensor:
            return functional_call(network, spec.unflatten(weights), (images,))

        if singly(network, flat.device):
            each = images if own else [images] * len(flat)
            found = [torch.cat([forward(weights, part) for part in seen.split(AT_ONCE)])
                     for weights, seen in zip(flat.unbind(), each, strict=True)]  # fmt: skip
            return torch.stack(found)
        with warnings.catch_warnings():  # vmap announces operators without a batching rule of their own
            warnings.simplefilter("ignore", UserWarning)
            return vmap(forward, in_dims=(0, 0 if own else None))(flat, images)

    def subtasks(self, seeds: Sequence[int]) -> Subtasks:
        """The sub-tasks of runs with these seeds."""
        found = draw(self.config.subtasks, seeds, classes=self.classes, numbers=self.numbers)
        return Subtasks(*(part.to(self.device) for part in found))

    def shown(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, D) or (N, B, D) and labels as the runs with these seeds see them: (N, B, D) and (N, B).

        The label is -1 where an image is not part of a run's sub-task.
        """
        subtasks = self.subtasks(seeds)
        return subtasks.images(images), subtasks.labels(labels)

    def support(self, seeds: Sequence[int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Labelled training images of each run's own sub-task, drawn with repetition: (N, count, D), (N, count)."""
        names = self.subtasks(seeds).names
        there = (names >= 0).cpu()[:, self.train.labels.cpu()]  # (N, M)
        index = torch.multinomial(there.float(), count, replacement=True, generator=generator).to(self.device)
        return self.shown(self.train.images[index], self.train.labels[index], seeds)

    def gradient(self, flat: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Gradients (N, P) of each network's mean cross-entropy on its own images (N, B, ...), labels (N, B)."""
        with torch.enable_grad():
            weights = flat.detach().requires_grad_()
            loss = cross_entropy(self.logits(weights, images, own=True), labels).mean(1).sum()
            return torch.autograd.grad(loss, weights)[0]

    @torch.no_grad()
    def measure(
        self, flat: Tensor, split: SplitName, seeds: Sequence[int] | None = None, *, numbers_at_once: int = 2**22
    ) -> Metrics:
        """`loss` (mean cross-entropy, nats) and `accuracy` (0..1), each (N,).

        Args:
            flat: (N, P).
            split: the images.
            seeds: of the runs whose sub-tasks are asked for, one per network; needed where there are sub-tasks.
            numbers_at_once: bound of the memory.

        Raises:
            MoleError: there are sub-tasks, and no seeds.
        """
        data, own = self.split(split), self.config.subtasks.differ
        if own and seeds is None:
            raise MoleError("every run has a sub-task of its own: measure(flat, split, seeds) needs the runs' seeds")
        images = data.images
        area = images[0, 0].numel() // 4 if images.ndim > 2 else 1  # after the stride of the first convolution
        widest = max(max(self.architecture.widths[1:]) * max(1, area), self.numbers if own else 0)
        losses, accuracies = [], []
        size = max(1, numbers_at_once // (len(data) * widest))
        for low in range(0, len(flat), size):
            part, labels = flat[low : low + size], data.labels[None]
            if own:
                assert seeds is not None
                images, labels = self.shown(data.images, data.labels, seeds[low : low + size])
            found = _metrics(self.logits(part, images, own=own), labels)
            losses.append(found["loss"])
            accuracies.append(found["accuracy"])
        return {"loss": torch.cat(losses), "accuracy": torch.cat(accuracies)}

    @torch.no_grad()
    def losses(self, flat: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) of networks (N, P) on the same images (B, ...) with labels (B,)."""
        return _metrics(self.logits(flat, images), labels[None])["loss"]

    @torch.no_grad()
    def judge(self, flat: Tensor, images: Tensor, labels: Tensor) -> Metrics:
        """The metrics of networks (N, P), each on its own images (N, B, ...) with labels (N, B)."""
        return _metrics(self.logits(flat, images, own=True), labels)

    def split(self, name: SplitName) -> Split:
        """One of the three splits.

        Raises:
            ChoiceError: there is no such split.
        """
        check_choice("split", name, get_args(SplitName))
        return {"train": self.train, "prompt": self.prompt, "test": self.test}[name]


def labelled(task: Task) -> Classification:
    """The task, if it has labelled examples.

    Raises:
        MoleError: it has none.
    """
    if not isinstance(task, Classification):
        raise MoleError(f"{task.config.name} has no labelled examples; legal is a task that classifies")
    return task


def _kl(true: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence (N, B) between log-probabilities (N, B, K), in nats."""
    return F.kl_div(found, true, log_target=True, reduction="none").sum(-1)


def _apart(one: Tensor, other: Tensor, there: Tensor) -> Tensor:
    """Distance (N,) between what networks say, log-probabilities (N, B, K), of images with weights (N, B): the root of
    the mean Jensen-Shannon divergence, a metric that embeds into a Hilbert space, as energy scores need it (Endres &
    Schindelin 2003; Fuglede & Topsoe 2004)."""
    middle = torch.logaddexp(one, other) - log(2)
    return ((_kl(one, middle) + _kl(other, middle)) / 2 * there).sum(1).clamp_min(1e-8).sqrt()


def _metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Of logits (N, B, K) and labels (N or 1, B); images of label -1 do not count."""
    there = (labels >= 0).float()
    there = there / there.sum(1, keepdim=True)
    labels = labels.clamp_min(0).expand(len(logits), -1)
    loss = (cross_entropy(logits, labels) * there).sum(1)
    return {"loss": loss, "accuracy": ((logits.argmax(-1) == labels) * there).sum(1)}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (..., B) of logits (..., B, K): as PyTorch's, and twice as fast under `vmap` on a CPU."""
    return logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]


class Minibatches:
    """Each run's own shuffles of its own part of the training images, epoch by epoch; the rest of an epoch is dropped.

    The returned images stand in a buffer that the next step overwrites: fresh memory for every batch would
    cost more than the computation.
    """

    def __init__(self, task: Classification, seeds: Sequence[int]) -> None:
        self.task, self.device = task, task.device
        self.orders = [DataOrder(task, seed) for seed in seeds]
        self.subtasks = task.subtasks(seeds) if task.config.subtasks.differ else None
        self.buffer = torch.empty(0, *task.train.images.shape[1:], device=self.device)

    def keep(self, runs: Tensor) -> None:
        self.orders = [self.orders[run] for run in runs.tolist()]
        if self.subtasks is not None:
            self.subtasks = Subtasks(*(part[runs.to(self.device)] for part in self.subtasks))
        self.epoch = self.epoch[:, runs]

    def batch(self, step: int, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        at = step % self.task.steps_per_epoch
        if at == 0:
            self.epoch = torch.stack([order.epoch() for order in self.orders], 1).to(self.device)  # (steps, N, B)
        runs, size = self.epoch[at].shape
        index, data = self.epoch[at].flatten(), self.task.train
        if len(self.buffer) != len(index):
            self.buffer = self.buffer.new_empty(len(index), *self.buffer.shape[1:])
        images = torch.index_select(data.images, 0, index, out=self.buffer).unflatten(0, (runs, size))
        labels = data.labels.index_select(0, index).unflatten(0, (runs, size))
        if self.task.augmented:
            images = torch.stack([order.augment(part) for order, part in zip(self.orders, images, strict=True)])
        if self.subtasks is not None:
            images, labels = self.subtasks.images(images), self.subtasks.labels(labels)
        return images, labels


class DataOrder:
    """The order in which one run sees its images, from its seed alone."""

    def __init__(self, task: Classification, seed: int) -> None:
        self.steps, self.batch_size = task.steps_per_epoch, task.batch_size
        self.generator = stream("data order", seed)
        self.pool: Tensor | None = None
        if task.images_per_run < len(task.train):
            chooser = stream("data subset", seed)
            self.pool = torch.randperm(len(task.train), generator=chooser)[: task.images_per_run]
        self.images = task.images_per_run
        self.repeating = task.config.subtasks.labels is not None
        if self.repeating:  # as many images as the run has labels for: drawn with repetition
            there = task.subtasks([seed]).names[0] >= 0
            self.pool = there.cpu()[task.train.labels.cpu()].nonzero()[:, 0]

    def epoch(self) -> Tensor:
        """Indices (steps, B) of one epoch: a new shuffle of the run's images."""
        if self.repeating:
            assert self.pool is not None
            index = torch.randint(len(self.pool), (self.steps, self.batch_size), generator=self.generator)
            return self.pool[index]
        order = torch.randperm(self.images, generator=self.generator)[: self.steps * self.batch_size]
        order = order if self.pool is None else self.pool[order]
        return order.reshape(self.steps, self.batch_size)

    def augment(self, images: Tensor, pad: int = 4) -> Tensor:
        """Images (B, C, H, W) mirrored with probability 1/2 and shifted by -4 to 3 pixels, zeros coming in.

        Source: the released code of Peebles et al. 2022, whose crops exclude the last offset.
        """
        size, channels, height, width = images.shape
        flip = torch.rand(size, generator=self.generator) < 0.5
        down, right = torch.randint(0, 2 * pad, (2, size, 1), generator=self.generator)
        broad = width + 2 * pad
        rows, columns = down + torch.arange(height), right + torch.arange(width)  # (B, H), (B, W)
        columns = torch.where(flip[:, None], broad - 1 - columns, columns)
        places = (rows[:, :, None] * broad + columns[:, None, :]).flatten(1).to(images.device)  # (B, H * W)
        padded = F.pad(images, [pad] * 4).flatten(2)
        return padded.gather(2, places[:, None].expand(-1, channels, -1)).unflatten(2, (height, width))
