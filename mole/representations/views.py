"""Views: the same numbers as chunks, as neurons or as a graph, and back, exactly.

A view is nothing but integer maps. Its nodes come in kinds, each a table of places in the flat vector; its edges
likewise, with the nodes that they join. Every scalar is owned by one place; a place may also show a scalar that
another one owns (context), or nothing (padding). Decoding reads owned places only, so padding cannot leak.

Dimensions: N networks, P parameters, T nodes of a kind, W numbers of a node, E edges of a kind, K numbers of an edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mole.errors import MoleError
from mole.representations.groups import Element
from mole.representations.spec import WeightSpec, differences

ViewName = Literal["flat", "chunks", "neurons", "classes", "graph"]


@dataclass(frozen=True)
class Nodes:
    """Tokens of one kind."""

    name: str
    places: Tensor
    """(T, W) int64: positions in the flat vector, -1 for padding."""
    owned: Tensor
    """(T, W) bool: what decoding reads."""
    ordered: bool
    """Whether each of them is itself (and may be given a position), or they are interchangeable."""
    kind: str = "chunks"
    """What they are: `neurons`, `outputs`, `inputs`, `bias`, `rest`, `chunks`."""
    parts: tuple[tuple[str, int], ...] = ()
    """What its numbers are, in order, and how many: the same words for the same thing in any network."""
    nested: bool = False
    """Whether they change places within groups of them and as groups alone: channels of attention heads."""
    depth: float = 0.0
    """Where it stands between the network's input, 0, and its output, 1."""


@dataclass(frozen=True)
class Edges:
    """Numbers that belong to two nodes at once."""

    name: str
    source: int
    """Which kind of nodes they come from."""
    target: int
    ends: Tensor
    """(2, E) int64: source and target node of each edge."""
    places: Tensor
    """(E, K) int64, all owned; K is 0 where an edge carries nothing."""
    complete: bool = False
    """Whether every source is joined to every target, targets outermost."""
    part: str = ""
    """What its numbers are, in the same word for the same thing in any network."""


@dataclass
class Tokens:
    """Networks in a view."""

    nodes: list[Tensor]
    """(N, T, W) per kind."""
    edges: list[Tensor]
    """(N, E, K) per kind."""


class View:
    """Integer maps between flat vectors and tokens.

    Raises:
        MoleError: a scalar is owned by no place, or by two.
    """

    def __init__(self, spec: WeightSpec, nodes: Sequence[Nodes], edges: Sequence[Edges] = ()) -> None:
        self.spec, self.nodes, self.edges = spec, list(nodes), list(edges)
        owned = [kind.places[kind.owned] for kind in nodes] + [kind.places.flatten() for kind in edges]
        order = torch.cat(owned) if owned else torch.empty(0, dtype=torch.int64)
        counts = torch.bincount(order, minlength=spec.size)
        if len(order) != spec.size or not bool((counts == 1).all()):
            wrong = int((counts != 1).nonzero()[0]) if len(counts) == spec.size else -1
            raise MoleError(f"a view must own every scalar once; position {wrong} of {spec.size} is owned otherwise")
        self._order = order.argsort()
        self._moved: dict[torch.device, tuple[list[Tensor], list[Tensor], Tensor]] = {}

    @cached_property
    def masks(self) -> list[Tensor]:
        """(T, W) bool per kind of nodes: where there is a number at all."""
        return [kind.places >= 0 for kind in self.nodes]

    def _maps(self, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
        if device not in self._moved:
            nodes = [kind.places.clamp_min(0).flatten().to(device) for kind in self.nodes]
            edges = [kind.places.flatten().to(device) for kind in self.edges]
            self._moved[device] = nodes, edges, self._order.to(device)
        return self._moved[device]

    def encode(self, flat: Tensor) -> Tokens:
        """Flat weights (N, P) as tokens; padding is 0.

        Raises:
            MoleError: these are weights of another network.
        """
        if flat.ndim != 2 or flat.shape[1] != self.spec.size:
            raise MoleError(f"weights of shape {tuple(flat.shape)}; this view reads (N, {self.spec.size})")
        nodes, edges, _ = self._maps(flat.device)
        found = []
        for kind, places, mask in zip(self.nodes, nodes, self.masks, strict=True):
            values = flat.index_select(1, places).unflatten(1, kind.places.shape)
            found.append(values if bool(mask.all()) else values.masked_fill(~mask.to(flat.device), 0.0))
        joined = [flat.index_select(1, places).unflatten(1, kind.places.shape)
                  for kind, places in zip(self.edges, edges, strict=True)]  # fmt: skip
        return Tokens(found, joined)

    def decode(self, tokens: Tokens) -> Tensor:
        """The exact inverse of `encode`: (N, P)."""
        parts = []
        for kind, values in zip(self.nodes, tokens.nodes, strict=True):
            plain = values.flatten(1)
            parts.append(plain if bool(kind.owned.all()) else plain[:, kind.owned.flatten().to(plain.device)])
        parts += [values.flatten(1) for values in tokens.edges]
        joined = torch.cat(parts, 1)
        return joined.index_select(1, self._maps(joined.device)[2])

    def accepts(self, spec: WeightSpec) -> None:
        """Refuse networks of another layout.

        Raises:
            MoleError: naming the first tensor that differs, and both shapes.
        """
        if spec.fingerprint != self.spec.fingerprint:
            found = differences(self.spec, spec) or "the tensors agree, but their symmetry differs"
            raise MoleError(f"networks of another layout than this view's: {found}")

    def padding(self) -> float:
        """Share of the nodes' places that hold nothing."""
        total = sum(mask.numel() for mask in self.masks)
        return 1 - sum(int(mask.sum()) for mask in self.masks) / max(1, total)


def flat_view(spec: WeightSpec) -> View:
    """One token that holds everything."""
    places = torch.arange(spec.size)[None]
    return View(spec, [Nodes("flat", places, torch.ones_like(places, dtype=torch.bool), ordered=True)])


def chunk_view(spec: WeightSpec, *, size: int = 256, within_tensor: bool = True) -> View:
    """Consecutive pieces of `size` numbers, the last of each tensor padded (Peebles et al. 2022)."""
    if size < 1:
        raise MoleError(f"chunks of {size} numbers; legal is a whole number of at least 1")
    spans = [(e.offset, e.stop) for e in spec.entries if e.size] if within_tensor else [(0, spec.size)]
    rows = []
    for low, high in spans:
        places = torch.arange(low, high)
        places = torch.cat([places, torch.full((-len(places) % size,), -1)])
        rows.append(places.reshape(-1, size))
    places = torch.cat(rows)
    return View(spec, [Nodes("chunks", places, places >= 0, ordered=True)])


def unequal(view: View, *, seed: int = 0) -> list[str]:
    """Kinds of nodes and edges that a random group element does not map onto themselves.

    A denoiser without positions over a view without such kinds is equivariant; over others it is not, because numbers
    of a token change places within it, or edges lose their ends.
    """
    element = view.spec.random_element(seed)
    orders: list[dict[int, int]] = [{} for _ in view.nodes]
    broken: list[str] = []
    for number, kind in enumerate(view.nodes):
        if kind.places.shape[1]:
            found = _rows(kind.places, element)
            if found is None or (kind.ordered and found != list(range(len(found)))):
                broken.append(kind.name)
            else:
                orders[number] = dict(enumerate(found))
    for kind in view.edges:
        found = _rows(kind.places, element) if kind.places.shape[1] else None
        if found is None:
            broken += [kind.name] if kind.places.shape[1] else []
            continue
        ends = kind.ends.T.tolist()
        for edge, came in enumerate(found):
            for at, node, before in zip((kind.source, kind.target), ends[edge], ends[came], strict=True):
                if orders[at].setdefault(node, before) != before or (view.nodes[at].ordered and node != before):
                    broken.append(kind.name)
    for kind in view.edges:  # edges that carry nothing follow the nodes that they join
        if not kind.places.shape[1]:
            ends = {tuple(pair) for pair in kind.ends.T.tolist()}
            source, target = orders[kind.source], orders[kind.target]
            if {(source.get(s, s), target.get(t, t)) for s, t in ends} != ends and "heads" not in kind.name:
                broken.append(kind.name)
    return list(dict.fromkeys(broken))


def _rows(places: Tensor, element: Element) -> list[int] | None:
    """Which row each row came from; None if one came from none."""
    known = {tuple(row): at for at, row in enumerate(places.tolist())}
    moved = torch.where(places >= 0, element.index[places.clamp_min(0)], -1)
    found = [known.get(tuple(row)) for row in moved.tolist()]
    return None if None in found else [at for at in found if at is not None]


def node_orders(view: View, element: Element) -> list[Tensor]:
    """How a group element relabels the nodes of a view: per kind (T,), new node t was node `order[t]`.

    Raises:
        MoleError: nodes of a kind are ordered, or the element does not map nodes to nodes.
    """
    orders = []
    for kind in view.nodes:
        known = {tuple(sorted(row)): t for t, row in enumerate(kind.places.tolist())}
        moved = torch.where(kind.places >= 0, element.index[kind.places.clamp_min(0)], -1)
        try:
            orders.append(torch.tensor([known[tuple(sorted(row))] for row in moved.tolist()], dtype=torch.int64))
        except KeyError:
            raise MoleError(f"{kind.name}: the element takes a node apart") from None
    return orders
