from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mole.errors import MoleError
from mole.representations import WeightSpec
from mole.representations.symmetry import SymmetryError, check_groups, derive_groups


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_the_layout_of_a_small_network() -> None:
    spec = WeightSpec.of(mlp(3, 2, 4))
    assert [(e.name, e.shape, e.offset) for e in spec.entries] == [
        ("0.weight", (2, 3), 0), ("0.bias", (2,), 6), ("2.weight", (4, 2), 8), ("2.bias", (4,), 16),
    ]  # fmt: skip
    assert spec.size == 20 and spec.groups == {"0": 2}
    assert [e.axes for e in spec.entries] == [("0", None), ("0",), (None, "0"), (None,)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.booleans(), st.integers(0, 3))
def test_the_round_trip_is_bitwise_nan_and_minus_zero_included(widths: list[int], bias: bool, lead: int) -> None:
    spec = WeightSpec.of(mlp(*widths, bias=bias))
    flat = torch.randn(*([2] * lead), spec.size)
    flat[..., 0] = float("nan")
    flat[..., -1] = -0.0
    again = spec.flatten(spec.unflatten(flat))
    assert torch.equal(again.view(torch.int32), flat.view(torch.int32))
    assert WeightSpec.from_json(spec.to_json()) == spec


def test_loading_the_unflattened_weights_gives_the_same_outputs() -> None:
    network = mlp(5, 3, 2)
    spec = WeightSpec.of(network)
    other = mlp(5, 3, 2)
    other.load_state_dict(spec.unflatten(spec.flatten(network.state_dict())))
    inputs = torch.randn(4, 5)
    assert torch.equal(network(inputs), other(inputs))


def test_the_fingerprint_tells_architectures_apart_but_not_weights() -> None:
    assert WeightSpec.of(mlp(5, 3, 2)).fingerprint == WeightSpec.of(mlp(5, 3, 2)).fingerprint
    assert WeightSpec.of(mlp(5, 3, 2)).fingerprint != WeightSpec.of(mlp(5, 4, 2)).fingerprint


def test_weights_that_do_not_fit_are_all_named() -> None:
    spec = WeightSpec.of(mlp(5, 3, 2))
    state = dict(mlp(5, 4, 2).state_dict())
    del state["2.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(MoleError) as caught:
        spec.flatten(state)
    for part in ("2.bias is missing (shape (2,))", "extra is unexpected", "0.weight has shape (4, 5), expected (3, 5)"):
        assert part in str(caught.value)
    with pytest.raises(MoleError, match="7 parameters; this network has 26"):
        spec.unflatten(torch.zeros(7))


def test_other_types_and_tied_weights_are_refused() -> None:
    with pytest.raises(MoleError, match=r"0\.weight is torch\.float64; legal is float32, float16"):
        WeightSpec.of(mlp(5, 3, 2).double())
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    with pytest.raises(MoleError, match="are one tensor"):
        WeightSpec.of(network)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_permuting_a_group_keeps_the_function_and_moves_the_weights(seed: int) -> None:
    network = mlp(5, 7, 6, 2)
    spec = WeightSpec.of(network)
    generator = torch.Generator().manual_seed(seed)
    orders = {group: torch.randperm(size, generator=generator) for group, size in spec.groups.items()}
    flat = spec.flatten(network.state_dict())
    moved = spec.permute(flat, orders)
    assert not torch.equal(moved, flat)
    inputs = torch.randn(9, 5, dtype=torch.float64)
    before = network.double()(inputs)
    network.load_state_dict(spec.unflatten(moved))  # float64 holds float32 exactly
    torch.testing.assert_close(network(inputs), before, rtol=0, atol=1e-12)
    back = spec.permute(moved, {group: order.argsort() for group, order in orders.items()})
    assert torch.equal(back, flat)


def test_a_group_that_is_none_fails_the_check() -> None:
    network = mlp(5, 4, 3)
    with pytest.raises(SymmetryError, match="permuting 0 changes the outputs"):
        check_groups(network, {"0.weight": ("0", None), "0.bias": ("0",)})


def test_layers_that_mix_neurons_end_a_chain() -> None:
    axes = derive_groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    assert axes == {}
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Dropout(), nn.Linear(3, 2))
    assert derive_groups(nested) == {"0.0.weight": ("0.0", None), "0.0.bias": ("0.0",), "2.weight": (None, "0.0")}


def test_a_forward_of_its_own_is_found_out() -> None:
    class Residual(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            hidden = self[0](input)
            return self[2](torch.relu(hidden)) + hidden.cumsum(-1)

    with pytest.raises(SymmetryError, match="does Residual override forward"):
        derive_groups(Residual(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
