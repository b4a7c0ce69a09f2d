from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from mole.config import GeneratorConfig
from mole.diffusion.codec import Codec
from mole.diffusion.common import PACE
from mole.diffusion.conditions import Conditions, SetEncoder, fourier
from mole.diffusion.denoiser import Denoiser, Networks
from mole.diffusion.process import noise_level, noise_schedule, reverse
from mole.diffusion.roles import Roles, ranks
from mole.errors import MoleError
from mole.representations import View, ViewName, WeightSpec, make_view, neuron_view
from mole.representations.structure import word
from mole.tasks import Classification

from ..representations.architectures import LIBRARIES, TORCH

CONFIG = GeneratorConfig(width=16, layers=2, heads=2)
COMMON = CONFIG.model_copy(update={"common": True})


def conditions(size: int) -> Conditions:
    given = {"start_loss": torch.linspace(0.5, 2.3, size), "target_loss": torch.linspace(0.1, 1, size)}
    return Conditions.of(CONFIG.conditions, size, given)


def shaken(view: View, config: GeneratorConfig = CONFIG) -> Denoiser:
    """A denoiser with random weights everywhere: zero gates would make any test of it vacuous."""
    denoiser = Denoiser([view], config, numbers=5).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        if denoiser.common is not None:
            denoiser.common.values /= PACE
    return denoiser


def test_an_untrained_model_returns_its_start_exactly(toy: Classification) -> None:
    view = neuron_view(toy.spec)
    noised, start = torch.randn(2, 3, toy.spec.size)
    assert torch.equal(once(Denoiser([view], CONFIG), view, noised, start, torch.ones(3), conditions(3)), start)


def once(
    denoiser: Denoiser, view: View, noised: torch.Tensor, start: torch.Tensor, level: torch.Tensor, asked: Conditions
) -> torch.Tensor:
    """One evaluation of networks of one layout."""
    return denoiser([Networks(view, noised, start, level, asked)])[0]


def commutes(view: View, config: GeneratorConfig, spec: WeightSpec, seed: int) -> tuple[float, float]:
    """Difference between the denoised permuted networks and the permuted denoised ones, in parts of the largest weight;
    and if only one is permuted."""
    generator, denoiser = torch.Generator().manual_seed(seed), shaken(view, config)
    noised, start = torch.randn(2, 3, spec.size, generator=generator).double()
    element, level = spec.random_element(generator), torch.tensor([0.2, 0.7, 1.0]).double()
    asked = conditions(3).double()
    with torch.no_grad():
        plain = element.act(once(denoiser, view, noised, start, level, asked))
        moved = once(denoiser, view, element.act(noised), element.act(start), level, asked)
        only_one = once(denoiser, view, element.act(noised), start, level, asked)
    largest = plain.abs().max()
    return float((moved - plain).abs().max() / largest), float((only_one - plain).abs().max() / largest)


@pytest.mark.parametrize("view", ["neurons", "classes", "graph"])
@pytest.mark.parametrize("name", ["mlp", "convnet", "residual", "dense", "lstm", "gated", "attention"])
def test_permuting_both_inputs_permutes_the_output(name: str, view: ViewName) -> None:
    spec = WeightSpec.of(*TORCH[name]())
    if (name, view) == ("gated", "classes"):  # its outputs are tied to its inputs
        with pytest.raises(MoleError, match="no output of this network was found; legal: neurons, graph"):
            make_view(view, spec)
        return
    for config in (CONFIG,) if view == "graph" or name == "attention" else (CONFIG, COMMON):
        both, one = commutes(make_view(view, spec), config, spec, 0)
        assert both < 1e-12 and one > 1e-2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_position_breaks_the_symmetry_and_chunks_have_none(toy: Classification, seed: int) -> None:
    plain = CONFIG.model_copy(update={"symmetry": "none"})
    assert commutes(neuron_view(toy.spec), CONFIG, toy.spec, seed)[0] < 1e-12
    for view in ("neurons", "graph", "chunks"):
        assert commutes(make_view(view, toy.spec), plain, toy.spec, seed)[0] > 1e-2, view


def test_the_scheduler_commutes_with_the_group(toy: Classification) -> None:
    element = toy.spec.random_element(3)
    noise, start = torch.randn(2, 3, toy.spec.size).double()
    view, asked = neuron_view(toy.spec), conditions(3).double()
    denoiser = shaken(view)

    def drawn(noise: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return reverse(lambda noised, level: once(denoiser, view, noised, start, level, asked), noise, 4).flat

    with torch.no_grad():
        plain, moved = drawn(noise, start), drawn(element.act(noise), element.act(start))
    torch.testing.assert_close(moved, element.act(plain), rtol=1e-6, atol=1e-6)


DATA = GeneratorConfig(
    width=16, layers=2, heads=2, view="classes", data=True,
    conditions=["start_loss", "target_loss", "target_accuracy", "optimizer", "steps"],
)  # fmt: skip


def told(toy: Classification) -> Conditions:
    """Everything that can be told, of two networks."""
    generator = torch.Generator().manual_seed(1)
    asked = {"start_loss": 2.0, "target_loss": 0.5, "target_accuracy": 0.9, "optimizer": 1.0, "steps": 100.0}
    images = torch.randn(2, 6, 5, generator=generator)
    labels = torch.tensor([[0, 0, 1, 1, 2, 2], [2, 1, 0, 2, 1, 0]])
    gradient = torch.randn(2, toy.spec.size, generator=generator)
    plain = Conditions.of(DATA.conditions, 2, asked)
    return Conditions(plain.scalars, plain.started, images, labels, gradient).double()


def test_every_condition_and_input_reaches_the_output(toy: Classification) -> None:
    view = make_view("classes", toy.spec)
    denoiser = shaken(view, DATA)
    noised, start = torch.randn(2, 2, toy.spec.size).double()
    level, asked = torch.full((2,), 0.5).double(), told(toy)
    assert asked.images is not None and asked.labels is not None and asked.gradient is not None
    with torch.no_grad():
        base = once(denoiser, view, noised, start, level, asked)
        changed = [(noised * 0.5, start, level, asked), (noised, start * 0.5, level, asked)]
        changed.append((noised, start, level * 0.5, asked))
        for column in range(len(DATA.conditions)):
            other, forgotten = asked.scalars.clone(), torch.zeros(asked.scalars.shape, dtype=torch.bool)
            other[:, column] *= 0.5
            forgotten[:, column] = True
            changed.append((noised, start, level, replace(asked, scalars=other)))
            changed.append((noised, start, level, asked.without(forgotten)))
        changed.append((noised, start, level, replace(asked, images=asked.images * 0.5)))
        changed.append((noised, start, level, replace(asked, labels=asked.labels.roll(1, 1))))
        changed.append((noised, start, level, replace(asked, gradient=asked.gradient * 0.5)))
        changed.append((noised, start, level, asked.without(data=torch.ones(2, dtype=torch.bool))))
        changed.append((noised, start, level, asked.without(started=torch.ones(2, dtype=torch.bool))))
        for number, arguments in enumerate(changed):
            assert (once(denoiser, view, *arguments) - base).abs().max() > 1e-4, number


def test_the_order_of_a_support_set_means_nothing_and_names_of_classes_go_with_their_examples(
    toy: Classification,
) -> None:
    view, asked = make_view("classes", toy.spec), told(toy)
    assert asked.images is not None and asked.labels is not None and asked.gradient is not None
    denoiser, level = shaken(view, DATA), torch.ones(2).double()
    noised, start = torch.randn(2, 2, toy.spec.size).double()
    order, names = torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([2, 0, 1])

    def renamed(flat: torch.Tensor) -> torch.Tensor:
        """Output c becomes output names[c]."""
        state = toy.spec.unflatten(flat)
        back = names.argsort()
        moved = {**state, "2.weight": state["2.weight"][:, back], "2.bias": state["2.bias"][:, back]}
        return toy.spec.flatten(moved).double()

    with torch.no_grad():
        base = once(denoiser, view, noised, start, level, asked)
        shuffled = replace(asked, images=asked.images[:, order], labels=asked.labels[:, order])
        torch.testing.assert_close(once(denoiser, view, noised, start, level, shuffled), base)
        called = replace(asked, labels=names[asked.labels], gradient=renamed(asked.gradient))
        found = once(denoiser, view, renamed(noised), renamed(start), level, called)
        torch.testing.assert_close(found, renamed(base))
        untold = torch.ones(2, dtype=torch.bool)  # without examples an output is its number
        plain = once(denoiser, view, noised, start, level, asked.without(data=untold))
        found = once(denoiser, view, renamed(noised), renamed(start), level, called.without(data=untold))
        assert (found - renamed(plain)).abs().max() > 1e-3


def test_a_class_without_examples_has_a_vector_of_its_own() -> None:
    encoder = SetEncoder(5, 8)
    images, labels = torch.randn(1, 4, 5), torch.tensor([[0, 2, 2, -1]])
    found = encoder(images, labels, 3)
    assert torch.equal(found[0, 1], encoder.empty) and not torch.equal(found[0, 0], encoder.empty)
    torch.testing.assert_close(encoder(images[:, :3], labels[:, :3], 3), found)  # label -1 is no example


def mlp(*widths: int) -> View:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return neuron_view(WeightSpec.of(nn.Sequential(*layers[:-1])))


def test_the_starts_numbers_on_edges_can_be_kept_in_part_or_left() -> None:
    view = mlp(3, 4, 5, 2)
    (edges,) = view.edges
    denoiser = Denoiser([view], CONFIG)
    (write,) = denoiser.write_edges.values()
    nn.init.zeros_(write.there.weight)
    nn.init.ones_(write.there.bias)
    write.here.bias.data[-CONFIG.width :] = -0.75 / CONFIG.width**0.5  # the share that is kept changes by so much
    noised, start = torch.randn(2, 3, view.spec.size)
    change = once(denoiser, view, noised, start, torch.ones(3), conditions(3)) - start
    there = edges.places.flatten()
    torch.testing.assert_close(change[:, there], -0.75 * start[:, there])
    change[:, there] = 0
    assert len(there) == 4 * 5 and not change.any()


def test_networks_of_several_widths_and_depths_in_one_batch_do_not_see_each_other() -> None:
    views = [mlp(5, 4, 3), mlp(5, 9, 3), mlp(5, 6, 7, 3)]
    denoiser = Denoiser(views, CONFIG).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        batch = [Networks(view, *torch.randn(2, 2, view.spec.size, generator=generator).double(),
                          torch.tensor([0.3, 1.0]).double(), conditions(2).double()) for view in views]  # fmt: skip
        for alone, together in zip([denoiser([part])[0] for part in batch], denoiser(batch), strict=True):
            torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


def test_a_width_that_was_never_seen_will_do_and_other_inputs_will_not() -> None:
    denoiser = Denoiser([mlp(5, 4, 3)], CONFIG)
    denoiser.knows(mlp(5, 40, 3))
    with pytest.raises(MoleError, match=r"has seen no linear-weight\[\*,6\]_6; it knows .*linear-weight\[\*,5\]_5"):
        denoiser.knows(mlp(6, 4, 3))
    with pytest.raises(MoleError, match=r"has seen no linear-weight\[\*,\*\]_1"):
        denoiser.knows(mlp(5, 4, 4, 3))


def test_fourier_features_tell_near_losses_apart() -> None:
    features = fourier(torch.tensor([0.1, 0.11]).log())
    assert features.shape == (2, 64) and (features[0] - features[1]).norm() > 0.5


def test_the_last_level_is_pure_noise_and_one_call_gives_the_prediction() -> None:
    schedule = noise_schedule()
    assert schedule.alphas_cumprod[-1] == 0 and noise_level(schedule, torch.tensor(999)) == 1
    seen: list[torch.Tensor] = []

    noise, start = torch.randn(2, 3, 5)

    def denoise(noised: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        seen.append(level)
        return start + 1

    drawn = reverse(denoise, noise, 1)
    assert drawn.evaluations == len(seen) == 1 and seen[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(drawn.flat, start + 1)


@pytest.mark.parametrize("evaluations", [2, 4, 20])
def test_more_calls_end_at_the_prediction_too(evaluations: int) -> None:
    levels: list[float] = []

    noise, start = torch.randn(2, 3, 5)

    def denoise(noised: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        levels.append(float(level[0]))
        return start

    drawn = reverse(denoise, noise, evaluations)
    assert drawn.evaluations == evaluations and levels == sorted(levels, reverse=True) and levels[0] == 1
    torch.testing.assert_close(drawn.flat, start, rtol=1e-5, atol=1e-5)


def test_a_view_that_is_not_equivariant_is_refused_where_that_is_asked_for() -> None:
    spec = WeightSpec.of(*LIBRARIES["torch_geometric"]["gat"]())
    codec = Codec(spec, CONFIG, {word(entry): 1.0 for entry in spec.entries})
    with pytest.raises(
        MoleError, match=r"view neurons of this network is not \(first\.att_src, first\.att_dst\); legal"
    ):
        _ = codec.view


def test_neurons_are_ranked_by_their_start_whatever_the_noise(toy: Classification) -> None:
    view = neuron_view(toy.spec)
    denoiser, seen = shaken(view), list[torch.Tensor]()
    (roles,) = denoiser.roles.values()
    roles.register_forward_hook(lambda _, ranks, __: seen.append(ranks[0].argsort(-1)))
    start, *noises = torch.randn(3, 2, toy.spec.size, generator=torch.Generator().manual_seed(0)).double()
    ones, asked = torch.ones(2).double(), conditions(2).double()
    (hidden,) = (kind for kind in range(len(view.nodes)) if not view.nodes[kind].ordered)

    def means(flat: torch.Tensor) -> torch.Tensor:
        return view.encode(flat).nodes[hidden].mean(-1).argsort(-1)

    with torch.no_grad():
        told = [once(denoiser, view, noise, start, ones, asked) for noise in noises]
        once(denoiser, view, noises[0], torch.zeros_like(start), ones, asked)
        for parameter in roles.parameters():
            parameter.zero_()
        untold = once(denoiser, view, noises[0], start, ones, asked)
    assert torch.equal(seen[0], means(start)) and torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], means(noises[0]))
    assert float((untold - told[0]).abs().max()) > 1e-3


def test_gradients_of_roles_do_not_depend_on_how_threads_race() -> None:
    layer, threads = Roles(10, 144), torch.get_num_threads()
    numbers, upstream = ranks(torch.rand(64, 10), torch.rand(64, 10)), torch.randn(64, 10, 144)
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad(layer(numbers), layer.values, upstream)[0] for _ in range(50)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
