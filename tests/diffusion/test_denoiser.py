import pytest
import torch

from mole.config import GeneratorConfig
from mole.diffusion.codec import Codec
from mole.diffusion.conditions import Conditions, fourier
from mole.diffusion.denoiser import Denoiser
from mole.diffusion.process import noise_level, noise_schedule, reverse
from mole.errors import MoleError
from mole.representations import View, ViewName, WeightSpec, make_view, neuron_view
from mole.tasks import Classification

from ..representations.architectures import LIBRARIES, TORCH

CONFIG = GeneratorConfig(width=16, layers=2, heads=2)


def conditions(size: int) -> Conditions:
    return Conditions(torch.linspace(0.5, 2.3, size), torch.linspace(0.1, 1, size))


def shaken(view: View, config: GeneratorConfig = CONFIG) -> Denoiser:
    """A denoiser with random weights everywhere: zero gates would make any test of it vacuous."""
    denoiser = Denoiser(view, config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return denoiser


def test_an_untrained_model_returns_its_start_exactly(toy: Classification) -> None:
    denoiser = Denoiser(neuron_view(toy.spec), CONFIG)
    noised, start = torch.randn(2, 3, toy.spec.size)
    assert torch.equal(denoiser(noised, start, torch.ones(3), conditions(3)), start)


def commutes(denoiser: Denoiser, spec: WeightSpec, seed: int) -> tuple[float, float]:
    """Difference between the denoised permuted networks and the permuted denoised ones; and if only one is permuted."""
    generator = torch.Generator().manual_seed(seed)
    noised, start = torch.randn(2, 3, spec.size, generator=generator).double()
    element, level = spec.random_element(generator), torch.tensor([0.2, 0.7, 1.0]).double()
    asked = Conditions(*(c.double() for c in conditions(3)))
    with torch.no_grad():
        plain = element.act(denoiser(noised, start, level, asked))
        moved = denoiser(element.act(noised), element.act(start), level, asked)
        only_one = denoiser(element.act(noised), start, level, asked)
    return float((moved - plain).abs().max()), float((only_one - plain).abs().max())


@pytest.mark.parametrize("view", ["neurons", "graph"])
@pytest.mark.parametrize("name", ["mlp", "convnet", "residual", "dense", "lstm", "gated", "attention"])
def test_permuting_both_inputs_permutes_the_output(name: str, view: ViewName) -> None:
    spec = WeightSpec.of(*TORCH[name]())
    both, one = commutes(shaken(make_view(view, spec)), spec, 0)
    assert both < 1e-11 and one > 1e-2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_position_breaks_the_symmetry_and_chunks_have_none(toy: Classification, seed: int) -> None:
    plain = CONFIG.model_copy(update={"symmetry": "none"})
    assert commutes(shaken(neuron_view(toy.spec)), toy.spec, seed)[0] < 1e-12
    for view in ("neurons", "graph", "chunks"):
        assert commutes(shaken(make_view(view, toy.spec), plain), toy.spec, seed)[0] > 1e-2, view


def test_the_scheduler_commutes_with_the_group(toy: Classification) -> None:
    element = toy.spec.random_element(3)
    noise, start = torch.randn(2, 3, toy.spec.size).double()
    denoiser = shaken(neuron_view(toy.spec))
    asked = Conditions(*(c.double() for c in conditions(3)))
    with torch.no_grad():
        plain = reverse(denoiser, noise, start, asked, 4).flat
        moved = reverse(denoiser, element.act(noise), element.act(start), asked, 4).flat
    torch.testing.assert_close(moved, element.act(plain), rtol=1e-6, atol=1e-6)


def test_every_condition_and_input_reaches_the_output(toy: Classification) -> None:
    denoiser = shaken(neuron_view(toy.spec))
    noised, start = torch.randn(2, 2, toy.spec.size).double()
    base = [noised, start, torch.full((2,), 0.5).double(), torch.ones(2).double(), torch.ones(2).double()]

    def call(values: list[torch.Tensor]) -> torch.Tensor:
        return denoiser(values[0], values[1], values[2], Conditions(values[3], values[4])).detach()

    for position in range(5):
        other = list(base)
        other[position] = other[position] * 0.5
        assert (call(other) - call(base)).abs().max() > 1e-3, position


def test_fourier_features_tell_near_losses_apart() -> None:
    features = fourier(torch.tensor([0.1, 0.11]).log())
    assert features.shape == (2, 64) and (features[0] - features[1]).norm() > 0.5


def test_the_last_level_is_pure_noise_and_one_call_gives_the_prediction() -> None:
    schedule = noise_schedule()
    assert schedule.alphas_cumprod[-1] == 0 and noise_level(schedule, torch.tensor(999)) == 1
    seen: list[torch.Tensor] = []

    def denoise(noised: torch.Tensor, start: torch.Tensor, level: torch.Tensor, _: Conditions) -> torch.Tensor:
        seen.append(level)
        return start + 1

    noise, start = torch.randn(2, 3, 5)
    drawn = reverse(denoise, noise, start, conditions(3), 1)
    assert drawn.evaluations == len(seen) == 1 and seen[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(drawn.flat, start + 1)


@pytest.mark.parametrize("evaluations", [2, 4, 20])
def test_more_calls_end_at_the_prediction_too(evaluations: int) -> None:
    levels: list[float] = []

    def denoise(noised: torch.Tensor, start: torch.Tensor, level: torch.Tensor, _: Conditions) -> torch.Tensor:
        levels.append(float(level[0]))
        return start

    noise, start = torch.randn(2, 3, 5)
    drawn = reverse(denoise, noise, start, conditions(3), evaluations)
    assert drawn.evaluations == evaluations and levels == sorted(levels, reverse=True) and levels[0] == 1
    torch.testing.assert_close(drawn.flat, start, rtol=1e-5, atol=1e-5)


def test_a_view_that_is_not_equivariant_is_refused_where_that_is_asked_for() -> None:
    spec = WeightSpec.of(*LIBRARIES["torch_geometric"]["gat"]())
    codec = Codec(spec, CONFIG, [1.0] * len(spec.entries))
    with pytest.raises(
        MoleError, match=r"view neurons of this network is not \(first\.att_src, first\.att_dst\); legal"
    ):
        codec.view()
