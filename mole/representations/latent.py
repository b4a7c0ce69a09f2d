"""A learned view: an autoencoder over normalised weights, which loses something, and says how much.

Dimensions: N networks, P parameters, Z latent numbers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.seeding import Seeded


class Autoencoder(nn.Module):
    """A linear map to Z numbers and back, plus a two-layer network beside each, on normalised weights.

    Args:
        size: P.
        latent: Z.
        width: of the hidden layers.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, size: int, latent: int, width: int = 512, *, seed: int = 0) -> None:
        super().__init__()
        with Seeded(seed):
            self.down, self.up = nn.Linear(size, latent), nn.Linear(latent, size)
            self.compress = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, latent))
            self.expand = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, size))
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("spread", torch.ones(latent))

    def encode(self, normal: Tensor) -> Tensor:
        """Latents (N, Z) of normalised weights (N, P); each of mean 0 and variance 1 over the training networks."""
        return (self.down(normal) + self.compress(normal) - self.mean) / self.spread

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised weights (N, P)."""
        plain = latent * self.spread + self.mean
        return self.up(plain) + self.expand(plain)

    def fit(
        self,
        draw: Callable[[torch.Generator], Tensor],
        *,
        steps: int,
        seed: int = 0,
        learning_rate: float = 1e-3,
        progress: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train by squared error on the batches (N, P) that `draw` gives; then fix the scale of the latents."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(1, steps + 1):
            batch = draw(generator)
            optimizer.zero_grad()
            F.mse_loss(self.decode(self.encode(batch)), batch).backward()
            optimizer.step()
            schedule.step()
            progress(step)
        with torch.no_grad():
            latents = torch.cat([self.encode(draw(generator)) for _ in range(16)])
            self.mean.copy_(latents.mean(0))
            self.spread.copy_(latents.std(0).clamp_min(1e-6))
        self.requires_grad_(requires_grad=False)

    @torch.no_grad()
    def relative_error(self, normal: Tensor) -> float:
        """Squared error of (N, P) over their squares."""
        return float((self.decode(self.encode(normal)) - normal).square().sum() / normal.square().sum())
