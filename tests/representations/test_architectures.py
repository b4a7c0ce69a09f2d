"""Networks of several libraries: bits round, groups sound, none left without."""

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole.representations import WeightSpec
from mole.representations.inputs import as_inputs
from mole.representations.symmetry import Widened
from mole.representations.tracing import tensors_of

from .architectures import LIBRARIES

CASES = [(library, name) for library, networks in LIBRARIES.items() for name in networks]

WITHOUT_A_GROUP: set[str] = set()


def built(library: str, name: str) -> tuple[nn.Module, Any]:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    torch.manual_seed(0)
    return LIBRARIES[library][name]()


def outputs(network: nn.Module, inputs: Any) -> list[Tensor]:
    arguments, named = as_inputs(inputs)
    with torch.no_grad(), Widened():
        found = tensors_of(network(*map(wide, arguments), **{k: wide(v) for k, v in named.items()}))
    return [tensor.clone() for tensor in found if tensor.is_floating_point()]


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def jittered(network: nn.Module) -> nn.Module:
    """In float64, away from the zeros and ones of an initialisation."""
    network = copy.deepcopy(network).double().eval()
    if getattr(getattr(network, "config", None), "use_cache", None):
        network.config.use_cache = False  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(7)
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(
                tensor.abs() + 0.1 if name.endswith("running_var") else tensor * (1 + 0.2 * noise) + noise / 30
            )
    return network


@pytest.mark.parametrize(("library", "name"), CASES)
def test_a_real_network_comes_back_bit_for_bit_and_its_groups_are_sound(library: str, name: str) -> None:
    network, inputs = built(library, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*the run did not reach")  # parameters that nothing uses
        warnings.filterwarnings("ignore", module="(torch|transformers|diffusers|timm|torchvision)")
        spec = WeightSpec.of(network, inputs)
    assert WeightSpec.from_json(spec.to_json()) == spec
    before = {n: t.detach().clone() for n, t in network.state_dict().items()}
    state = spec.encode(network)
    for tensor in network.state_dict().values():
        tensor.zero_()
    spec.decode(state, network)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())

    assert spec.groups, "no group"
    wide_network = jittered(network)
    wide_spec = WeightSpec.of_state(wide_network.state_dict())
    encoded = wide_spec.encode(wide_network)
    plain = outputs(wide_network, inputs)
    assert max(float(tensor.abs().max()) for tensor in plain) > 0
    for seed, options in enumerate([{"scale": 1.0}, {"scale": 3.0, "sign": True}]):
        element = spec.random_element(seed, **options)  # type: ignore[arg-type]
        assert not torch.equal(element.act(encoded.flat), encoded.flat)
        wide_spec.decode(encoded._replace(flat=element.act(encoded.flat)), wide_network)
        for one, other in zip(plain, outputs(wide_network, inputs), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-10 * float(one.abs().max()))
