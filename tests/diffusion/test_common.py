import pytest
import torch
from torch.func import functional_call

from mole.diffusion.common import PACE, CommonNetwork
from mole.diffusion.denoiser import Denoiser
from mole.diffusion.models import widest
from mole.errors import MoleError
from mole.representations import View, ViewName, WeightSpec, make_view, neuron_view

from ..representations.architectures import TORCH
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


@pytest.mark.parametrize("view", ["neurons", "classes"])
@pytest.mark.parametrize("name", ["mlp", "convnet", "residual", "dense", "lstm"])
def test_every_start_is_given_the_same_function(name: str, view: ViewName) -> None:
    module, inputs = TORCH[name]()
    spec = WeightSpec.of(module, inputs)
    seen = make_view(view, spec)
    common = CommonNetwork(seen, 4).double()
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(len(kind.places)) if kind.ordered else torch.randperm(len(kind.places), generator=generator)
              for kind in seen.nodes]  # fmt: skip
    with torch.no_grad():
        common.values.copy_(torch.rand(spec.size, generator=generator) * 0.5 / PACE)  # variances too are above 0
        plain = [torch.arange(len(kind.places))[None] for kind in seen.nodes]
        one, other = (common(seen, ranks, torch.zeros(1, 4).double())[0].float()
                      for ranks in (plain, [order[None] for order in orders]))  # fmt: skip
        outputs = [functional_call(module.eval(), spec.unflatten(flat), inputs) for flat in (one, other)]
    first, second = (torch.cat([part.flatten() for part in tensors(output)]) for output in outputs)
    assert not torch.equal(one, other)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def tensors(output: object) -> list[torch.Tensor]:
    """All within what a network gives."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [inner for part in output for inner in tensors(part)] if isinstance(output, tuple | list) else []


def test_untrained_it_is_nothing() -> None:
    view = mlp(5, 4, 3)
    noised, start = torch.randn(2, 2, view.spec.size)
    assert torch.equal(once(Denoiser([view], COMMON), view, noised, start, torch.ones(2), conditions(2)), start)


def test_it_is_refused_where_ranks_do_not_order_tokens() -> None:
    with pytest.raises(
        MoleError, match=r"generator\.common: these networks have several architectures; legal .* false"
    ):
        Denoiser([mlp(5, 4, 3), mlp(5, 9, 3)], COMMON)
    for name in ("attention", "depthwise and groups"):
        with pytest.raises(MoleError, match=r"generator\.common: .* of these networks have no weights .* is false"):
            Denoiser([neuron_view(WeightSpec.of(*TORCH[name]()))], COMMON)
    with pytest.raises(MoleError, match=r"the smallest denoiser has [\d,]+ \(300,376 of them by generator\.common\)"):
        widest([mlp(100, 2706, 10)], COMMON.model_copy(update={"parameters": 200_000}))
