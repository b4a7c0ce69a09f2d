"""Canonical forms and augmentation."""

from itertools import pairwise

import pytest
import torch

from mole.representations import WeightSpec
from mole.representations.handling import Augmentation, Canonical, Elements
from mole.representations.latent import Autoencoder

from .architectures import TORCH


@pytest.mark.parametrize("name", ["mlp", "mlp gelu", "residual", "convnet", "dense"])
def test_every_point_of_an_orbit_has_one_canonical_form(name: str) -> None:
    torch.manual_seed(3)
    spec = WeightSpec.of(*TORCH[name]())
    reference = torch.randn(spec.size, dtype=torch.float64)
    canonical = Canonical(spec, reference)
    for seed in range(3):
        network = reference + 0.05 * torch.randn(spec.size, dtype=torch.float64)
        form = canonical.element(network).act(network)
        moved = spec.random_element(seed, scale=2.0).act(network)
        torch.testing.assert_close(canonical.element(moved).act(moved), form, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(canonical.element(form).act(form), form, rtol=1e-6, atol=1e-8)  # idempotent


def test_signs_and_order_of_a_tanh_network_are_found_together() -> None:
    torch.manual_seed(0)
    spec = WeightSpec.of(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)))
    reference = torch.randn(spec.size, dtype=torch.float64)
    for seed in range(5):
        moved = spec.random_element(seed, sign=True).act(reference)
        found = Canonical(spec, reference).element(moved).act(moved)
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)


def test_a_known_permutation_is_recovered_in_deep_networks() -> None:
    for widths in ((6, 9, 4), (6, 9, 8, 4), (6, 9, 8, 7, 9, 8, 4)):
        layers = [m for a, b in pairwise(widths) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())]
        spec = WeightSpec.of(torch.nn.Sequential(*layers[:-1]))
        reference = torch.randn(spec.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        canonical = Canonical(spec, reference, balance=False)
        for seed in range(4):
            moved = spec.random_element(seed).act(reference)
            assert torch.equal(canonical.element(moved).act(moved), reference)


def test_elements_act_each_on_its_own_network_and_back() -> None:
    spec = WeightSpec.of(*TORCH["mlp"]())
    elements = [spec.random_element(seed, scale=2.0) for seed in range(4)]
    flat = torch.randn(4, spec.size)
    stacked = Elements.stack(elements)
    expected = torch.stack([element.act(row) for element, row in zip(elements, flat, strict=True)])
    torch.testing.assert_close(stacked.act(flat), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stacked.undo(expected), flat, rtol=1e-6, atol=0)


def test_augmentation_is_seeded_and_gives_members_of_the_group() -> None:
    spec = WeightSpec.of(*TORCH["mlp"]())
    drawn = [Augmentation(spec, seed=1, pool=8).draw(5, torch.Generator().manual_seed(2)).index for _ in range(2)]
    assert torch.equal(*drawn) and len({tuple(row) for row in drawn[0].tolist()}) > 1
    network = TORCH["mlp"]()[0].double()
    inputs = torch.randn(3, 5, dtype=torch.float64)
    flat = spec.encode(TORCH["mlp"]()[0]).flat
    network.load_state_dict({name: tensor.double() for name, tensor in spec.unflatten(flat).items()})
    before = network(inputs)
    for index in drawn[0]:
        network.load_state_dict({name: tensor.double() for name, tensor in spec.unflatten(flat[index]).items()})
        torch.testing.assert_close(network(inputs), before, rtol=0, atol=1e-12)


def test_an_autoencoder_learns_a_plane_and_says_what_it_loses() -> None:
    basis = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))

    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(64, 3, generator=generator) @ basis

    coder = Autoencoder(40, 3, width=32)
    fresh = draw(torch.Generator().manual_seed(9))
    before = coder.relative_error(fresh)
    coder.fit(draw, steps=600, seed=0, learning_rate=3e-3)
    assert coder.relative_error(fresh) < 0.05 < before
    codes = coder.encode(fresh)
    assert codes.shape == (64, 3) and float(codes.std(0).mean()) == pytest.approx(1, abs=0.2)
