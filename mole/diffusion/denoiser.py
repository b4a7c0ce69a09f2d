"""The network that generates: a transformer over the tokens of a view, conditioned by adaptive LayerNorm.

Blocks as in DiT (Peebles & Xie 2023, adaLN-zero); residual from the start weights through
zero-initialised heads as in G.pt (Peebles et al. 2022): an untrained model returns its start.

What reads and writes weights belongs to what a tensor is, in a word that networks of any width and depth share: one
denoiser serves them all, several of them in one batch.

Dimensions: B networks, T tokens, S source tokens, D width, W numbers of a token, K numbers of an edge, P parameters.
"""

from collections.abc import Iterator, Sequence
from math import log, sqrt
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mole.config import GeneratorConfig
from mole.diffusion.common import CommonNetwork
from mole.diffusion.conditions import FEATURES, ConditionEmbedding, Conditions, SetEncoder, fourier
from mole.diffusion.roles import Roles, ranks
from mole.errors import MoleError
from mole.representations.structure import OUTPUTS
from mole.representations.views import Edges, Nodes, Tokens, View


class Networks(NamedTuple):
    """Networks of one layout on their way through the denoiser; weights are normalised."""

    view: View
    """How their weights become tokens and edges."""
    noised: Tensor
    """(B, P), with noise."""
    start: Tensor
    """(B, P), of the start networks; 0 where there is none."""
    level: Tensor
    """(B,), noise level, 0 (clean) to 1 (only noise)."""
    conditions: Conditions


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

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D), for conditions (B, D); `mask` (B, 1, 1, T) is true where there is a token at all."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c)[:, None].chunk(6, -1)  # (B, 1, D) each
        y = self.norm_attention(x) * (1 + scale1) + shift1  # (B, T, D)
        q, k, v = rearrange(self.qkv(y), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h t d -> b t (h d)")  # (B, T, D)
        x = x + gate1 * self.project(y)  # (B, T, D)
        y = self.norm_mlp(x) * (1 + scale2) + shift2  # (B, T, D)
        return x + gate2 * self.contract(F.silu(self.expand(y)))  # (B, T, D)


class ReadEdges(nn.Module):
    """What nodes learn from the numbers on their edges: a sum over edges, each times a map of the other end."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.forth, self.back = (nn.Linear(width, max(1, channels) * width, bias=False) for _ in range(2))

    def forward(self, edges: Edges, source: Tensor, target: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Messages to the sources (B, S, D) and to the targets (B, T, D) from values (B, E, channels)."""
        if not edges.complete:
            at, to = edges.ends.to(source.device)
            forward = torch.zeros_like(target).index_add(1, to, self.forth(source)[:, at])
            return torch.zeros_like(source).index_add(1, at, self.back(target)[:, to]), forward
        e = values.unflatten(1, (target.shape[1], source.shape[1]))  # (B, T, S, channels)
        there = self.forth(source).unflatten(-1, (e.shape[-1], -1))  # (B, S, channels, D)
        back = self.back(target).unflatten(-1, (e.shape[-1], -1))  # (B, T, channels, D)
        forward = torch.einsum("btsk,bskd->btd", e, there) / sqrt(source.shape[1])
        return torch.einsum("btsk,btkd->bsd", e, back) / sqrt(target.shape[1]), forward


class WriteEdges(nn.Module):
    """Changes of the numbers on edges, and how much they keep of the start's: bilinear forms of their two ends."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.there = nn.Linear(width, width)
        self.here = _zeros(nn.Linear(width, (channels + 1) * width))

    def forward(self, source: Tensor, target: Tensor, start: Tensor) -> Tensor:
        """(B, E, K), of the start's numbers (B, E, K) too."""
        here = self.here(target).unflatten(-1, (self.channels + 1, -1))  # (B, T, K + 1, D)
        found = torch.einsum("btkd,bsd->btsk", here, self.there(source)) / sqrt(source.shape[-1])
        written, kept = found.flatten(1, 2).split([self.channels, 1], -1)
        return written + kept * start


class Own(nn.Module):
    """A linear layer of its own for every token, for tokens that are all different (chunks)."""

    def __init__(self, tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, inputs, outputs).uniform_(-1, 1) / sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(tokens, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, outputs) of (B, T, inputs)."""
        found = torch.einsum("bti,tio->bto", x, self.weight)
        return found if self.bias is None else found + self.bias


class Denoiser(nn.Module):
    """Predicts the clean weights from noised ones, a start network and what is asked for.

    Where nothing tells the neurons of a group apart, permuting them in both inputs permutes the output.

    Args:
        views: of the networks that it shall know; others will do that are made of the same things.
        config: width, layers and heads; conditions; whether interchangeable tokens get a position.
        numbers: per example of a support set, where the generator reads data.

    Example:
        >>> view = neuron_view(task.spec)
        >>> denoiser = Denoiser([view], GeneratorConfig())
        >>> denoiser([Networks(view, noised, start, level, conditions)])[0].shape
        torch.Size([8, 1210])
    """

    def __init__(self, views: Sequence[View], config: GeneratorConfig, *, numbers: int = 0) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.positions = config.symmetry != "equivariant"
        self.channels = 3 if config.data else 2
        """How often a weight is read: noised, of the start, and as the start's gradient."""
        self.read, self.write, self.keep, self.read_edges, self.write_edges = (nn.ModuleDict() for _ in range(5))
        self.places, self.roles = nn.ParameterDict(), nn.ModuleDict()
        several = len(views) > 1  # ranks among so many do not carry over to ranks among others
        for kind in _interchangeable(views[0]) if config.roles and not (self.positions or several) else ():
            self.roles[kind.kind] = Roles(len(kind.places), width)
        for view in views:
            for kind in view.nodes:
                self._learn(kind)
            for edges in view.edges:
                self._learn_edges(edges)
        self.common = CommonNetwork(views[0], width) if config.common else None
        if config.common and several:
            raise MoleError("generator.common: these networks have several architectures; legal for them is false")
        self.depth = nn.Linear(FEATURES, width, bias=False)
        self.embed = ConditionEmbedding(config.conditions, width)
        self.embed_data = SetEncoder(numbers, width) if config.data else None
        self.embed_size = nn.Linear(2, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = _zeros(nn.Linear(width, 2 * width))

    def _learn(self, kind: Nodes) -> None:
        """Give a kind of nodes what it needs, unless another one shares it."""
        (tokens, numbers), width = kind.places.shape, self.config.width
        if (key := self._place(kind)) not in self.places:
            spread = 0.02 if numbers else 1.0  # without numbers it is all that edges have to go by
            rows = tokens if kind.ordered or self.positions else 1
            self.places[key] = nn.Parameter(torch.randn(rows, width) * spread)
        if kind.kind == OUTPUTS and self.config.data and "data" not in self.places:
            self.places["data"] = nn.Parameter(torch.zeros(1, width))
        for key, size in _parts(kind):
            if key not in self.read:
                if not kind.parts and tokens > 1:
                    self.read[key] = Own(tokens, self.channels * size, width)
                    self.write[key] = own = Own(tokens, width, size)
                    nn.init.zeros_(own.weight)
                    continue
                self.read[key] = read = nn.Linear(self.channels * size, width)
                bound = 1 / sqrt(self.channels * numbers)  # as if the numbers of a node were read by one layer
                nn.init.uniform_(read.weight, -bound, bound)
                nn.init.zeros_(read.bias)
                self.write[key] = _zeros(nn.Linear(width, size))
                self.keep[key] = _zeros(nn.Linear(width, 1))

    def _learn_edges(self, edges: Edges) -> None:
        key, numbers = _key(edges.part, edges.places.shape[1]), edges.places.shape[1]
        if key not in self.read_edges:
            self.read_edges[key] = ReadEdges(self.channels * numbers if edges.complete else 1, self.config.width)
            if numbers:
                self.write_edges[key] = WriteEdges(numbers, self.config.width)

    def _place(self, kind: Nodes) -> str:
        own = kind.ordered or self.positions
        return _key(kind.kind, len(kind.places)) if own else kind.kind

    def knows(self, view: View) -> None:
        """Refuse networks that are made of something that this denoiser has not seen.

        Raises:
            MoleError: naming it, and what there is.
        """
        parts = [key for kind in view.nodes for key, _ in _parts(kind)]
        parts += [self._place(kind) for kind in view.nodes]
        edges = [_key(edges.part, edges.places.shape[1]) for edges in view.edges]
        known = {*self.read, *self.places}
        unknown = [key for key in parts if key not in known] + [key for key in edges if key not in self.read_edges]
        if unknown:
            raise MoleError(
                f"this generator has seen no {', '.join(dict.fromkeys(unknown))}; it knows "
                f"{', '.join(sorted({*self.read, *self.read_edges}))}"
            )

    def forward(self, batch: Sequence[Networks]) -> list[Tensor]:
        """One evaluation of networks of one or several layouts: normalised clean weights (B, P) of each."""
        seen = [self._seen(part) for part in batch]
        order = [self._ranks(part.view, inputs) for part, inputs in zip(batch, seen, strict=True)]
        tokens = [self._read(*part) for part in zip(batch, seen, order, strict=True)]
        sizes = [len(part.level) for part in batch]
        lengths = [sum(kind.shape[1] for kind in part) for part in tokens]
        longest = max(lengths)
        x = torch.cat([F.pad(torch.cat(part, 1), (0, 0, 0, longest - n))
                       for part, n in zip(tokens, lengths, strict=True)])  # fmt: skip
        c = torch.cat([self._condition(part) for part in batch])  # (B, D)
        mask = None
        if min(lengths) < longest:
            counts = torch.tensor(lengths, device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
            mask = (torch.arange(longest, device=x.device) < counts[:, None])[:, None, None]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, c, mask)  # (B, T, D)
        shift, scale = self.modulate(c)[:, None].chunk(2, -1)  # (B, 1, D) each
        x = self.norm(x) * (1 + scale) + shift  # (B, T, D)
        written = [self._write(*part) for part in zip(batch, x.split(sizes), seen, strict=True)]
        if self.common is None:
            return written
        common = [self.common(part.view, *told) for part, *told in zip(batch, order, c.split(sizes), strict=True)]
        return [own + shared for own, shared in zip(written, common, strict=True)]

    def _condition(self, part: Networks) -> Tensor:
        """(B, D)."""
        hidden = [kind for kind in part.view.nodes if not kind.ordered]
        neurons = sum(len(kind.places) for kind in hidden)
        size = part.level.new_tensor([log(max(1, neurons)), float(len(hidden))])
        return self.embed(part.level, part.conditions) + self.embed_size(size)

    def _seen(self, part: Networks) -> list[Tokens]:
        """What is read: noised weights, the start's, and its gradient."""
        inputs = [part.noised, part.start]
        if self.channels == 3:
            gradient = part.conditions.gradient
            inputs.append(torch.zeros_like(part.start) if gradient is None else gradient)
        return [part.view.encode(flat) for flat in inputs]

    def _ranks(self, view: View, seen: Sequence[Tokens]) -> list[Tensor]:
        """(B, T) per kind of nodes: ranks of the mean of the start's weights, or without a start of the noised ones; of
        nodes that are themselves, their places."""
        found = []
        for kind, noised, start in zip(view.nodes, seen[0].nodes, seen[1].nodes, strict=True):
            places = torch.arange(len(kind.places), device=start.device).expand(len(start), -1)
            found.append(ranks(start.mean(-1), noised.mean(-1)) if self._ranked(kind) else places)
        return found

    def _ranked(self, kind: Nodes) -> bool:
        """Whether its tokens have a role; nodes without weights of their own have none."""
        return kind.kind in self.roles and not kind.ordered and bool(kind.places.shape[1])

    def _read(self, part: Networks, seen: Sequence[Tokens], order: Sequence[Tensor]) -> list[Tensor]:
        """(B, T, D) per kind of nodes, whose ranks are given (B, T)."""
        view, conditions = part.view, part.conditions
        tokens = []
        for number, kind in enumerate(view.nodes):
            place = self._placed(kind, conditions) + self.depth(fourier(part.level.new_tensor([kind.depth])))
            tokens.append((self._read_nodes(kind, [one.nodes[number] for one in seen]) + place).expand(
                len(part.level), len(kind.places), -1))  # fmt: skip
        messages = [torch.zeros_like(token) for token in tokens]
        for number, kind in enumerate(view.edges):
            read = self.read_edges[_key(kind.part, kind.places.shape[1])]
            values = torch.cat([one.edges[number] for one in seen], -1)
            back, forth = read(kind, tokens[kind.source], tokens[kind.target], values)
            messages[kind.source] = messages[kind.source] + back
            messages[kind.target] = messages[kind.target] + forth
        read = [token + message for token, message in zip(tokens, messages, strict=True)]
        return [x + self.roles[kind.kind](rank) if self._ranked(kind) else x
                for kind, x, rank in zip(view.nodes, read, order, strict=True)]  # fmt: skip

    def _read_nodes(self, kind: Nodes, values: list[Tensor]) -> Tensor:
        """(B, T, D) of the numbers (B, T, W) of each input; of nodes without numbers (1, 1, 1), nothing."""
        parts = list(_parts(kind))
        if not parts:
            return values[0].new_zeros(1, 1, 1)
        if not kind.parts:
            return self.read[parts[0][0]](torch.cat(values, -1))
        pieces = zip(*(value.split([size for _, size in parts], -1) for value in values), strict=True)
        joined = torch.cat([torch.cat(piece, -1) for piece in pieces], -1)
        layers = [cast(nn.Linear, self.read[key]) for key, _ in parts]
        bias = torch.stack([layer.bias for layer in layers]).sum(0)
        return F.linear(joined, torch.cat([layer.weight for layer in layers], 1), bias)

    def _placed(self, kind: Nodes, conditions: Conditions) -> Tensor:
        """What a token knows of where it stands: (1 or B, 1 or T, D)."""
        place = self.places[self._place(kind)][None]
        if kind.kind != OUTPUTS or self.embed_data is None or conditions.images is None:
            return place
        assert conditions.labels is not None
        found = self.embed_data(conditions.images, conditions.labels, len(kind.places)) + self.places["data"]
        given = (conditions.labels >= 0).any(1)[:, None, None]  # (B, 1, 1)
        return torch.where(given, found, place)

    def _write(self, part: Networks, x: Tensor, seen: Sequence[Tokens]) -> Tensor:
        """(B, P) of what the transformer made of the tokens, (B, T or more, D)."""
        view = part.view
        sizes = [len(kind.places) for kind in view.nodes]
        tokens = x[:, : sum(sizes)].split(sizes, 1)
        starts = seen[1].nodes
        nodes = [self._write_nodes(*part) for part in zip(view.nodes, tokens, starts, strict=True)]
        edges = []
        for kind, start in zip(view.edges, seen[1].edges, strict=True):
            numbers = kind.places.shape[1]
            ends = tokens[kind.source], tokens[kind.target]
            edges.append(self.write_edges[_key(kind.part, numbers)](*ends, start) if numbers else start)
        return part.start + view.decode(Tokens(nodes, edges))

    def _write_nodes(self, kind: Nodes, x: Tensor, start: Tensor) -> Tensor:
        """(B, T, W): what a token of width D says of its W numbers, and how much it keeps of those of the start.

        Without the second, no more than D of W directions of the start could be changed: weight decay shrinks them all.
        """
        written, low = [x[..., :0]], 0
        for key, size in _parts(kind):
            found = self.write[key](x)
            if key in self.keep:
                found = found + self.keep[key](x) * start[..., low : low + size]
            written.append(found)
            low += size
        return torch.cat(written, -1)


def _interchangeable(view: View) -> list[Nodes]:
    """The largest of each kind of nodes with weights that nothing tells apart; outputs are told by their examples."""
    found = [kind for kind in view.nodes if not kind.ordered and kind.kind != OUTPUTS]
    found = [kind for kind in found if len(kind.places) > 1 and kind.places.shape[1]]
    return list({kind.kind: kind for kind in sorted(found, key=lambda kind: len(kind.places))}.values())


def _parts(kind: Nodes) -> Iterator[tuple[str, int]]:
    """Names of the layers that read and write the numbers of a kind, and how many each serves."""
    tokens, numbers = kind.places.shape
    if kind.parts:
        yield from ((_key(part, size), size) for part, size in kind.parts)
    elif numbers:
        yield _key(kind.kind, tokens, numbers), numbers


def _key(*parts: object) -> str:
    """A name for a module: those may hold no dots."""
    return "_".join(str(part) for part in parts).replace(".", "-")


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
