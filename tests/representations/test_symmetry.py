"""Symmetry: the group, what is derived of odd networks, and controls that must fail."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole.errors import MoleError, SymmetryWarning
from mole.representations import AxisGroup, WeightSpec
from mole.representations.inputs import as_inputs
from mole.representations.symmetry import Proof, Symmetry, floating

from .architectures import LIBRARIES, TORCH, Attention, Mixture, Recurrent, Residual, images
from .test_spec import mlp


def groups(module: nn.Module, inputs: Any = None) -> dict[str, int]:
    return {name: group.size for name, group in WeightSpec.of(module, inputs).groups.items()}


def declared(spec: WeightSpec) -> Symmetry:
    return Symmetry(spec.groups, {e.name: e.axes for e in spec.entries})


@pytest.mark.parametrize("name", ["mlp", "attention", "depthwise and groups", "gated", "residual", "lstm"])
def test_the_elements_form_a_group(name: str) -> None:
    spec = WeightSpec.of(*TORCH[name]())
    a, b, c = (spec.random_element(seed, scale=2.0, sign=True) for seed in range(3))
    flat = torch.randn(3, spec.size, dtype=torch.float64)
    torch.testing.assert_close(a.after(b).act(flat), a.act(b.act(flat)), rtol=1e-14, atol=0)
    left, right = a.after(b).after(c), a.after(b.after(c))
    assert torch.equal(left.index, right.index)
    torch.testing.assert_close(left.factor, right.factor, rtol=1e-14, atol=0)
    torch.testing.assert_close(a.inverse().act(a.act(flat)), flat, rtol=1e-14, atol=0)
    assert torch.equal(a.inverse().after(a).index, torch.arange(spec.size))
    moved = spec.random_element(0).act(flat)
    assert not torch.equal(moved, flat) and torch.equal(moved.sort().values, flat.sort().values)
    assert torch.equal(spec.element().act(flat), flat)


def test_heads_and_the_widths_within_them() -> None:
    spec = WeightSpec.of(Attention(), torch.randn(2, 5, 12))
    heads = [g for g in spec.groups.values() if g.size == 3]
    widths = [g for g in spec.groups.values() if g.size == 4]
    assert len(heads) == len(widths) == 2 and [w.parent for w in widths] == [h.name for h in heads]
    assert [g.size for g in spec.groups.values() if g.parent is None] == [3, 20, 3, 20]  # the stream is the input
    element = spec.element({widths[0].name: torch.stack([torch.randperm(4) for _ in range(3)])})
    assert len(element.index.unique()) == spec.size


def test_gates_of_recurrent_layers() -> None:
    assert sorted(groups(Recurrent(nn.LSTM), torch.randn(2, 4, 5)).values()) == [6] * 4
    assert sorted(groups(Recurrent(nn.GRU), torch.randn(2, 4, 5)).values()) == [6] * 4


def test_scales_and_signs_by_hand() -> None:
    def kinds(activation: type[nn.Module]) -> tuple[int, int]:
        (group,) = WeightSpec.of(nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2))).groups.values()
        return len(group.scalings), len(group.signs)

    assert kinds(nn.ReLU) == (1, 0) and kinds(nn.LeakyReLU) == (1, 0) and kinds(nn.Identity) == (1, 1)
    assert kinds(nn.Tanh) == (0, 1) and kinds(nn.GELU) == (0, 0) and kinds(nn.ReLU6) == (0, 0)
    assert kinds(nn.Hardtanh) == (0, 1) and kinds(nn.Sigmoid) == (0, 0)
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    (group,) = WeightSpec.of(normed, torch.randn(5, 3)).groups.values()
    assert group.scalings == ((("1.weight", 0, 1), ("1.bias", 0, 1), ("3.weight", 1, -1)),)


def test_powers_of_two_scale_without_a_changed_bit_and_tanh_flips_exactly() -> None:
    network = mlp(5, 7, 3)
    spec, inputs = WeightSpec.of(network), torch.randn(6, 5)
    before, state = network(inputs), spec.encode(network)
    factors = torch.tensor([0.25, 0.5, 1, 2, 4, 8, 0.125], dtype=torch.float64).log()
    spec.decode(state._replace(flat=spec.element(scales={("0", 0): factors}).act(state.flat)), network)
    assert torch.equal(network(inputs), before)
    odd = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    spec, before, state = WeightSpec.of(odd), odd(inputs), WeightSpec.of(odd).encode(odd)
    flips = torch.tensor([1.0, -1, 1, -1, -1, 1, 1])
    spec.decode(state._replace(flat=spec.element(signs={("0", 0): flips}).act(state.flat)), odd)
    assert torch.equal(odd(inputs), before)


def test_what_must_fail_fails() -> None:
    network, inputs = Residual(), as_inputs(images(8))
    for norm in network.norms:
        norm.running_var.uniform_(0.02, 5)  # type: ignore[union-attr, operator]
        norm.running_mean.uniform_(-2, 2)  # type: ignore[union-attr, operator]
    spec = WeightSpec.of(network, images(8))
    true = declared(spec)
    proof = Proof(network, inputs)
    stream = next(name for name, group in spec.groups.items() if len([e for e in spec.entries if name in e.moves]) > 8)
    assert proof.holds(true, spec.groups, scaled=True)

    def error(drop: str) -> float:
        """Without one tensor's part in the stream."""
        axes = {n: tuple((((None, s),),) for s in dict(floating(network))[n].shape) if n == drop else a
                for n, a in true.axes.items()}  # fmt: skip
        return Proof(network, inputs).error(Symmetry(true.groups, axes), [stream], scaled=False)

    for tensor in ("stem.weight", "head.weight", "norms.1.running_mean", "norms.1.running_var", "norms.3.weight"):
        assert error(tensor) > 1e-2, tensor


def test_scaling_under_gelu_and_mixed_heads_fail() -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2))
    spec = WeightSpec.of(network)
    wrong = AxisGroup("0", 6, None, ((("0.weight", 0, 1), ("0.bias", 0, 1), ("2.weight", 1, -1)),))
    proof = Proof(network, as_inputs(torch.randn(4, 5)))
    assert proof.holds(declared(spec), ["0"], scaled=True)
    assert proof.error(Symmetry({"0": wrong}, declared(spec).axes), ["0"], scaled=True) > 1e-2
    attention, inputs = Attention(), torch.randn(2, 5, 12)
    true = declared(WeightSpec.of(attention, inputs))
    heads = ((("mixed", 12),),)  # all heads as one: the order of a head's width may then cross heads
    axes = {
        "layers.0.self_attn.in_proj_weight": ((((None, 3), ("mixed", 12)),), (((None, 12),),)),
        "layers.0.self_attn.in_proj_bias": ((((None, 3), ("mixed", 12)),),),
        "layers.0.self_attn.out_proj.weight": ((((None, 12),),), heads),
    }
    found = Symmetry(
        {**true.groups, "mixed": AxisGroup("mixed", 12)}, {**true.axes, **{f"body.{n}": a for n, a in axes.items()}}
    )
    assert Proof(attention, as_inputs(inputs)).error(found, ["mixed"], scaled=False) > 1e-2


def test_training_mode_with_permuted_statistics() -> None:
    network, inputs = Residual(), as_inputs(images(8))
    symmetry = declared(WeightSpec.of(network, images(8)))
    assert Proof(network, inputs, train=True).holds(symmetry, symmetry.groups, scaled=False)


def test_an_order_that_matters_is_no_group() -> None:
    class Cumulated(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            hidden = self[0](input)
            return self[2](torch.relu(hidden)) + hidden.cumsum(-1)

    assert groups(Cumulated(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)) == {}
    assert groups(nn.Linear(4, 3)) == {}
    assert groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))) == {"0": 4}


def test_what_the_run_did_not_reach_freezes_what_it_might_meet() -> None:
    torch.manual_seed(1)
    network = Mixture()
    with torch.no_grad():
        network.router.weight.zero_()
        network.router.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    with pytest.warns(SymmetryWarning, match=r"the run did not reach experts\.0\.0\.bias, .* and 3 more; whatever has"):
        found = WeightSpec.of(network, torch.randn(4, 6))
    assert found.groups == {}  # the experts that were reached have widths like those that were not


def test_an_operation_without_a_rule_freezes_what_it_touches() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.linalg.matrix_exp(torch.diag_embed(self.first(x).tanh())).sum(-1)
            return self.third(self.second(hidden).relu())

    assert groups(Strange(), torch.randn(3, 4)) == {"second": 6}


def test_a_network_that_does_not_run_has_a_layout_and_a_warning() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second(self.first(x).relu()) + y

    with pytest.warns(SymmetryWarning, match=r"Picky could not be run \(TypeError: .*\), .*; give example_inputs"):
        spec = WeightSpec.of(Picky())
    assert spec.groups == {} and spec.size == 26
    assert WeightSpec.of(Picky(), {"x": torch.randn(5, 3), "y": torch.randn(2)}).groups["first"].size == 4


def test_deriving_changes_neither_the_network_nor_the_random_state() -> None:
    network = Residual().train()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    WeightSpec.of(network, images(8))
    assert network.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_groups_that_a_person_declares() -> None:
    spec = WeightSpec.of_state(mlp(5, 3, 2).state_dict())
    assert spec.groups == {}
    declared_spec = spec.with_axes({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h")})
    assert declared_spec.groups["h"].size == 3
    flat = torch.randn(spec.size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derived = WeightSpec.of(mlp(5, 3, 2))
    order = torch.tensor([2, 0, 1])
    assert torch.equal(declared_spec.permute(flat, {"h": order}), derived.permute(flat, {"0": order}))
    with pytest.raises(
        MoleError, match=r"'1\.weight' is no tensor.*'0\.weight' has 2 axes; 1 are given.*group 'h' has 3 members"
    ):
        spec.with_axes({"1.weight": (None,), "0.weight": ("h",), "0.bias": ("h",), "2.bias": ("h",)})
    with pytest.raises(MoleError, match=r"group 'x' is unknown; legal are 0"):
        derived.element({"x": order})
    with pytest.raises(MoleError, match=r"group '0': not a permutation of 0 to 2"):
        derived.element({"0": torch.tensor([0, 0, 1])})


class Lengths(nn.Module):
    """Positions, a mask and a bias that are cut to the length of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.positions, self.bias = nn.Parameter(torch.randn(1, 16, 8)), nn.Parameter(torch.randn(20, 20))
        self.register_buffer("mask", torch.ones(1, 1, 16, 16).tril())

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        hidden = self.inside(x) + self.positions[:, :length]
        scores = (hidden @ hidden.mT + self.bias[:length, :length]).masked_fill(
            self.mask[0, 0, :length, :length] == 0,
            -1e9,  # type: ignore[index]
        )
        return self.head(scores.softmax(-1) @ hidden)


def test_parts_that_no_operation_read_are_no_group() -> None:
    found = WeightSpec.of(Lengths(), torch.randn(2, 5, 4))
    assert {group.size for group in found.groups.values()} == {8}
    network, inputs = Lengths().double(), torch.randn(2, 13, 4, dtype=torch.float64)
    spec = WeightSpec.of_state(network.state_dict())
    before, state = network(inputs), spec.encode(network)
    spec.decode(state._replace(flat=found.random_element(1).act(state.flat)), network)
    torch.testing.assert_close(network(inputs), before, rtol=0, atol=1e-12)  # another length than the example's


def test_outputs_that_nobody_can_follow_leave_no_symmetry() -> None:
    class Array(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).detach().numpy()

    @dataclass(slots=True)
    class Slotted:
        logits: Tensor

    class Slots(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return Slotted(super().forward(x))

    def layers() -> list[nn.Module]:
        return [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)]

    with pytest.warns(SymmetryWarning, match="no tensor among what it returns"):
        assert groups(Array(*layers()), torch.randn(3, 6)) == {}
    assert groups(Slots(*layers()), torch.randn(3, 6)) == {"0": 8}


def test_boundaries_of_buckets_are_ordered() -> None:
    class Buckets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bounds = nn.Linear(8, 5), nn.Parameter(torch.linspace(-1, 1, 7))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bucketize(self.layer(x), self.bounds)

    assert groups(Buckets(), torch.randn(3, 8)) == {}
    assert WeightSpec.of(Buckets(), torch.randn(3, 8)).unknown == ("bucketize",)


def test_networks_in_other_types_with_kept_activations_or_shared_buffers() -> None:
    wide = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert groups(wide.double(), torch.randn(3, 4).double()) == {"0": 8}
    assert groups(wide.bfloat16(), torch.randn(3, 4).bfloat16()) == {"0": 8}

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.turn = nn.Linear(4, 8), nn.Linear(8, 2), torch.randn(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.first(x @ self.turn).relu()
            return self.second(self.last)

    network = Kept()
    assert groups(network, torch.randn(3, 4)) == {"first": 8}
    network(torch.randn(3, 4))
    with pytest.warns(SymmetryWarning, match="Kept cannot be copied"):
        assert groups(network, torch.randn(3, 4)) == {}

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
            buffer = torch.randn(8)
            self.first.register_buffer("place", buffer)
            self.second.register_buffer("place", buffer)

        def forward(self, x: Tensor) -> Tensor:
            return self.second((self.first(x) + self.first.place).relu()) + self.second.place

    assert groups(Shared(), torch.randn(3, 4)) == {}  # the place meets the outputs, which are ordered


def test_data_objects_of_torch_geometric() -> None:
    from torch_geometric.data import Data
    from torch_geometric.nn import GCNConv

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GCNConv(6, 8), GCNConv(8, 3)

        def forward(self, data: Any) -> Tensor:
            return self.second(self.first(data.x, data.edge_index).relu(), data.edge_index)

    data = Data(x=torch.randn(12, 6), edge_index=torch.randint(0, 12, (2, 30)))
    assert list(groups(Network(), data).values()) == [8]
    assert data.x is not None and data.x.dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "llama"])
def test_inputs_of_known_libraries_are_found(name: str) -> None:
    network, inputs = LIBRARIES["transformers"][name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SymmetryWarning)
        found = WeightSpec.of(network)
    assert {g.size for g in found.groups.values()} == {g.size for g in WeightSpec.of(network, inputs).groups.values()}
