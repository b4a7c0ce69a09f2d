"""The training of the denoiser as a Lightning module.

Dimensions: B pairs, P parameters, I images, C classes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.swa_utils import AveragedModel

from mole.config import TrainConfig
from mole.diffusion.codec import Codec
from mole.diffusion.denoiser import Networks
from mole.diffusion.models import AnyDenoiser
from mole.diffusion.pairs import Batch
from mole.seeding import stream
from mole.tasks import Comparison, Task, energy_score


class DenoiserTraining(L.LightningModule):
    """Clean-weight prediction, judged in weight space and in function space.

    The loss is the squared error of the normalised weights plus `function_weight` times what the two networks
    compute differently on training images: two weight vectors may lie close together and compute different things.
    That is the divergence of their predictions, and `gap_weight` times the distance of their losses: of all networks
    that are about as far from the true one, those are wanted that have the loss that was asked for. For `energy`, what
    comes from pure noise is scored by the energy scores of two draws instead, over distances that are the roots of
    error and divergence (the gap is one already); so the root of `function_weight` is their weight. What is reported as
    `weight_error` and `divergence` is then of both kinds, and not to be compared with that of other objectives.
    """

    def __init__(
        self,
        denoiser: AnyDenoiser,
        codecs: Sequence[Codec],
        tasks: Sequence[Task],
        config: TrainConfig,
        *,
        seed: int,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.average = AveragedModel(denoiser, avg_fn=_average(config.ema_decay))
        self.average.requires_grad_(requires_grad=False)
        self.tasks, self.codecs, self.config, self.seed = tasks, codecs, config, seed
        self.whole = (copy.deepcopy(denoiser),) if sharded else ()  # in a tuple, where PyTorch does not look for parts

    def training_step(self, batch: list[Batch], batch_index: int) -> dict[str, Tensor]:
        networks = [self.networks(part, part.noised, part.level) for part in batch]
        others = [self.networks(part, part.again, part.level) for part in batch if part.again is not None]
        predicted = self.denoiser([*networks, *others])  # (B, P) per part
        second = iter(predicted[len(batch) :])
        again = [None if part.again is None else next(second) for part in batch]
        loss, error, divergence, gap = (torch.zeros_like(predicted[0][0, 0]) for _ in range(4))
        wanted = self._ends(batch)
        for number, part in enumerate(batch):
            share = len(part.level) / sum(len(other.level) for other in batch)
            found, clean = predicted[number], wanted[number]
            other = again[number]
            own = F.mse_loss(found, clean) if other is None else energy_score(root_mean_square, found, other, clean)
            loss, error = loss + share * own, error + share * own
            if self.config.function_weight:
                compared = self._compared(found, clean, part, other)
                weight = self.config.function_weight if other is None else math.sqrt(self.config.function_weight)
                loss = loss + share * weight * (compared.divergence + self.config.gap_weight * compared.gap)
                divergence, gap = divergence + share * compared.divergence, gap + share * compared.gap
        parts = {"weight_error": error, "divergence": divergence, "loss_gap": gap}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def networks(self, part: Batch, noised: Tensor, level: Tensor) -> Networks:
        """A part of a batch as the denoiser takes it, under some noise."""
        return Networks(self.codecs[part.layout].view, noised, part.start, level, part.conditions)

    @torch.no_grad()
    def _ends(self, batch: list[Batch]) -> list[Tensor]:
        """What is to be predicted: the clean weights; for `consistency`, where the averaged denoiser ends from a lower
        level of the same noise."""
        earlier = [(part, *part.earlier) for part in batch if part.earlier is not None]
        if not earlier:
            return [part.clean for part in batch]
        ends = self.average([self.networks(*there) for there in earlier])
        return [torch.where((level > 0)[:, None], end, part.clean)
                for (part, _, level), end in zip(earlier, ends, strict=True)]  # fmt: skip

    def _compared(self, predicted: Tensor, clean: Tensor, part: Batch, again: Tensor | None = None) -> Comparison:
        task, codec = self.tasks[part.layout], self.codecs[part.layout]
        generator = stream("function images", self.seed, self.global_step)
        return task.compare(
            codec.restore(predicted), codec.restore(clean), self.config.function_images, generator, part.seeds,
            None if again is None else codec.restore(again),
        )  # fmt: skip

    def configure_model(self) -> None:
        """Where processes share the weights, each keeps its part of every block and of the rest."""
        if not self.whole or isinstance(self.denoiser, FSDPModule):
            return
        mesh = self.device_mesh
        assert mesh is not None
        for part in (self.denoiser, self.average.module):
            assert isinstance(part, AnyDenoiser)
            for block in (*part.blocks, part):
                fully_shard(block, mesh=mesh["data_parallel"])

    def averaged(self) -> AnyDenoiser:
        """The denoiser with its moving average of weights; to be asked for by every process at once."""
        found = self.average.module
        if self.whole:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(found, options=options)
            found = self.whole[0]
            if state:  # the first process alone is given it
                found.load_state_dict(state)
        assert isinstance(found, AnyDenoiser)
        return found

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Lightning does not know how to clip what is shared."""
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.gradient_clip)

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


def root_mean_square(one: Tensor, other: Tensor) -> Tensor:
    """Distances (B,) between weights (B, P)."""
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
