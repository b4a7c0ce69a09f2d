import pytest
import torch

from mole.diffusion.common import PACE, CommonNetwork
from mole.diffusion.denoiser import Denoiser
from mole.errors import MoleError
from mole.representations import View

from .test_denoiser import COMMON, conditions, mlp, once


def given(view: View, orders: list[list[int]]) -> torch.Tensor:
    """The common network 0, 1, 2, ... as a start is given it whose nodes have these ranks."""
    common = CommonNetwork(view, 4)
    with torch.no_grad():
        common.values.copy_(torch.arange(view.spec.size) / PACE)
        return common(view, [torch.tensor([order]) for order in orders], torch.zeros(1, 4))[0]


def test_every_neuron_is_given_the_weights_of_its_rank() -> None:
    view = mlp(2, 3, 2, 1)
    names = [entry.name for entry in view.spec.entries]
    plain = dict(zip(names, view.spec.unflatten(torch.arange(view.spec.size).float()).values(), strict=True))
    first, second = [2, 0, 1], [1, 0]
    ordered = [list(range(len(kind.places))) for kind in view.nodes[2:]]
    found = dict(zip(names, view.spec.unflatten(given(view, [first, second, *ordered])).values(), strict=True))
    one, two, three = (name for name in names if "weight" in name)
    torch.testing.assert_close(found[one], plain[one][first])
    torch.testing.assert_close(found[two], plain[two][second][:, first])
    torch.testing.assert_close(found[three], plain[three][:, second])


def test_conditions_say_how_much_of_it_there_is() -> None:
    view = mlp(2, 3, 1)
    common = CommonNetwork(view, 1)
    with torch.no_grad():
        common.values.fill_(1 / PACE)
        common.share.weight.fill_(1.0)
        orders = [torch.arange(len(kind.places)).expand(2, -1) for kind in view.nodes]
        half, none = common(view, orders, torch.tensor([[-0.5], [-1.0]]))
    assert bool((half == 0.5).all()) and not none.any()


def test_it_is_nothing_untrained_and_for_other_layouts() -> None:
    view, wider = mlp(5, 4, 3), mlp(5, 9, 3)
    denoiser = Denoiser([view], COMMON)
    assert denoiser.common is not None
    noised, start = torch.randn(2, 2, wider.spec.size)
    with torch.no_grad():
        denoiser.common.values.fill_(1.0)
    assert torch.equal(once(denoiser, wider, noised, start, torch.ones(2), conditions(2)), start)


def test_networks_of_several_layouts_have_nothing_in_common() -> None:
    with pytest.raises(MoleError, match=r"generator\.common: networks of several layouts .* legal here is false"):
        Denoiser([mlp(5, 4, 3), mlp(5, 9, 3)], COMMON)
