"""What is asked of the generator, and how the denoiser reads it.

Dimensions: B networks, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

FEATURES = 64
"""Fourier features per scalar."""


class Conditions(NamedTuple):
    """Losses in nats on the prompt images, each (B,): where the start stands and what is wanted."""

    start_loss: Tensor
    target_loss: Tensor


class ConditionEmbedding(nn.Module):
    """Noise level and log-losses as Fourier features, mixed by a small MLP into (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(3 * FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, level: Tensor, conditions: Conditions) -> Tensor:
        losses = [(loss + 1e-3).log() for loss in conditions]
        return self.mix(torch.cat([fourier(value) for value in (level, *losses)], -1))


def fourier(values: Tensor) -> Tensor:
    """Sines and cosines of (B,) values of order 1, at log-spaced frequencies from 0.5 to 64: (B, FEATURES)."""
    exponents = torch.linspace(math.log(0.5), math.log(64), FEATURES // 2, device=values.device)
    angles = values[:, None] * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], -1)
