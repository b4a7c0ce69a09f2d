"""Many small networks trained as one batched computation, each on its own data order.

Dimensions: N networks, K kept states, P parameters, B images per step.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from mole.config import TaskConfig
from mole.tasks import Task

Progress = Callable[[int], None]
"""Told the network-steps done so far: networks times optimiser steps."""


def kept_steps(steps: int, count: int) -> list[int]:
    """The first step, the last, and log-spaced ones between: at most `count`, all different.

    Example:
        >>> kept_steps(300, 6)
        [0, 1, 4, 17, 72, 300]
    """
    if count < 2 or steps < count - 1:
        raise ValueError(f"cannot keep {count} of {steps + 1} states; legal is 2 to {steps + 1}")
    kept: list[int] = [0]
    for left in range(count - 1, 0, -1):  # equal ratios from here to the end, but at least one step
        here = kept[-1]
        ratio = (steps / max(here, 1)) ** (1 / left) if here else 1.0
        kept.append(min(max(here + 1, round(here * ratio)), steps - left + 1))
    kept[-1] = steps
    return kept


def data_order(seed: int, images: int, batch_size: int, epochs: int) -> Tensor:
    """Indices (epochs * batches, B) that run `seed` visits: each epoch a new shuffle, the rest dropped."""
    generator = torch.Generator().manual_seed(seed)
    batches = images // batch_size
    shuffles = [torch.randperm(images, generator=generator)[: batches * batch_size] for _ in range(epochs)]
    return torch.stack(shuffles).reshape(epochs * batches, batch_size)


def make_optimizer(parameters: list[Tensor], config: TaskConfig, learning_rate: float) -> torch.optim.Optimizer:
    """The task's optimiser over every network at once: its steps are element-wise, so runs stay apart."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay, fused=True
    )


def learning_rate_at(config: TaskConfig, step: int) -> float:
    """Learning rate of the recipe at a step, counted from 0."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + float(np.cos(np.pi * step / config.steps)))


def train_population(
    task: Task,
    seeds: Sequence[int],
    keep: Sequence[int],
    *,
    initial: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Train one network per seed by the task's recipe and keep its states.

    A run depends on its seed alone (initialisation and data order), never on its neighbours.

    Args:
        task: data and recipe; the computation runs on the device of its data.
        seeds: one per network.
        keep: increasing steps whose states are kept; 0 is the initialisation.
        initial: weights (N, P) to start from instead of fresh ones.
        progress: told the network-steps done so far, N per optimiser step.

    Returns:
        (N, K, P) float32. A run that diverges holds NaN or infinity from there on.
    """
    config, device = task.config, task.train.images.device
    start = task.initial(seeds) if initial is None else initial
    state = {k: v.to(device).clone().requires_grad_() for k, v in task.spec.unflatten(start).items()}
    optimizer = make_optimizer(list(state.values()), config, config.learning_rate)
    losses = vmap(task.loss)
    last, images = keep[-1], len(task.train)
    batch_size = min(config.batch_size, images)
    epochs = -(-last // (images // batch_size))
    order = torch.stack([data_order(seed, images, batch_size, epochs) for seed in seeds], 1)  # (steps, N, B)
    kept: list[Tensor] = []
    for step in range(last + 1):
        if step == keep[len(kept)]:
            kept.append(task.spec.flatten({k: v.detach() for k, v in state.items()}))
        if step == last:
            break
        index = order[step].to(device)
        batch = task.train.images.index_select(0, index.flatten()).unflatten(0, index.shape)  # (N, B, D)
        optimizer.param_groups[0]["lr"] = learning_rate_at(config, step)
        optimizer.zero_grad()
        losses(state, batch, task.train.labels[index]).sum().backward()
        optimizer.step()
        if progress is not None:
            progress(len(seeds) * (step + 1))
    return torch.stack(kept, 1)
