"""Neurons and edges of a network, read off its specification: which numbers belong to which, never their values.

Dimensions: T nodes of a kind, W numbers of a node, E edges, K numbers of an edge.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from mole.errors import MoleError
from mole.representations.groups import AxisGroup, Factor
from mole.representations.spec import Entry, WeightSpec
from mole.representations.views import Edges, Nodes, View, ViewName, chunk_view, flat_view

OUTPUTS = "outputs"
"""Name of the network's outputs where they are tokens of their own."""

REST_WIDTH = 1024
"""Numbers that belong to no neuron stand in tokens of at most this width."""


@dataclass(frozen=True)
class Block:
    """One block of a tensor: its places in the flat vector, over the factors of its axes."""

    entry: Entry
    factors: tuple[tuple[Factor, ...], ...]
    """Per axis."""
    places: Tensor
    """One dimension per factor, in order."""

    def ends(self) -> list[tuple[str, ...]]:
        """Per axis the groups that run over it."""
        return [tuple(group for group, _ in axis if group is not None) for axis in self.factors]

    def rows(self, *ends: int) -> Tensor:
        """Places (prod of the groups of each axis in `ends`..., K): the rest of the factors come last."""
        dims = [(axis, factor[0]) for axis, factors in enumerate(self.factors) for factor in factors]
        firsts = [[i for i, (axis, group) in enumerate(dims) if axis == end and group is not None] for end in ends]
        taken = [i for part in firsts for i in part]
        rest = [i for i in range(len(dims)) if i not in taken]
        moved = self.places.permute(*taken, *rest)
        sizes = [prod(self.places.shape[i] for i in part) for part in firsts]
        return moved.reshape(*sizes, -1)


def blocks(entry: Entry) -> Iterator[Block]:
    """The blocks of a tensor: concatenated axes taken apart."""
    whole = torch.arange(entry.offset, entry.stop).reshape(entry.shape)
    starts = []
    for terms in entry.axes:
        sizes = [prod(size for _, size in factors) for factors in terms]
        starts.append([sum(sizes[:i]) for i in range(len(sizes))])
    for chosen in product(*(range(len(terms)) for terms in entry.axes)):
        factors = tuple(terms[i] for terms, i in zip(entry.axes, chosen, strict=True))
        window = tuple(
            slice(start[i], start[i] + prod(size for _, size in axis))
            for start, i, axis in zip(starts, chosen, factors, strict=True)
        )
        yield Block(entry, factors, whole[window].reshape([size for axis in factors for _, size in axis]))


def word(entry: Entry) -> str:
    """What a tensor is, in the same word for any network: its role, and its axes, `*` where neurons run along one."""

    def axis(groups: set[str | None], size: int) -> str:
        return OUTPUTS if OUTPUTS in groups else "*" if groups - {None} else str(size)

    axes = [axis({g for factors in terms for g, _ in factors}, size)
            for terms, size in zip(entry.axes, entry.shape, strict=True)]  # fmt: skip
    role = entry.role if entry.role != "other" else entry.name.rpartition(".")[2]
    return f"{role}[{','.join(axes)}]"


def neuron_structure(spec: WeightSpec, *, fixed: frozenset[str] = frozenset()) -> tuple[list[Nodes], list[Edges]]:
    """Nodes: one kind per set of groups that run over an axis together. Edges: tensors between two hidden kinds.

    Groups in `fixed` are in an order of their own.
    """
    columns: dict[tuple[str, ...], list[tuple[str, Tensor]]] = {}
    between: list[tuple[Entry, tuple[str, ...], tuple[str, ...], Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for entry in spec.entries:
        for block in blocks(entry):
            held = [(axis, groups) for axis, groups in enumerate(block.ends()) if groups]
            if not held:
                rest.append((word(entry), block.places.flatten()))
            elif len(held) == 1:
                axis, groups = held[0]
                columns.setdefault(groups, []).append((word(entry), block.rows(axis)))
            else:
                (to, target), (came, source) = held[:2]
                between.append((entry, source, target, block.rows(to, came)))  # (targets, sources, K)
    names = list(dict.fromkeys([*columns, *(end for _, s, t, _ in between for end in (s, t))]))
    nodes = []
    for number, groups in enumerate(names):
        size = prod(spec.groups[group].size for group in groups)
        found, known = columns.get(groups, []), fixed >= set(groups)
        places = torch.cat([p for _, p in found] or [torch.empty(size, 0, dtype=torch.int64)], 1)
        nodes.append(
            Nodes(
                " x ".join(groups), places, torch.ones_like(places, dtype=torch.bool), ordered=known,
                kind=OUTPUTS if known else "neurons", parts=_parts(found), nested=len(groups) > 1,
                depth=number / max(1, len(names) - 1),
            )
        )  # fmt: skip
    if rest:
        nodes.append(_rest(rest))
    edges = [
        Edges(
            entry.name,
            names.index(source),
            names.index(target),
            _complete(places.shape[0], places.shape[1]),
            places.flatten(0, 1),
            complete=True,
            part=word(entry),
        )
        for entry, source, target, places in between
    ]
    return nodes, edges


def _parts(found: Sequence[tuple[str, Tensor]]) -> tuple[tuple[str, int], ...]:
    """The words of blocks (T, K) side by side, told apart where one comes twice."""
    words = [name for name, _ in found]
    return tuple(
        (name if words.count(name) == 1 else f"{name}#{words[:i].count(name) + 1}", places.shape[-1])
        for i, (name, places) in enumerate(found)
    )


def _rest(found: Sequence[tuple[str, Tensor]]) -> Nodes:
    places = torch.cat([places for _, places in found])
    width = min(REST_WIDTH, len(places))
    padded = torch.cat([places, torch.full((-len(places) % width,), -1)]).reshape(-1, width)
    parts = _parts(found) if len(padded) == 1 else ()
    return Nodes("rest", padded, padded >= 0, ordered=True, kind="rest", parts=parts, depth=1.0)


def _complete(targets: int, sources: int) -> Tensor:
    """Every source with every target, targets outermost: (2, E)."""
    target, source = torch.meshgrid(torch.arange(targets), torch.arange(sources), indexing="ij")
    return torch.stack([source.flatten(), target.flatten()])


@dataclass
class _Graph:
    """Nodes and edges as they are found."""

    spec: WeightSpec
    sizes: dict[str, int] = field(default_factory=dict)
    ordered: dict[str, bool] = field(default_factory=dict)
    edges: list[tuple[str, str, str, Tensor | None, Tensor]] = field(default_factory=list)
    """Name, source, target, ends (None if complete), and places."""

    def node(self, name: str, size: int, *, ordered: bool) -> str:
        self.sizes.setdefault(name, size)
        self.ordered.setdefault(name, ordered)
        return name

    def outputs(self, tensor: str) -> str:
        """The neurons that a tensor makes or acts on: those of its layer."""
        layer, _, own = tensor.rpartition(".")
        recurrent = re.fullmatch(r"(?:weight|bias)_(?:ih|hh|hr)(_l\d+(?:_reverse)?)", own)
        return f"neurons {layer or tensor}{recurrent[1] if recurrent else ''}"


def graph_structure(spec: WeightSpec) -> tuple[list[Nodes], list[Edges]]:
    """The parameter graph.

    Neurons are the outputs of a layer. A weight is an edge from an input to an output, its kernel the edge's numbers; a
    bias, scale or statistic an edge from one node of its own. Sums without parameters (residual connections) and heads
    are edges that carry nothing.
    """
    graph = _Graph(spec)
    run = {name: place for place, name in enumerate(spec.flow.reads)}
    for entry in sorted((e for e in spec.entries if len(e.shape) >= 2), key=lambda e: run.get(e.name, len(run))):
        _weight_edges(graph, entry)
    for entry in spec.entries:
        if len(entry.shape) < 2:
            _vector_edges(graph, entry)
    for made, added in spec.flow.residual:
        one, other = graph.outputs(made), graph.outputs(added)
        if one != other and graph.sizes.get(one) == graph.sizes.get(other) is not None:
            index = torch.arange(graph.sizes[one])
            empty = torch.empty(len(index), 0, dtype=torch.int64)
            graph.edges.append((f"residual {made} {added}", one, other, torch.stack([index, index]), empty))
    _head_edges(graph)
    names = list(graph.sizes)
    nodes = [
        Nodes(
            name,
            torch.empty(size, 0, dtype=torch.int64),
            torch.empty(size, 0, dtype=torch.bool),
            ordered=graph.ordered[name],
            kind=name.split(" ")[0],
            depth=number / max(1, len(names) - 1),
        )
        for number, (name, size) in enumerate(graph.sizes.items())
    ]
    edges, words = [], {entry.name: word(entry) for entry in spec.entries}
    for name, source, target, ends, places in graph.edges:
        complete = ends is None
        if ends is None:
            ends = _complete(graph.sizes[target], graph.sizes[source])
        part = words.get(name, name.split(" ")[0])
        edges.append(Edges(name, names.index(source), names.index(target), ends, places, complete=complete, part=part))
    return nodes, edges


def _is_ordered(entry: Entry, axis: int) -> bool:
    """Whether nothing along this axis is interchangeable."""
    return not any(group for factors in entry.axes[axis] for group, _ in factors)


def _weight_edges(graph: _Graph, entry: Entry) -> None:
    """Edges from every input to every output; the axes beside these two are the edge's numbers."""
    to, came = (1, 0) if entry.role in ("embedding.weight", "conv_transposed.weight") else (0, 1)
    outputs, inputs = entry.shape[to], entry.shape[came]
    places = torch.arange(entry.offset, entry.stop).reshape(entry.shape).movedim((to, came), (0, 1))
    places = places.reshape(outputs, inputs, -1)
    target = graph.node(graph.outputs(entry.name), outputs, ordered=_is_ordered(entry, to))
    if graph.sizes[target] != outputs:  # a second matrix of the same layer with another number of rows
        target = graph.node(f"neurons {entry.name}", outputs, ordered=_is_ordered(entry, to))
    for source, low, high in _sources(graph, entry, inputs, ordered=_is_ordered(entry, came)):
        size = graph.sizes[source]  # flattened channels: several inputs are one neuron, and one edge
        graph.edges.append((entry.name, source, target, None, places[:, low:high].reshape(outputs * size, -1)))


def _sources(graph: _Graph, entry: Entry, inputs: int, *, ordered: bool) -> list[tuple[str, int, int]]:
    """Per stretch of the inputs the nodes they are: (kind, first input, last input)."""
    makers = [graph.outputs(name) for name in graph.spec.flow.reads.get(entry.name, ())]
    makers = [name for name in dict.fromkeys(makers) if name in graph.sizes]
    sizes = [graph.sizes[name] for name in makers]
    joined = len(entry.axes[1]) > 1 or _is_ordered(entry, 1)
    if len(makers) > 1 and sum(sizes) == inputs and joined:
        return [(name, sum(sizes[:i]), sum(sizes[: i + 1])) for i, name in enumerate(makers)]
    reads = graph.spec.flow.reads.get(entry.name, ())
    alike = [graph.outputs(name) for name in reads if _same_groups(graph, name, entry)]
    if len(makers) > 1 and alike and graph.sizes.get(alike[-1]) == inputs:
        return [(alike[-1], 0, inputs)]
    if len(makers) == 1 and (inputs == sizes[0] or _outermost(entry, sizes[0])):
        return [(makers[0], 0, inputs)]
    layer = graph.outputs(entry.name).removeprefix("neurons ")
    name = graph.node(f"inputs {layer}", inputs, ordered=ordered)
    if graph.sizes[name] != inputs:
        name = graph.node(f"inputs {entry.name}", inputs, ordered=ordered)
    return [(name, 0, inputs)]


def _same_groups(graph: _Graph, maker: str, entry: Entry) -> bool:
    """Whether the outputs of another weight run over the groups of this one's inputs."""
    made = next(e for e in graph.spec.entries if e.name == maker)
    return not _is_ordered(entry, 1) and made.axes[0] == entry.axes[1]


def _outermost(entry: Entry, size: int) -> bool:
    """Whether the inputs are flattened channels: groups first, of this size together, then places within them."""
    if len(entry.axes[1]) != 1:
        return False
    (factors,) = entry.axes[1]
    groups = [s for g, s in factors if g is not None]
    return prod(groups) == size and all(g is not None for g, _ in factors[: len(groups)])


def _vector_edges(graph: _Graph, entry: Entry) -> None:
    """Edges from one node of its own to the neurons that a vector shifts or scales."""
    size, ordered = entry.size, not entry.moves
    makers = [graph.outputs(name) for name in graph.spec.flow.acts_on.get(entry.name, ())]
    fitting = [name for name in makers if graph.sizes.get(name) == size]
    own = graph.outputs(entry.name)
    target = fitting[-1] if fitting else own if graph.sizes.get(own) == size else f"neurons {entry.name}"
    graph.node(target, size, ordered=ordered)
    source = graph.node(f"{'norm' if entry.role.startswith('norm') else 'bias'} {entry.name}", 1, ordered=True)
    graph.edges.append((entry.name, source, target, None, torch.arange(entry.offset, entry.stop)[:, None]))


def _head_edges(graph: _Graph) -> None:
    """A node per head, joined to the neurons of its width."""
    for entry in graph.spec.entries:
        target = graph.outputs(entry.name)
        if len(entry.shape) < 2 or graph.sizes.get(target) != entry.shape[0]:
            continue
        low = 0
        for factors in entry.axes[0]:
            groups = {g for g, _ in factors if g is not None}
            if any(graph.spec.groups[g].parent in groups for g in groups):
                _join_heads(graph, entry.name, target, factors, low)
            low += prod(s for _, s in factors)


def _join_heads(graph: _Graph, name: str, target: str, factors: Sequence[Factor], low: int) -> None:
    parents = {graph.spec.groups[g].parent for g, _ in factors if g is not None} - {None}
    head = next(i for i, (g, _) in enumerate(factors) if g in parents)
    sizes = [s for _, s in factors]
    shape = [1] * len(sizes)
    shape[head] = sizes[head]
    which = torch.arange(sizes[head]).reshape(shape).expand(sizes).flatten()
    source = graph.node(f"heads {factors[head][0]}", sizes[head], ordered=False)
    ends = torch.stack([which, torch.arange(prod(sizes)) + low])
    graph.edges.append((f"heads {name} {low}", source, target, ends, torch.empty(len(which), 0, dtype=torch.int64)))


def neuron_view(spec: WeightSpec) -> View:
    """One token per neuron: incoming weights, bias, normalisation and outgoing weights of fixed ends together.

    Tensors between two hidden layers are edges between their neurons: as columns of a token they would be permuted.
    What belongs to no neuron is one further token.
    """
    return View(spec, *neuron_structure(spec))


def class_view(spec: WeightSpec) -> View:
    """The neurons, and a token for every output: what reaches an output is on edges, so that outputs can be told
    apart by what they stand for, and not by their number."""
    return View(spec, *neuron_structure(_with_outputs(spec), fixed=frozenset({OUTPUTS})))


def _with_outputs(spec: WeightSpec) -> WeightSpec:
    """The specification with the network's outputs as a group of their own."""
    read = {name for names in spec.flow.reads.values() for name in names}
    known = {entry.name: entry for entry in spec.entries}
    ends = [name for name in spec.flow.reads if name not in read and name in known and _is_ordered(known[name], 0)]
    if not ends:
        raise MoleError("view classes: no output of this network was found; legal: neurons, graph, chunks, flat")
    last, size = ends[-1], known[ends[-1]].shape[0]
    own = {last, *(name for name, made in spec.flow.acts_on.items() if made == (last,))}
    entries = [replace(entry, axes=((((OUTPUTS, size),),), *entry.axes[1:])) if entry.name in own else entry
               for entry in spec.entries]  # fmt: skip
    return replace(spec, entries=tuple(entries), groups={**spec.groups, OUTPUTS: AxisGroup(OUTPUTS, size)})


def graph_view(spec: WeightSpec) -> View:
    """The parameter graph: neurons, inputs, biases, normalisations and heads are nodes; every number is on an edge."""
    return View(spec, *graph_structure(spec))


VIEWS: dict[ViewName, Callable[[WeightSpec], View]] = {
    "flat": flat_view, "chunks": chunk_view, "neurons": neuron_view, "classes": class_view, "graph": graph_view,
}  # fmt: skip


def make_view(name: ViewName, spec: WeightSpec) -> View:
    """A view by its name."""
    return VIEWS[name](spec)
