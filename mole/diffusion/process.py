"""The noise process and its reversal; formulas and samplers are those of `diffusers`.

Dimensions: B networks, P parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from mole.errors import check_choice
from mole.seeding import stream

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noised (B, P), level (B,)) -> clean weights (B, P), normalised."""


Schedule = DDIMScheduler | DDPMScheduler


class Drawn(NamedTuple):
    """Weights (B, P) and how often the denoiser was called for them."""

    flat: Tensor
    evaluations: int


def noise_schedule(kind: str = "cosine") -> Schedule:
    """`cosine`: its last level is pure noise, so that one evaluation is trained for (Lin et al. 2023).
    `linear`: that of Ho et al. 2020, which G.pt has."""
    check_choice("process", kind, ("cosine", "linear"))
    if kind == "linear":
        return DDPMScheduler(
            num_train_timesteps=1000, beta_schedule="linear", prediction_type="sample", clip_sample=False,
            variance_type="fixed_large", timestep_spacing="trailing",
        )  # fmt: skip
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def noise_level(schedule: Schedule, timestep: Tensor) -> Tensor:
    """What the denoiser reads of a timestep: above 0, and 1 for the last."""
    return (timestep + 1) / schedule.config["num_train_timesteps"]


@torch.no_grad()
def reverse(
    denoise: Denoise, noise: Tensor, evaluations: int, *, kind: str = "cosine", seeds: Sequence[int] = ()
) -> Drawn:
    """Draw clean weights (B, P) from noise (B, P): by DDIM (Song et al. 2021, eta 0), or by ancestral steps.

    Args:
        denoise: the denoiser.
        noise: standard normal.
        evaluations: calls of `denoise`; one is enough for `cosine`.
        kind: of the noise schedule.
        seeds: one per network, of the noise that ancestral steps add.
    """
    calls = 0
    schedule = noise_schedule(kind)
    schedule.set_timesteps(evaluations)
    more: dict[str, Any] = {}
    if kind == "linear":
        more["generator"] = [stream("ancestral steps", seed) for seed in seeds]
    sample = noise
    for timestep in schedule.timesteps:
        level = noise_level(schedule, timestep).to(noise).expand(len(noise))
        clean = denoise(sample, level)
        calls += 1
        sample = schedule.step(clean, int(timestep), sample, return_dict=False, **more)[0]
    return Drawn(sample, calls)
