from pathlib import Path

import pytest
import torch

from mole.config import GeneratorConfig, load
from mole.diffusion.conditions import Conditions
from mole.diffusion.denoiser import Networks
from mole.diffusion.generator import _noise
from mole.diffusion.gpt import Gpt
from mole.diffusion.models import make_denoiser, widest
from mole.diffusion.process import noise_schedule, reverse
from mole.errors import MoleError
from mole.representations import View, WeightSpec, chunk_view
from mole.tasks import Architecture, Classification

ROOT = Path(__file__).resolve().parents[2]
SMALL = GeneratorConfig(model="gpt", view="chunks", symmetry="augment", width=16, layers=2, heads=2, chunk=8)
NETWORKS = {
    "mnist": Architecture(kind="mlp", widths=[784, 10, 10]),
    "cifar10": Architecture(kind="convnet", widths=[3, 16, 32, 10]),
    "cartpole": Architecture(kind="policy", widths=[4, 32, 32, 1], activation="selu"),
}


def asked(size: int) -> Conditions:
    return Conditions.of(SMALL.conditions, size, {"start_loss": 2.0, "target_loss": 0.3})


def networks(view: View, size: int = 3) -> Networks:
    noised, start = torch.randn(2, size, view.spec.size)
    return Networks(view, noised, start, torch.linspace(0.1, 1, size), asked(size))


def shaken(view: View) -> Gpt:
    model, generator = Gpt(view, SMALL), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_an_untrained_model_returns_its_start_exactly(toy: Classification) -> None:
    view = chunk_view(toy.spec, size=8)
    part = networks(view)
    assert torch.equal(Gpt(view, SMALL)([part])[0], part.start)


@pytest.mark.parametrize(
    ("name", "published", "tokens"), [("mnist", 378e6, 26), ("cifar10", 639e6, 26), ("cartpole", 347e6, 18)]
)
def test_at_full_size_it_has_the_parameters_and_tokens_of_the_paper(name: str, published: float, tokens: int) -> None:
    config = load([ROOT / "configs" / f"gpt_{name}.yaml"]).generator
    view = chunk_view(WeightSpec.of(NETWORKS[name].build(seed=0)), size=config.chunk)
    with torch.device("meta"):
        model = make_denoiser([view], config)
    places = view.nodes[0].places
    padding = 3 * config.width * int((places < 0).sum())  # of the three maps; it never meets a number
    assert sum(p.numel() for p in model.parameters()) - padding == pytest.approx(published, rel=2e-3)
    assert isinstance(model, Gpt) and len(model.positions) == 2 * len(places) + 4 == tokens


def test_the_size_dial_goes_from_a_million_to_the_papers(toy: Classification) -> None:
    config = load([ROOT / "configs" / "gpt_mnist.yaml"]).generator
    view = chunk_view(WeightSpec.of(NETWORKS["mnist"].build(seed=0)), size=1000)
    for wanted in (10**6, 10**7, 378 * 10**6):
        sized = config.model_copy(update={"parameters": wanted})
        with torch.device("meta"):
            found = sum(p.numel() for p in make_denoiser([view], sized).parameters())
        assert 0.5 * wanted < found <= wanted, wanted
    with pytest.raises(MoleError, match=r"generator\.parameters is 10,000; .* smallest denoiser has .* lower heads"):
        widest([view], config.model_copy(update={"parameters": 10_000}))


def test_every_scalar_and_both_networks_reach_the_output(toy: Classification) -> None:
    view = chunk_view(toy.spec, size=8)
    model, part = shaken(view), networks(view)
    base = model([part])[0]
    for other in (
        part._replace(noised=part.noised.flip(1)), part._replace(start=part.start.flip(1)),
        part._replace(level=part.level * 0.5 + 0.3),
        part._replace(conditions=Conditions.of(SMALL.conditions, 3, {"start_loss": 1.0, "target_loss": 0.3})),
        part._replace(conditions=Conditions.of(SMALL.conditions, 3, {"start_loss": 2.0, "target_loss": 0.1})),
    ):  # fmt: skip
        assert (model([other])[0] - base).abs().max() > 1e-3


def test_nothing_can_be_left_out(toy: Classification) -> None:
    view = chunk_view(toy.spec, size=8)
    part = networks(view)
    for left in (Conditions.of(SMALL.conditions, 3, {"start_loss": 2.0}),
                 part.conditions.without(started=torch.tensor([False, True, False]))):  # fmt: skip
        with pytest.raises(MoleError, match=r"G\.pt needs a start, its loss and a wanted loss"):
            Gpt(view, SMALL)([part._replace(conditions=left)])


def test_a_model_that_cannot_be_is_refused_by_the_configuration() -> None:
    with pytest.raises(ValueError, match=r"model gpt has view chunks, conditions .* found neurons"):
        GeneratorConfig(model="gpt")


def test_ancestral_steps_depend_on_the_seed_of_each_network_alone() -> None:
    assert noise_schedule("linear").config["num_train_timesteps"] == 1000
    noise, seen = torch.randn(3, 5), []

    def denoise(noised: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        seen.append(float(level[0]))
        return noised * 0.5

    whole = reverse(denoise, noise, 10, kind="linear", seeds=[1, 2, 3]).flat
    assert len(seen) == 10 and seen == sorted(seen, reverse=True) and seen[0] == 1
    part = reverse(denoise, noise[1:], 10, kind="linear", seeds=[2, 3]).flat
    assert torch.equal(whole[1:], part)
    assert not torch.equal(reverse(denoise, noise, 10, kind="linear", seeds=[1, 2, 4]).flat[2], whole[2])
    own = torch.stack([_noise(seed, 5) for seed in (1, 2, 3)])
    steps = reverse(lambda noised, level: torch.zeros_like(noised), own, 2, kind="linear", seeds=[1, 2, 3]).flat
    last = noise_schedule("linear")
    last.set_timesteps(2)
    same = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    for step in last.timesteps:  # had the noise between two evaluations been that of the beginning
        own = last.step(torch.zeros_like(own), int(step), own, return_dict=False, generator=same)[0]
    assert not torch.allclose(steps, own)
