"""The network that generates: a transformer over the tokens of a view, conditioned by adaptive LayerNorm.

Blocks as in DiT (Peebles & Xie 2023, adaLN-zero); residual from the start weights through
zero-initialised heads as in G.pt (Peebles et al. 2022): an untrained model returns its start.

Dimensions: B networks, T tokens, S source tokens, D width, W numbers of a token, K numbers of an edge, P parameters.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mole.config import GeneratorConfig
from mole.diffusion.conditions import ConditionEmbedding, Conditions
from mole.representations.views import Edges, Nodes, Tokens, View


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


class OwnLinear(nn.Module):
    """A linear layer of its own for every token, for tokens that are all different (chunks)."""

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, inputs, outputs).uniform_(-1, 1) / sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(tokens, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,tio->bto", x, self.weight) + self.bias


class ReadEdges(nn.Module):
    """What nodes learn from the numbers on their edges: a sum over edges, each times a map of the other end."""

    def __init__(self, edges: Edges, sizes: tuple[int, int], width: int) -> None:
        super().__init__()
        self.edges, self.sizes = edges, sizes
        channels = 2 * edges.places.shape[1] if edges.complete else 1
        self.forth, self.back = (nn.Linear(width, channels * width, bias=False) for _ in range(2))
        self.register_buffer("ends", edges.ends, persistent=False)

    ends: Tensor

    def forward(self, source: Tensor, target: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Messages to the sources (B, S, D) and to the targets (B, T, D) from values (B, E, 2 K)."""
        if not self.edges.complete:
            at, to = self.ends
            forward = torch.zeros_like(target).index_add(1, to, self.forth(source)[:, at])
            return torch.zeros_like(source).index_add(1, at, self.back(target)[:, to]), forward
        sources, targets = self.sizes
        e = values.unflatten(1, (targets, sources))  # (B, T, S, 2 K)
        there = self.forth(source).unflatten(-1, (e.shape[-1], -1))  # (B, S, 2 K, D)
        back = self.back(target).unflatten(-1, (e.shape[-1], -1))  # (B, T, 2 K, D)
        forward = torch.einsum("btsk,bskd->btd", e, there) / sqrt(sources)
        return torch.einsum("btsk,btkd->bsd", e, back) / sqrt(targets), forward


class WriteEdges(nn.Module):
    """Changes of the numbers on edges: a bilinear form of their two ends."""

    def __init__(self, edges: Edges, width: int) -> None:
        super().__init__()
        self.channels = edges.places.shape[1]
        self.there = nn.Linear(width, width)
        self.here = _zeros(nn.Linear(width, self.channels * width))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, E, K)."""
        here = self.here(target).unflatten(-1, (self.channels, -1))  # (B, T, K, D)
        found = torch.einsum("btkd,bsd->btsk", here, self.there(source)) / sqrt(source.shape[-1])
        return found.flatten(1, 2)


class WriteNothing(nn.Module):
    """Edges that carry nothing."""

    def __init__(self, edges: Edges) -> None:
        super().__init__()
        self.count = len(edges.places)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return source.new_zeros(len(source), self.count, 0)


class Denoiser(nn.Module):
    """Predicts the clean weights from noised ones, a start network and what is asked for.

    Where nothing tells the neurons of a group apart, permuting them in both inputs permutes the output.

    Args:
        view: how weights become tokens and edges.
        config: width, layers and heads; whether interchangeable tokens get a position.

    Example:
        >>> denoiser = Denoiser(neuron_view(task.spec), GeneratorConfig())
        >>> denoiser(noised, start, level, Conditions(start_loss, target_loss)).shape
        torch.Size([8, 1210])
    """

    def __init__(self, view: View, config: GeneratorConfig) -> None:
        super().__init__()
        self.view, width = view, config.width
        self.read = nn.ModuleList(_reader(kind, width) for kind in view.nodes)
        positions = config.symmetry != "equivariant"
        self.places = nn.ParameterList(_places(kind, width, positions=positions) for kind in view.nodes)
        sizes = [len(kind.places) for kind in view.nodes]
        self.read_edges = nn.ModuleList(
            ReadEdges(kind, (sizes[kind.source], sizes[kind.target]), width) for kind in view.edges
        )
        self.embed = ConditionEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = _zeros(nn.Linear(width, 2 * width))
        self.write = nn.ModuleList(_writer(kind, width) for kind in view.nodes)
        self.write_edges = nn.ModuleList(
            WriteEdges(kind, width) if kind.places.shape[1] else WriteNothing(kind) for kind in view.edges
        )

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
        tokens = self._read(self.view.encode(noised), self.view.encode(start))
        lengths = [t.shape[1] for t in tokens]
        x = torch.cat(tokens, 1)  # (B, T, D)
        for block in self.blocks:
            x = block(x, c)  # (B, T, D)
        shift, scale = self.modulate(c)[:, None].chunk(2, -1)  # (B, 1, D) each
        x = self.norm(x) * (1 + scale) + shift  # (B, T, D)
        parts = list(x.split(lengths, 1))
        deltas = [write(part) for write, part in zip(self.write, parts, strict=True)]  # (B, T, W) each
        ends = [(parts[kind.source], parts[kind.target]) for kind in self.view.edges]
        edges = [write(*pair) for write, pair in zip(self.write_edges, ends, strict=True)]
        return start + self.view.decode(Tokens(deltas, edges))  # (B, P)

    def _read(self, noised: Tokens, start: Tokens) -> list[Tensor]:
        """(B, T, D) per kind of nodes."""
        tokens = []
        for read, place, one, other in zip(self.read, self.places, noised.nodes, start.nodes, strict=True):
            tokens.append((read(torch.cat([one, other], -1)) + place).expand(len(one), -1, -1))
        messages = [torch.zeros_like(token) for token in tokens] if self.view.edges else []
        for read, kind, one, other in zip(self.read_edges, self.view.edges, noised.edges, start.edges, strict=True):
            values = torch.cat([one, other], -1)
            back, forth = read(tokens[kind.source], tokens[kind.target], values)
            messages[kind.source] = messages[kind.source] + back
            messages[kind.target] = messages[kind.target] + forth
        return [t + m for t, m in zip(tokens, messages, strict=True)] if messages else tokens


class Nothing(nn.Module):
    """Nodes without numbers of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def _reader(kind: Nodes, width: int) -> nn.Module:
    tokens, numbers = kind.places.shape
    if numbers == 0:
        return Nothing(width)
    return OwnLinear(tokens, 2 * numbers, width) if kind.ordered and tokens > 1 else nn.Linear(2 * numbers, width)


def _writer(kind: Nodes, width: int) -> nn.Module:
    tokens, numbers = kind.places.shape
    if numbers == 0:
        return Nothing(0)
    if kind.ordered and tokens > 1:
        own = OwnLinear(tokens, width, numbers)
        nn.init.zeros_(own.weight)
        return own
    return _zeros(nn.Linear(width, numbers))


def _places(kind: Nodes, width: int, *, positions: bool) -> nn.Parameter:
    """One vector per node that is itself; one for all of a kind whose nodes are interchangeable."""
    tokens, numbers = kind.places.shape
    own = kind.ordered or positions
    spread = 0.02 if numbers else 1.0  # without numbers it is all that edges have to go by
    return nn.Parameter(torch.randn(tokens if own else 1, width) * spread)


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
