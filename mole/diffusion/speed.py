"""How hard a device works on a training."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from mole.diffusion.denoiser import Networks
from mole.diffusion.models import AnyDenoiser

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second, by a part of the device's name (the makers' data sheets)."""


def operations(denoiser: AnyDenoiser, batch: Sequence[Networks]) -> int:
    """Floating-point operations of the denoiser in one training step: forward, and twice as many backward.

    What the function-space term computes is not counted, nor, on a CPU, the products within attention.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        denoiser(batch)
    return 3 * counter.get_total_flops()


def peak(device: torch.device) -> float | None:
    """Operations per second that the device could do; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((found for part, found in PEAKS.items() if part in name), None)
