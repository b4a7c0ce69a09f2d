"""The training of the denoiser as a Lightning module.

Dimensions: B pairs, P parameters, I images, C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mole.config import TrainConfig
from mole.diffusion.codec import Codec
from mole.diffusion.denoiser import Networks
from mole.diffusion.models import AnyDenoiser
from mole.diffusion.pairs import Batch
from mole.seeding import stream
from mole.tasks import Classification


class DenoiserTraining(L.LightningModule):
    """Clean-weight prediction, judged in weight space and in function space.

    The loss is the error of the normalised weights (`train.objective`) plus `function_weight` times the
    Kullback-Leibler divergence, on training images, from the predictions of the true network to those
    of the predicted one: two weight vectors may lie close together and compute different things.
    """

    def __init__(
        self,
        denoiser: AnyDenoiser,
        codecs: Sequence[Codec],
        tasks: Sequence[Classification],
        config: TrainConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.average = AveragedModel(denoiser, avg_fn=_average(config.ema_decay))
        self.average.requires_grad_(requires_grad=False)
        self.tasks, self.codecs, self.config, self.seed = tasks, codecs, config, seed

    def training_step(self, batch: list[Batch], batch_index: int) -> dict[str, Tensor]:
        energy = self.config.objective == "energy"
        passes = [part.noised for part in batch] + [part.again for part in batch if energy]
        parts = [*batch, *batch] if energy else batch
        networks = [self.networks(part, noised, part.level) for part, noised in zip(parts, passes, strict=True)]
        predicted = self.denoiser(networks)  # (B, P) per part
        wanted = [part.clean for part in batch]
        if self.config.objective == "consistency":
            wanted = self._ends(batch)
        error, divergence = torch.zeros_like(predicted[0][0, 0]), torch.zeros_like(predicted[0][0, 0])
        for number, part in enumerate(batch):
            share = len(part.level) / sum(len(other.level) for other in batch)
            found, clean = predicted[number], wanted[number]
            if energy:
                error = error + share * _energy(found, predicted[len(batch) + number], clean)
            else:
                error = error + share * F.mse_loss(found, clean)
            if self.config.function_weight:
                divergence = divergence + share * self._divergence(found, clean, part)
        loss = error + self.config.function_weight * divergence
        return {"loss": loss, "weight_error": error.detach(), "divergence": divergence.detach()}

    def networks(self, part: Batch, noised: Tensor, level: Tensor) -> Networks:
        """A part of a batch as the denoiser takes it, under some noise."""
        return Networks(self.codecs[part.layout].view, noised, part.start, level, part.conditions)

    @torch.no_grad()
    def _ends(self, batch: list[Batch]) -> list[Tensor]:
        """Where the averaged denoiser sees a lower level of the same noise end; without noise the clean weights."""
        ends = self.average([self.networks(part, part.earlier, part.earlier_level) for part in batch])
        return [torch.where((part.earlier_level > 0)[:, None], end, part.clean)
                for part, end in zip(batch, ends, strict=True)]  # fmt: skip

    def _divergence(self, predicted: Tensor, clean: Tensor, part: Batch) -> Tensor:
        task, codec = self.tasks[part.layout], self.codecs[part.layout]
        generator = stream("function images", self.seed, self.global_step)
        index = torch.randint(len(task.train), (self.config.function_images,), generator=generator)
        images = task.train.images[index.to(task.device)]  # (I, D)
        own, there = task.config.subtasks.differ, 1.0
        if own:  # as each run sees them, (B, I, D); images of labels that a run has never seen do not count
            images, labels = task.shown(images, task.train.labels[index.to(task.device)], part.seeds)
            there = (labels >= 0) / (labels >= 0).float().mean(1, keepdim=True).clamp_min(1e-6)
        with torch.no_grad():
            wanted = task.logits(codec.restore(clean), images, own=own).log_softmax(-1)  # (B, I, C)
        found = task.logits(codec.restore(predicted), images, own=own).log_softmax(-1)  # (B, I, C)
        return (F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1) * there).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.denoiser)

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _energy(one: Tensor, other: Tensor, true: Tensor) -> Tensor:
    """Energy score of two draws (B, P) for what came true: a proper scoring rule, least where draws are distributed as
    what comes true (Gneiting & Raftery 2007; De Bortoli et al. 2025). Root-mean-square distances over the weights."""
    near = (_distance(one, true) + _distance(other, true)) / 2
    return (near - _distance(one, other) / 2).mean()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other).square().mean(1) + 1e-8).sqrt()


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps))))


def _average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Exponential moving average whose decay grows as (1 + n) / (10 + n) up to `decay`."""

    def update(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        n = int(count)
        return averaged.lerp(current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
