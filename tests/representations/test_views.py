import pytest
import torch
from torch import nn

from mole.errors import MoleError
from mole.representations import EntryScale, View, ViewName, WeightSpec, chunk_view, graph_view, make_view, neuron_view
from mole.representations.hetero import from_hetero, to_hetero
from mole.representations.views import Nodes, node_orders, unequal

from .architectures import LIBRARIES, TORCH
from .conformance import conforms
from .test_spec import mlp

SPEC = WeightSpec.of(mlp(3, 2, 4))


@pytest.mark.parametrize("view", ["flat", "chunks", "neurons", "graph"])
@pytest.mark.parametrize("name", TORCH)
def test_views_conform(name: str, view: ViewName) -> None:
    conforms(make_view(view, WeightSpec.of(*TORCH[name]())))


@pytest.mark.parametrize(("size", "within"), [(1, True), (7, True), (7, False), (1000, True), (1000, False)])
def test_chunks_of_every_size_conform(size: int, within: bool) -> None:
    view = chunk_view(WeightSpec.of(mlp(5, 7, 3)), size=size, within_tensor=within)
    conforms(view)
    (kind,) = view.nodes
    lengths = [35, 7, 21, 3] if within else [66]
    assert len(kind.places) == sum(-(-length // size) for length in lengths)
    with pytest.raises(MoleError, match="chunks of 0 numbers; legal is a whole number of at least 1"):
        chunk_view(SPEC, size=0)


def test_tokens_of_a_small_network_by_hand() -> None:
    hidden, rest = neuron_view(SPEC).encode(torch.arange(20.0)[None]).nodes
    # row h of 0.weight, then bias h, then column h of 2.weight
    assert hidden[0].tolist() == [[0, 1, 2, 6, 8, 10, 12, 14], [3, 4, 5, 7, 9, 11, 13, 15]]
    assert rest[0].tolist() == [[16, 17, 18, 19]]


def test_the_graph_of_a_small_network_by_hand() -> None:
    view = graph_view(SPEC)
    assert [(k.name, len(k.places), k.ordered) for k in view.nodes] == [
        ("neurons 0", 2, False), ("inputs 0", 3, True), ("neurons 2", 4, True), ("bias 0.bias", 1, True),
        ("bias 2.bias", 1, True),
    ]  # fmt: skip
    first, second, *_ = view.edges
    assert first.name == "0.weight" and (first.source, first.target) == (1, 0)
    assert first.ends.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]] and first.places.flatten().tolist() == [
        *range(6)
    ]
    assert second.ends.tolist() == [[0, 1] * 4, [0, 0, 1, 1, 2, 2, 3, 3]]
    assert second.places.flatten().tolist() == list(range(8, 16))


def test_numbers_of_edges_and_nodes_in_closed_form() -> None:
    view = graph_view(WeightSpec.of(mlp(784, 10, 10)))
    assert sum(len(kind.places) for kind in view.nodes) == 806 and sum(len(kind.places) for kind in view.edges) == 7960
    residual = graph_view(WeightSpec.of(*TORCH["residual"]()))
    plain = [kind for kind in residual.edges if kind.places.shape[1] == 0]
    assert [kind.name for kind in plain] == [
        "residual stem.weight convs.1.weight",
        "residual convs.1.weight convs.3.weight",
    ]
    assert all(len(kind.ends.T) == 8 for kind in plain)
    heads = [kind for kind in graph_view(WeightSpec.of(*TORCH["attention"]())).nodes if kind.name.startswith("heads")]
    assert [len(kind.places) for kind in heads] == [3, 3]


@pytest.mark.parametrize("name", ["mlp", "residual", "convnet", "dense", "transposed"])
def test_the_graph_of_permuted_weights_is_the_relabelled_graph(name: str) -> None:
    spec = WeightSpec.of(*TORCH[name]())
    view = graph_view(spec)
    flat = torch.arange(1.0, spec.size + 1, dtype=torch.float64)[
        None
    ]  # distinct whole numbers: no transpose passes as a reshape
    element = spec.random_element(4)
    plain, moved = view.encode(flat), view.encode(element.act(flat))
    orders = [torch.arange(len(kind.places)) for kind in view.nodes]
    for kind, values, other in zip(view.edges, plain.edges, moved.edges, strict=True):
        if not kind.places.shape[1]:
            continue
        before, after = ({(int(s), int(t)): tuple(v) for s, t, v in zip(*kind.ends, e[0].tolist(), strict=True)}
                         for e in (values, other))  # fmt: skip
        where = {value: ends for ends, value in before.items()}
        source = {ends[0]: where[value][0] for ends, value in after.items()}
        target = {ends[1]: where[value][1] for ends, value in after.items()}
        for at, found in ((kind.source, source), (kind.target, target)):
            order = torch.tensor([found[node] for node in range(len(view.nodes[at].places))])
            fresh = torch.equal(orders[at], torch.arange(len(order)))
            assert fresh or torch.equal(orders[at], order)
            orders[at] = order if fresh else orders[at]
        for (s, t), value in after.items():
            assert before[int(source[s]), int(target[t])] == value


def test_structure_does_not_depend_on_values() -> None:
    view = graph_view(SPEC)
    zeros = to_hetero(view, torch.zeros(20))
    ones = to_hetero(view, torch.ones(20))
    assert zeros.edge_types == ones.edge_types
    assert all(torch.equal(zeros[kind].edge_index, ones[kind].edge_index) for kind in zeros.edge_types)
    assert sum(zeros[kind].edge_attr.shape[0] for kind in zeros.edge_types) == 20


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "lstm"])
def test_graphs_of_torch_geometric_and_back(name: str) -> None:
    spec = WeightSpec.of(*TORCH[name]())
    flat = torch.randn(spec.size)
    data = to_hetero(graph_view(spec), flat)
    assert data.validate()
    assert torch.equal(from_hetero(data, spec.size), flat)
    assert data.num_nodes == sum(len(kind.places) for kind in graph_view(spec).nodes)


def test_permuting_neurons_permutes_tokens() -> None:
    spec = WeightSpec.of(mlp(4, 5, 3))
    view, flat = neuron_view(spec), torch.randn(2, spec.size)
    element = spec.element({"0": torch.tensor([3, 1, 4, 0, 2])})
    plain, moved = view.encode(flat).nodes, view.encode(element.act(flat)).nodes
    orders = node_orders(view, element)
    assert orders[0].tolist() == [3, 1, 4, 0, 2]
    assert torch.equal(moved[0], plain[0][:, orders[0]]) and torch.equal(moved[1], plain[1])
    with pytest.raises(MoleError, match="the element takes a node apart"):
        node_orders(chunk_view(spec, size=6), element)


def test_a_view_refuses_networks_of_another_layout_and_maps_that_own_a_scalar_twice() -> None:
    view = neuron_view(SPEC)
    with pytest.raises(MoleError, match=r"another layout .*: 0\.weight is \(2, 3\) and \(5, 3\)"):
        view.accepts(WeightSpec.of(mlp(3, 5, 4)))
    view.accepts(WeightSpec.of(mlp(3, 2, 4)))
    with pytest.raises(MoleError, match=r"weights of shape \(2, 7\); this view reads \(N, 20\)"):
        view.encode(torch.zeros(2, 7))
    twice = torch.tensor([[*range(19), 0]])
    with pytest.raises(MoleError, match="must own every scalar once; position 0 of 20"):
        View(SPEC, [Nodes("wrong", twice, torch.ones_like(twice, dtype=torch.bool), ordered=True)])


def test_a_network_without_neurons_has_one_token() -> None:
    for network in (mlp(4, 3), mlp(2, 1, 2)):
        spec = WeightSpec.of(network)
        conforms(neuron_view(spec))
        assert [kind.name for kind in neuron_view(spec).nodes] == ["rest"]


def test_deeper_networks_have_edges_between_hidden_layers() -> None:
    view = neuron_view(WeightSpec.of(mlp(4, 3, 5, 2)))
    assert [(k.name, k.places.shape) for k in view.nodes] == [("0", (3, 5)), ("2", (5, 3)), ("rest", (1, 2))]
    (edges,) = view.edges
    assert edges.name == "2.weight" and (edges.source, edges.target) == (0, 1) and edges.places.shape == (15, 1)


def test_every_tensor_is_scaled_by_its_own_spread() -> None:
    flat = torch.randn(400, 20) * torch.cat([torch.full((e.size,), 10.0**i) for i, e in enumerate(SPEC.entries)])
    scale = EntryScale.fit(SPEC, flat.split(150))
    normal = scale.normalise(flat)
    for entry in SPEC.entries:
        assert normal[:, entry.offset : entry.stop].std(correction=0) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(scale.restore(normal), flat, rtol=1e-6, atol=0)
    assert torch.equal(EntryScale.of(SPEC, scale.stds(SPEC)).scale, scale.scale)


def test_constant_tensors_keep_their_scale_and_bad_scales_are_refused() -> None:
    assert EntryScale.fit(SPEC, torch.ones(3, 20)).scale.tolist() == [1.0] * 20
    with pytest.raises(MoleError, match="legal is one positive number for each of 4 tensors"):
        EntryScale.of(SPEC, [1.0, 0.0, 1.0, 1.0])


def test_padding_is_told() -> None:
    assert neuron_view(WeightSpec.of(mlp(784, 10, 10))).padding() == 0
    assert chunk_view(WeightSpec.of(nn.Linear(3, 3)), size=8).padding() == pytest.approx(1 - 12 / 24)


BROKEN = {
    ("transformers", "gpt2", "graph"), ("transformers", "vit", "graph"), ("torch_geometric", "gat", "neurons"),
    ("torch_geometric", "gat", "graph"), ("torch_geometric", "gatv2", "neurons"), ("torch_geometric", "gatv2", "graph"),
    ("torch_geometric", "transformer", "graph"),
    ("torch_geometric", "arma", "graph"),
}  # fmt: skip
"""Views that are not equivariant, as docs/representations.md says: transposed weights, tensors of many axes."""


@pytest.mark.parametrize(
    ("library", "name"),
    [(library, n) for library in ("torch", "transformers", "torch_geometric") for n in LIBRARIES[library]],
)
def test_which_views_are_equivariant_is_known(library: str, name: str) -> None:
    spec = WeightSpec.of(*LIBRARIES[library][name]())
    for view in ("neurons", "graph"):
        assert bool(unequal(make_view(view, spec))) == ((library, name, view) in BROKEN), view
