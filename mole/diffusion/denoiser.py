"""The network that generates: a transformer over neuron tokens, conditioned by adaptive LayerNorm.

Blocks as in DiT (Peebles & Xie 2023, adaLN-zero); residual from the start weights through
zero-initialised heads as in G.pt (Peebles et al. 2022): an untrained model returns its start.

Dimensions: B networks, T tokens, D width, H neurons of a group, W numbers in a token, P parameters.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mole.config import GeneratorConfig
from mole.diffusion.conditions import ConditionEmbedding, Conditions
from mole.representations import NeuronView


class Block(nn.Module):
    """Self-attention and MLP, each scaled, shifted and gated by the condition."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, mlp_ratio * width)
        self.contract = nn.Linear(mlp_ratio * width, width)
        self.modulate = _zeros(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c)[:, None].chunk(6, -1)  # (B, 1, D) each
        y = self.norm_attention(x) * (1 + scale1) + shift1  # (B, T, D)
        q, k, v = rearrange(self.qkv(y), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)")  # (B, T, D)
        x = x + gate1 * self.project(y)  # (B, T, D)
        y = self.norm_mlp(x) * (1 + scale2) + shift2  # (B, T, D)
        return x + gate2 * self.contract(F.silu(self.expand(y)))  # (B, T, D)


class Denoiser(nn.Module):
    """Predicts the clean weights from noised ones, a start network and what is asked for.

    No position is given to the neurons of a group, so permuting them in both inputs permutes the output.

    Args:
        view: how weights become tokens; one linear map in and one out per kind of token.
        config: width, layers and heads.

    Example:
        >>> denoiser = Denoiser(NeuronView(task.spec), GeneratorConfig())
        >>> denoiser(noised, start, level, Conditions(start_loss, target_loss)).shape
        torch.Size([8, 1210])
    """

    def __init__(self, view: NeuronView, config: GeneratorConfig) -> None:
        super().__init__()
        self.view = view
        widths = [index.shape[1] for index in view.indices]
        self.read = nn.ModuleList(nn.Linear(2 * w, config.width) for w in widths)
        self.embed = ConditionEmbedding(config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulate = _zeros(nn.Linear(config.width, 2 * config.width))
        self.write = nn.ModuleList(_zeros(nn.Linear(config.width, w)) for w in widths)

    def forward(self, noised: Tensor, start: Tensor, level: Tensor, conditions: Conditions) -> Tensor:
        """One evaluation.

        Args:
            noised: (B, P), normalised weights with noise.
            start: (B, P), normalised weights of the start networks.
            level: (B,), noise level, 0 (clean) to 1 (only noise).
            conditions: each (B,).

        Returns:
            (B, P), normalised clean weights.
        """
        c = self.embed(level, conditions)  # (B, D)
        pairs = zip(self.view.encode(noised), self.view.encode(start), strict=True)
        tokens = [read(torch.cat(pair, -1)) for read, pair in zip(self.read, pairs, strict=True)]
        lengths = [t.shape[1] for t in tokens]
        x = torch.cat(tokens, 1)  # (B, T, D)
        for block in self.blocks:
            x = block(x, c)  # (B, T, D)
        shift, scale = self.modulate(c)[:, None].chunk(2, -1)  # (B, 1, D) each
        x = self.norm(x) * (1 + scale) + shift  # (B, T, D)
        deltas = [write(part) for write, part in zip(self.write, x.split(lengths, 1), strict=True)]  # (B, H, W) each
        return start + self.view.decode(deltas)  # (B, P)


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
