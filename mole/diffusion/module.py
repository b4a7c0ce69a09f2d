"""The training of the denoiser as a Lightning module.

Dimensions: B pairs, P parameters, I images, C classes.
"""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mole.config import TrainConfig
from mole.diffusion.codec import Codec
from mole.diffusion.denoiser import Denoiser
from mole.diffusion.pairs import Batch
from mole.tasks import Classification


class DenoiserTraining(L.LightningModule):
    """Clean-weight prediction, judged in weight space and in function space.

    The loss is the squared error of the normalised weights plus `function_weight` times the
    Kullback-Leibler divergence, on training images, from the predictions of the true network to those
    of the predicted one: two weight vectors may lie close together and compute different things.
    """

    def __init__(
        self, denoiser: Denoiser, codec: Codec, task: Classification, config: TrainConfig, *, seed: int
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.average = AveragedModel(denoiser, avg_fn=_average(config.ema_decay))
        self.task, self.config, self.seed = task, config, seed
        self.codec = codec

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        predicted = self.denoiser(batch.noised, batch.start, batch.level, batch.conditions)  # (B, P)
        weight_error = F.mse_loss(predicted, batch.clean)
        divergence = self._divergence(predicted, batch.clean)
        loss = weight_error + self.config.function_weight * divergence
        return {"loss": loss, "weight_error": weight_error.detach(), "divergence": divergence.detach()}

    def _divergence(self, predicted: Tensor, clean: Tensor) -> Tensor:
        if self.config.function_weight == 0:
            return predicted.new_zeros(())
        train = self.task.train
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        index = torch.randint(len(train), (self.config.function_images,), generator=generator)
        images = train.images[index.to(train.images.device)]  # (I, D)
        with torch.no_grad():
            wanted = self.task.logits(self.codec.restore(clean), images).log_softmax(-1)  # (B, I, C)
        found = self.task.logits(self.codec.restore(predicted), images).log_softmax(-1)  # (B, I, C)
        return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()

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
