"""Many small networks trained as one batched computation, each on its own data.

Dimensions: N networks, n of them still training, K kept states, P parameters, B images per step.
"""

import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from mole.checkpoints.schedules import AtSteps, Schedule
from mole.config import TaskConfig
from mole.errors import MoleError, VectorisationWarning, check_choice
from mole.seeding import derived
from mole.tasks import Task
from mole.tasks.batched import advance_keys, dropout_keys, own_state, singly

logger = logging.getLogger("mole")

Progress = Callable[[int], None]
"""Told the network-steps done so far: networks times optimiser steps."""

CACHED_NUMBERS = 3_500_000
"""Numbers of one step's batches that stay in a CPU's last cache; more runs at once are slower, not faster."""

CHECK_EVERY = 25
"""Steps between two looks for runs that have diverged."""


@dataclass(frozen=True)
class History:
    """Kept states of a population, in order of run and step; rows that are not finite are left out."""

    runs: Tensor
    """(rows,), which network of the population."""
    steps: Tensor
    """(rows,), optimiser steps it has taken."""
    weights: Tensor
    """(rows, P) float32, on the CPU."""
    table: Tensor
    """(rows, Q) int64, the whole numbers of each state."""
    diverged: Tensor
    """(N,) bool: the run's loss or weights became NaN or infinite; its rows end before that."""

    @cached_property
    def regular(self) -> Tensor:
        """Weights (N, K, P) of a population in which every run keeps the same steps and none diverged."""
        return self.weights.unflatten(0, (len(self.diverged), -1))


def train_population(
    task: Task,
    seeds: Sequence[int],
    schedule: Schedule | Sequence[int],
    *,
    steps: int | None = None,
    initial: Tensor | None = None,
    compiled: bool | None = None,
    progress: Progress | None = None,
) -> History:
    """Train one network per seed by the task's recipe and keep some of its states.

    A run depends on its seed alone (initialisation, data, dropout), never on its neighbours, up to
    rounding. A run that diverges stops, and costs no more time.

    Args:
        task: data and recipe; the computation runs on the device of its data.
        seeds: one per network.
        schedule: which states are kept; or the steps themselves, 0 for the initialisation.
        steps: optimiser steps; by default the recipe's, or the last of the given steps.
        initial: weights (N, P) to start from instead of fresh ones.
        compiled: whether the step is compiled; by default on a GPU. Networks that are faster one after the other
            (convolutions on a CPU) are not.
        progress: told the network-steps done so far, N per optimiser step.

    Warns:
        VectorisationWarning: an operation of the network cannot be batched, and its runs train one by one.
    """
    if isinstance(schedule, Sequence):
        steps = max(schedule) if steps is None else steps
        schedule = AtSteps(schedule)
    total = task.config.steps if steps is None else steps
    size = len(seeds) if task.device.type == "cuda" else max(1, CACHED_NUMBERS // task.numbers_per_step)
    kept: list[Kept] = []
    diverged = torch.zeros(len(seeds), dtype=torch.bool)
    for low in range(0, len(seeds), size):
        part = range(low, min(low + size, len(seeds)))
        population = _Population(task, [seeds[run] for run in part], None if initial is None else initial[list(part)])
        population.compiled = task.device.type == "cuda" if compiled is None else compiled
        for step in range(total + 1):
            due = schedule.due(step, population.runs + low, population.losses)
            if due is not None:
                kept.append(Kept(population.runs[due] + low, step, *population.weights(due)))
            if step == total or not len(population.runs):
                break
            population.step(step)
            if progress is not None:
                progress(low * total + len(part) * (step + 1))
        diverged[part] = population.diverged()
        if progress is not None:
            progress((low + len(part)) * total)
    return _history(kept, diverged, task.spec.size)


class Kept(NamedTuple):
    """States of some runs at one step."""

    runs: Tensor
    step: int
    weights: Tensor
    table: Tensor


def _history(kept: list[Kept], diverged: Tensor, size: int) -> History:
    runs = torch.cat([part.runs for part in kept])
    steps = torch.cat([torch.full((len(part.runs),), part.step) for part in kept])
    table = torch.cat([part.table for part in kept])
    order = torch.from_numpy(np.lexsort((steps.numpy(), runs.numpy())))
    weights = torch.empty(len(order), size)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    low = 0
    for index, part in enumerate(kept):
        weights[place[low : low + len(part.runs)]] = part.weights
        kept[index] = part._replace(weights=part.weights[:0])  # its memory is not held twice
        low += len(part.runs)
    runs, steps, table = runs[order], steps[order], table[order]
    finite = torch.tensor([bool(row.isfinite().all()) for row in weights], dtype=torch.bool)
    if not finite.all():
        diverged = diverged.clone()
        diverged[runs[~finite]] = True
        runs, steps, weights, table = runs[finite], steps[finite], weights[finite], table[finite]
    return History(runs, steps, weights, table, diverged)


class _Population:
    """The stacked state of runs that train together: learners, optimiser and data."""

    def __init__(self, task: Task, seeds: Sequence[int], initial: Tensor | None) -> None:
        self.task, self.seeds = task, torch.tensor(list(seeds))
        self.runs = torch.arange(len(seeds))
        """(n,), which runs still train."""
        self.began = len(seeds)
        self.losses: Tensor | None = None
        self.taken = 0
        """Steps before the present one."""
        self.compiled = False
        learners = [task.learner(seed) for seed in seeds]
        self.trained = [name for name, parameter in learners[0].named_parameters() if parameter.requires_grad]
        if not self.trained:
            raise MoleError(f"{task.config.name}: every layer of the network is frozen; there is nothing to train")
        states = [own_state(learner) for learner in learners]
        state = {name: torch.stack([s[name] for s in states]) for name in states[0]}
        self.buffers = [name for name, _ in task.template.named_buffers() if name in state]
        if initial is not None:
            given = {task.prefix + name: tensor.clone() for name, tensor in task.spec.unflatten(initial).items()}
            state |= {name: tensor for name, tensor in given.items() if name in state}  # tied ones have one name here
        self.keys = dropout_keys(task.template)
        state |= {name: torch.zeros(len(seeds), dtype=torch.int64) for name in self.keys}
        self.state = {name: tensor.to(task.device) for name, tensor in state.items()}
        for name in self.trained:
            self.state[name].requires_grad_()
        self.optimizer = make_optimizer([self.state[name] for name in self.trained], task.config)
        self.feed = task.feed(seeds)

    def step(self, step: int) -> None:
        """One optimiser step of every run."""
        self.taken = step
        batch = self.feed.batch(step, self.state)
        advance_keys(self.state, self.keys, self.seeds, step)
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(self.task, step)
        self.optimizer.zero_grad()
        losses = self._updated(*self.outcome(self.state, *batch)) if step else self._first_losses(batch)
        losses.sum().backward()
        if self.task.config.gradient_clip is not None:
            self._clip(self.task.config.gradient_clip)
        self.optimizer.step()
        self.losses = losses.detach()
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            self._stop_diverged()

    def _loss(self, state: dict[str, Tensor], *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one run, and its buffers after the step, also those that a network assigns anew in its forward."""
        state = dict(state)
        loss = self.task.loss(state, *batch)
        return loss, {name: state[name] for name in self.buffers}

    def _updated(self, losses: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """The losses (n,); the buffers become the runs' own."""
        self.state |= {name: tensor.detach() for name, tensor in buffers.items()}
        return losses

    def _first_losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The first step decides how losses are computed: batched, or one by one where that is faster or cannot be."""
        if singly(self.task.template, self.task.device):
            self.outcome = self._one_by_one
            return self._tried(batch)
        buffers = {name: t.clone() for name, t in self.state.items() if name not in self.trained}
        batched = vmap(self._loss)
        if self.compiled:
            self.outcome = torch.compile(batched, dynamic=False)
            try:
                return self._tried(batch)
            except (RuntimeError, ValueError) as error:
                logger.warning("cannot compile (%s); going on without", _short(error))
                self._restore(buffers)
        self.outcome = batched
        try:
            return self._tried(batch)
        except (RuntimeError, ValueError) as error:
            warnings.warn(
                f"{self.task.config.name}: the network cannot be batched ({_operation(error)}: {_short(error)}); "
                "its runs are trained one after the other, which is slower",
                VectorisationWarning,
                stacklevel=4,
            )
        self._restore(buffers)
        self.outcome = self._one_by_one
        return self._tried(batch)

    def _tried(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The losses, unless there is no memory for them.

        Raises:
            MoleError: the device is full.
        """
        try:
            return self._updated(*self.outcome(self.state, *batch))
        except torch.OutOfMemoryError:
            raise MoleError(
                f"{self.task.config.name}: no memory on {self.task.device} for {len(self.runs)} networks at once; "
                "lower harvest.group_size"
            ) from None

    def _restore(self, buffers: dict[str, Tensor]) -> None:
        for name, tensor in buffers.items():
            self.state[name].copy_(tensor)

    def _one_by_one(self, state: dict[str, Tensor], *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and buffers without `vmap` and its limits. What a run draws depends on its seed and step."""
        losses, buffers = list[Tensor](), list[dict[str, Tensor]]()
        parts = {name: tensor.unbind() for name, tensor in state.items()}
        devices = [self.task.device] if self.task.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for i, seed in enumerate(self.seeds.tolist()):
                torch.manual_seed(derived("a step of its own", seed, self.taken))
                loss, own = self._loss({name: part[i] for name, part in parts.items()}, *(t[i] for t in batch))
                losses.append(loss)
                buffers.append(own)
        return torch.stack(losses), {name: torch.stack([own[name] for own in buffers]) for name in self.buffers}

    def _clip(self, largest: float) -> None:
        gradients = [g for name in self.trained if (g := self.state[name].grad) is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # (n,)
        factor = (largest / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor.reshape(-1, *[1] * (gradient.ndim - 1)))

    def _stop_diverged(self) -> None:
        """Go on with the runs whose last loss was finite."""
        assert self.losses is not None
        finite = self.losses.isfinite().cpu()
        if finite.all():
            return
        alive = finite.nonzero()[:, 0]
        self.runs, self.seeds, self.losses = (
            self.runs[alive],
            self.seeds[alive],
            self.losses[alive.to(self.task.device)],
        )
        index = alive.to(self.task.device)
        if len(alive):
            self.feed.keep(alive)
        old = self.optimizer
        moments = [old.state[self.state[name]] for name in self.trained]
        self.state = {name: tensor.detach()[index] for name, tensor in self.state.items()}
        for name in self.trained:
            self.state[name].requires_grad_()
        self.optimizer = make_optimizer([self.state[name] for name in self.trained], self.task.config)
        for name, moment in zip(self.trained, moments, strict=True):
            self.optimizer.state[self.state[name]] = {
                key: value[index] if isinstance(value, Tensor) and value.ndim else value
                for key, value in moment.items()
            }

    def weights(self, due: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (m, P) and whole numbers (m, Q) of the runs that are due, on the CPU."""
        spec, prefix = self.task.spec, self.task.prefix
        names = [entry.name for entry in (*spec.entries, *spec.table)]
        state = {name: self.state[prefix + name].detach() for name in names}
        parts = spec.flatten(state), spec.flatten_table(state)
        flat, table = (part if due.all() else part[due.to(part.device)] for part in parts)
        return flat.cpu(), table.cpu()

    def diverged(self) -> Tensor:
        """(N,) bool, for the whole population it began with."""
        ended = torch.ones(self.began, dtype=torch.bool)
        ended[self.runs] = False
        if self.losses is not None:
            ended[self.runs] = ~self.losses.isfinite().cpu()
        return ended


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _operation(error: BaseException) -> str:
    """The line of the network, or of whatever else is not of PyTorch, that could not be batched."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/torch/" not in frame.filename and "<" not in frame.filename] or frames
    return f"{ours[-1].filename}:{ours[-1].lineno} `{ours[-1].line}`"


def make_optimizer(parameters: list[Tensor], config: TaskConfig) -> torch.optim.Optimizer:
    """The task's optimiser over every network at once: its steps are element-wise, so runs stay apart."""
    check_choice("optimizer", config.optimizer, ("adam", "sgd"))
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay, fused=True)


def learning_rate_at(task: Task, step: int) -> float:
    """Learning rate of the recipe at a step, counted from 0."""
    config = task.config
    check_choice("schedule", config.schedule, ("constant", "cosine", "epoch_cosine"))
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "epoch_cosine":
        step -= step % task.steps_per_epoch
    return config.learning_rate * 0.5 * (1 + float(np.cos(np.pi * step / config.steps)))
