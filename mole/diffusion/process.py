"""The noise process and its reversal; formulas and samplers are those of `diffusers`.

Dimensions: B networks, P parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noised (B, P), level (B,)) -> clean weights (B, P), normalised."""


class Drawn(NamedTuple):
    """Weights (B, P) and how often the denoiser was called for them."""

    flat: Tensor
    evaluations: int


def noise_schedule() -> DDIMScheduler:
    """Cosine schedule whose last level is pure noise, so that one evaluation is trained for (Lin et al. 2023)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def noise_level(schedule: DDIMScheduler, timestep: Tensor) -> Tensor:
    """What the denoiser reads of a timestep: above 0, and 1 for pure noise."""
    return (timestep + 1) / schedule.config["num_train_timesteps"]


@torch.no_grad()
def reverse(denoise: Denoise, noise: Tensor, evaluations: int) -> Drawn:
    """Draw clean weights (B, P) from noise (B, P) by DDIM (Song et al. 2021, eta 0).

    Args:
        denoise: the denoiser.
        noise: standard normal.
        evaluations: calls of `denoise`; one is enough.
    """
    calls = 0
    schedule = noise_schedule()
    schedule.set_timesteps(evaluations)
    sample = noise
    for timestep in schedule.timesteps:
        level = noise_level(schedule, timestep).to(noise).expand(len(noise))
        clean = denoise(sample, level)
        calls += 1
        sample = schedule.step(clean, int(timestep), sample, return_dict=False)[0]
    return Drawn(sample, calls)
