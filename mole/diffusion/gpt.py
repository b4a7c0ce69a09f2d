"""G.pt (Peebles et al. 2022), as its released code and configuration have it: the baseline of every benchmark.

Every token is a piece of one tensor and has an encoder, a position and a decoder of its own; pieces of the noised and
of the start network stand side by side, with four tokens for the scalars: noise level, wanted change, target and start.

Dimensions: B networks, T pieces, W numbers of a piece, D width, P parameters.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mole.config import GeneratorConfig
from mole.diffusion.denoiser import Networks, Own
from mole.errors import MoleError
from mole.representations.views import Tokens, View

FREQUENCIES = 128
"""Per scalar, from 1 to 2**14, each as sine and cosine, and the scalar itself."""


class GptBlock(nn.Module):
    """A block of GPT-2 without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D)."""
        q, k, v = rearrange(self.qkv(self.norm_attention(x)), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        x = x + self.project(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class Gpt(nn.Module):
    """Predicts the clean weights; an untrained model returns its start exactly.

    Args:
        view: chunks.
        config: width, layers and heads; its conditions must be the loss of the start and the target's.
    """

    def __init__(self, view: View, config: GeneratorConfig) -> None:
        super().__init__()
        self.view, self.config, width = view, config, config.width
        pieces, numbers = view.nodes[0].places.shape
        self.encode_noised, self.encode_start = (_encoder(pieces, numbers, width) for _ in range(2))
        self.encode_scalars = _encoder(4, 2 * FREQUENCIES + 1, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.zeros(2 * pieces + 4, width))
        self.blocks = nn.ModuleList(GptBlock(width, config.heads) for _ in range(config.layers))
        self.decode = _encoder(pieces, width, numbers)
        self.register_buffer("frequencies", 2 ** torch.linspace(0, 14, FREQUENCIES), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.decode.weight)

    frequencies: Tensor

    def knows(self, view: View) -> None:
        """Refuse networks of another layout.

        Raises:
            MoleError: naming the first tensor that differs.
        """
        self.view.accepts(view.spec)

    def forward(self, batch: Sequence[Networks]) -> list[Tensor]:
        """One evaluation: normalised clean weights (B, P) of each part of the batch."""
        told = torch.cat([part.conditions.scalars for part in batch])
        if not all(bool(part.conditions.started.all()) for part in batch) or bool(told.isnan().any()):
            raise MoleError("G.pt needs a start, its loss and a wanted loss; nothing can be left out")
        noises, starts, level = (torch.cat([getattr(part, name) for part in batch])
                                 for name in ("noised", "start", "level"))  # fmt: skip
        start_metric, target_metric = told.unbind(1)
        scalars = torch.stack([level, target_metric - start_metric, target_metric, start_metric], 1)[..., None]
        angles = scalars * self.frequencies  # (B, 4, FREQUENCIES)
        features = torch.cat([angles.sin(), angles.cos(), scalars], -1)
        noised, start = (self.view.encode(flat).nodes[0] for flat in (noises, starts))  # (B, T, W)
        tokens = [self.encode_noised(noised), self.encode_start(start), self.encode_scalars(features)]
        x = self.norm_in(torch.cat(tokens, 1)) + self.positions  # (B, 2 T + 4, D)
        for block in self.blocks:
            x = block(x)
        change = self.decode(self.norm_out(x[:, : noised.shape[1]]))  # (B, T, W)
        found = starts + self.view.decode(Tokens([change], []))
        return list(found.split([len(part.level) for part in batch]))


def _encoder(tokens: int, inputs: int, outputs: int) -> Own:
    """A linear map without bias for every token."""
    layer = Own(tokens, inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer
