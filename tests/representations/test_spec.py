from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mole.errors import MoleError
from mole.representations import WeightSpec
from mole.representations.dtypes import FLOATS, narrow, widen


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
    assert spec.size == 20 and {name: group.size for name, group in spec.groups.items()} == {"0": 2}
    assert [e.groups for e in spec.entries] == [("0", None), ("0",), (None, "0"), (None,)]
    assert [e.role for e in spec.entries] == ["linear.weight", "linear.bias"] * 2
    assert spec.groups["0"].scalings == ((("0.weight", 0, 1), ("0.bias", 0, 1), ("2.weight", 1, -1)),)
    assert spec.groups["0"].signs == ()


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


class Odd(nn.Module):
    """Every kind of tensor at once."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in FLOATS:
            name = str(dtype).removeprefix("torch.")
            tensor = torch.tensor([[1.5, -0.0, float("nan")], [float("inf"), -float("inf"), 0.25]]).to(dtype)
            self.register_buffer(f"of_{name}", tensor)
        for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool):
            self.register_buffer(f"of_{dtype}".replace("torch.", ""), torch.tensor([0, 1, 100]).to(dtype))
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight  # tied
        self.scalar = nn.Parameter(torch.tensor(float("nan")))
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)  # not contiguous
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.large = nn.Buffer(torch.tensor([2**62 + 1, -(2**63)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) + self.scalar


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def test_every_type_comes_back_bit_for_bit_in_place_and_tied() -> None:
    network = Odd()
    network.of_float16.view(torch.int16)[0, 0] = 0x7D23  # a signalling NaN with a payload
    network.of_bfloat16.view(torch.int16)[0, 0] = -0x7F  # a NaN with a sign and a payload
    network.of_float32.view(torch.int32)[0, 0] = 0x7F812345
    spec = WeightSpec.of(network, torch.randn(2, 3))
    assert spec.dtype == torch.float64 and spec.table_size == 17
    before = {name: bits(tensor) for name, tensor in network.state_dict().items()}
    state, places = spec.encode(network), {n: t.data_ptr() for n, t in network.state_dict().items()}
    other = Odd()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    addresses = {n: t.data_ptr() for n, t in other.state_dict().items()}
    assert spec.decode(state, other) is other
    assert {name: bits(tensor) for name, tensor in other.state_dict().items()} == before
    assert {n: t.data_ptr() for n, t in other.state_dict().items()} == addresses  # in place
    assert other.second.weight is other.first.weight and other.turned.stride() == (1, 3)
    assert {n: t.data_ptr() for n, t in network.state_dict().items()} == places
    (tied,) = [e for e in spec.entries if e.aliases]
    assert (tied.name, tied.aliases) == ("first.weight", ("second.weight",))
    assert set(spec.unflatten(state.flat, state.table)) == set(network.state_dict())


@pytest.mark.parametrize("dtype", [d for d in FLOATS if FLOATS[d] <= 16], ids=str)
@pytest.mark.parametrize("carrier", [torch.float32, torch.float64])
def test_every_bit_pattern_of_a_small_type_survives(dtype: torch.dtype, carrier: torch.dtype) -> None:
    if FLOATS[dtype] == 8:
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        assert torch.equal(narrow(widen(every, carrier), dtype).view(torch.uint8), every.view(torch.uint8))
    else:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        assert torch.equal(narrow(widen(every, carrier), dtype).view(torch.int16), every.view(torch.int16))


def test_what_cannot_be_represented_is_refused_with_what_to_do() -> None:
    network = nn.Linear(2, 2)
    network.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(MoleError, match=r"phase is torch\.complex64: store torch\.view_as_real of it"):
        WeightSpec.of(network)
    with pytest.raises(MoleError, match="weight is not initialised yet: run the network once"):
        WeightSpec.of(nn.LazyLinear(3))


def test_a_network_that_is_another_one_is_named_by_its_first_difference() -> None:
    spec = WeightSpec.of(mlp(5, 3, 2))
    state = spec.encode(mlp(5, 3, 2))
    with pytest.raises(MoleError, match=r"another network than .*: 0\.weight is \(3, 5\) and \(4, 5\)"):
        spec.decode(state, mlp(5, 4, 2))
    with pytest.raises(MoleError, match=r"a state of shapes \(\(7,\), \(0,\)\); this network has \(26,\) and \(0,\)"):
        spec.decode(state._replace(flat=torch.zeros(7)), mlp(5, 3, 2))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_permuting_a_group_keeps_the_function_and_moves_the_weights(seed: int) -> None:
    network = mlp(5, 7, 6, 2)
    spec = WeightSpec.of(network)
    generator = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(group.size, generator=generator) for name, group in spec.groups.items()}
    flat = spec.flatten(network.state_dict())
    moved = spec.permute(flat, orders)
    assert not torch.equal(moved, flat)
    inputs = torch.randn(9, 5, dtype=torch.float64)
    before = network.double()(inputs)
    network.load_state_dict(spec.unflatten(moved))  # float64 holds float32 exactly
    torch.testing.assert_close(network(inputs), before, rtol=0, atol=1e-12)
    back = spec.permute(moved, {group: order.argsort() for group, order in orders.items()})
    assert torch.equal(back, flat)


def test_a_network_that_hands_out_copies_is_written_by_its_own_way_in() -> None:
    class Copies(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}

    one, other = Copies(4, 4), Copies(4, 4)
    spec = WeightSpec.of_state(one.state_dict())
    spec.decode(spec.encode(one), other)
    assert torch.equal(one.weight, other.weight)
    frozen = nn.Linear(2, 2)
    frozen.register_buffer("same", torch.ones(1).expand(4))
    spec = WeightSpec.of_state(frozen.state_dict())
    with pytest.raises(MoleError, match="same cannot be written"):
        spec.decode(spec.encode(frozen), frozen)


def test_networks_without_data_have_a_layout_and_no_state() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    spec = WeightSpec.of_state(network.state_dict(keep_vars=True))
    assert spec.size == 144
    with pytest.raises(MoleError, match=r"0\.weight, .* has no data"):
        spec.encode(network)
