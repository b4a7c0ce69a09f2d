import pytest
import torch
from torch import nn

from mole.errors import MoleError
from mole.representations import EntryScale, NeuronView, WeightSpec

from .test_spec import mlp

SPEC = WeightSpec.of(mlp(3, 2, 4))


def test_tokens_of_a_small_network_by_hand() -> None:
    hidden, rest = NeuronView(SPEC).encode(torch.arange(20.0)[None])
    # row h of 0.weight, then bias h, then column h of 2.weight
    assert hidden[0].tolist() == [[0, 1, 2, 6, 8, 10, 12, 14], [3, 4, 5, 7, 9, 11, 13, 15]]
    assert rest[0].tolist() == [[16, 17, 18, 19]]


@pytest.mark.parametrize("network", [mlp(3, 2, 4), mlp(6, 5, 3, bias=False), mlp(2, 1, 2)])
def test_every_scalar_stands_in_one_token_and_comes_back(network: nn.Sequential) -> None:
    spec = WeightSpec.of(network)
    view = NeuronView(spec)
    assert torch.cat([i.flatten() for i in view.indices]).sort().values.tolist() == list(range(spec.size))
    flat = torch.randn(5, spec.size)
    flat[0, 0], flat[1, 1] = float("nan"), -0.0
    assert torch.equal(view.decode(view.encode(flat)).view(torch.int32), flat.view(torch.int32))


def test_permuting_neurons_permutes_tokens() -> None:
    spec = WeightSpec.of(mlp(4, 5, 3))
    view, order, flat = NeuronView(spec), torch.tensor([3, 1, 4, 0, 2]), torch.randn(2, spec.size)
    plain, moved = view.encode(flat), view.encode(spec.permute(flat, {"0": order}))
    assert torch.equal(moved[0], plain[0][:, order]) and torch.equal(moved[1], plain[1])


def test_networks_it_cannot_serve_are_refused() -> None:
    with pytest.raises(MoleError, match=r"2\.weight joins two hidden layers"):
        NeuronView(WeightSpec.of(mlp(4, 3, 3, 2)))
    with pytest.raises(MoleError, match="no interchangeable neurons"):
        NeuronView(WeightSpec.of(mlp(4, 3)))


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
