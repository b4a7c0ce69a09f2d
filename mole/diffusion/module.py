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
from mole.tasks import Classification


class DenoiserTraining(L.LightningModule):
    """Clean-weight prediction, judged in weight space and in function space.

    The loss is the squared error of the normalised weights plus `function_weight` times the
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
        self.tasks, self.codecs, self.config, self.seed = tasks, codecs, config, seed

    def training_step(self, batch: list[Batch], batch_index: int) -> dict[str, Tensor]:
        networks = [
            Networks(self.codecs[part.layout].view, part.noised, part.start, part.level, part.conditions)
            for part in batch
        ]
        predicted = self.denoiser(networks)  # (B, P) per part
        share = [len(part.level) / sum(len(other.level) for other in batch) for part in batch]
        errors = [F.mse_loss(found, part.clean) for found, part in zip(predicted, batch, strict=True)]
        weight_error = sum((s * e for s, e in zip(share, errors, strict=True)), torch.zeros_like(errors[0]))
        divergence = torch.zeros_like(weight_error)
        if self.config.function_weight:
            for weight, found, part in zip(share, predicted, batch, strict=True):
                divergence = divergence + weight * self._divergence(found, part)
        loss = weight_error + self.config.function_weight * divergence
        return {"loss": loss, "weight_error": weight_error.detach(), "divergence": divergence.detach()}

    def _divergence(self, predicted: Tensor, part: Batch) -> Tensor:
        task, codec = self.tasks[part.layout], self.codecs[part.layout]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        index = torch.randint(len(task.train), (self.config.function_images,), generator=generator)
        images = task.train.images[index.to(task.device)]  # (I, D)
        own, there = task.config.subtasks.differ, 1.0
        if own:  # as each run sees them, (B, I, D); images of labels that a run has never seen do not count
            images, labels = task.shown(images, task.train.labels[index.to(task.device)], part.seeds)
            there = (labels >= 0) / (labels >= 0).float().mean(1, keepdim=True).clamp_min(1e-6)
        with torch.no_grad():
            wanted = task.logits(codec.restore(part.clean), images, own=own).log_softmax(-1)  # (B, I, C)
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
