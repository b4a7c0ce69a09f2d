"""With generators whose answers are known: one that returns its start, one that trains it, one that adds noise."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mole.checkpoints import Zoo, train_population
from mole.config import EvaluateConfig
from mole.evaluation.judge import Exhibits, _as_trained
from mole.evaluation.novelty import PermutationDistance, ratio
from mole.evaluation.nulls import null_models
from mole.evaluation.optimisers import best_curve
from mole.evaluation.transfer import (
    INITIALISATIONS,
    conditional_dispersion,
    initial,
    recursive_passes,
    unseen_architecture,
    unseen_initialisation,
)
from mole.seeding import derived
from mole.tasks import Classification


class Idle:
    """Returns the starts; or, with a spread, the starts with noise."""

    def __init__(self, spread: float = 0.0) -> None:
        self.spread, self.asked = spread, list[Classification | None]()

    def __call__(
        self, starts: Tensor, target_loss: Tensor, *, evaluations: int | None = None,
        seeds: Sequence[int] | None = None, task: Classification | None = None, noise: int = 0,
    ) -> tuple[Tensor, int]:  # fmt: skip
        assert len(target_loss) == len(starts)
        self.asked.append(task)
        return starts + self.spread * torch.randn(starts.shape, generator=torch.Generator().manual_seed(noise)), 1


def test_initialisations_have_the_spread_of_their_definition(toy: Classification) -> None:
    wide = toy.with_config(toy.config.model_copy(update={"width": 400}))
    fan_in, fan_out = 5, 400
    expected = {
        "xavier": (2 / (fan_in + fan_out)) ** 0.5, "kaiming_fan_in": (2 / fan_in) ** 0.5,
        "kaiming_fan_out": (2 / fan_out) ** 0.5,
    }  # fmt: skip
    for scheme, std in expected.items():
        state = wide.spec.unflatten(initial(wide, scheme, 4))
        assert float(state["0.weight"].std()) == pytest.approx(std, rel=0.06), scheme
        assert bool((state["0.bias"] == 0).all()) and not torch.equal(state["0.weight"][0], state["0.weight"][1])
    weight = wide.spec.unflatten(initial(wide, "orthogonal", 1))["0.weight"][0]
    torch.testing.assert_close(weight.T @ weight, torch.eye(5), rtol=1e-4, atol=1e-4)
    before = torch.get_rng_state()
    initial(toy, "xavier", 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_who_returns_the_start_gains_nothing(toy: Classification) -> None:
    for scheme in INITIALISATIONS:
        found = unseen_initialisation(toy, Idle(), 0.1, scheme, 5)
        assert found["accuracy_mean"] == found["start_accuracy_mean"]
    draw = Idle()
    rows = [unseen_architecture(toy, draw, 0.1, width, [toy.architecture], 6) for width in (4, 9)]
    assert [(row["width"], row["in_zoo"]) for row in rows] == [(4, True), (9, False)]
    assert [task.architecture.widths for task in draw.asked if task] == [[5, 4, 3], [5, 9, 3]]
    for row in rows:
        assert row["accuracy_mean"] == row["start_accuracy_mean"] < row["trained_accuracy_mean"]


def test_passes_go_on_from_what_the_last_one_made(toy: Classification) -> None:
    seen: list[float] = []

    def measure(flat: Tensor) -> float:
        seen.append(float((flat - starts).square().mean().sqrt()))
        return seen[-1]

    starts = toy.initial(range(200))
    passes = recursive_passes(measure, Idle(1.0), starts, 0.1, None, 3)
    assert passes == seen and passes == pytest.approx([1, 2**0.5, 3**0.5], rel=0.05)


def test_the_spread_of_draws_is_told_in_units_of_the_optimisers(toy: Classification) -> None:
    starts = toy.initial(range(6))
    assert conditional_dispersion(toy, Idle(), starts, 0.1, 4)["ratio"] == pytest.approx(0, abs=1e-6)
    found = conditional_dispersion(toy, Idle(0.5), starts, 0.1, 8)
    many = starts.repeat_interleave(8, 0)
    trained = train_population(toy, [derived("trial", i) for i in range(48)], [toy.config.steps], initial=many).weights
    spread = trained.unflatten(0, (-1, 8))
    theirs = (spread - spread.mean(1, keepdim=True)).square().sum(-1).mean().sqrt()
    assert found["trained"] == pytest.approx(float(theirs))
    mine = 0.5 * (toy.spec.size * 7 / 8) ** 0.5  # of eight draws about their own mean
    assert (
        found["generated"] == pytest.approx(mine, rel=0.1) and found["ratio"] == found["generated"] / found["trained"]
    )


def test_fine_tuning_begins_where_each_origin_is(toy: Classification) -> None:
    starts = toy.initial(range(5))
    trained = train_population(toy, range(5), [toy.config.steps]).weights
    for flat in (starts, trained):
        curve = best_curve(toy, flat, "adam", [0.003, 0.01], 6)
        assert curve.steps == list(range(7))
        assert curve.score[0] == pytest.approx(float(toy.measure(flat, "test")["accuracy"].mean()))


def test_gaussians_have_the_mean_and_the_spread_of_the_training_networks(toy: Classification) -> None:
    final = torch.randn(300, toy.spec.size, generator=torch.Generator().manual_seed(0)) * 0.1 + 3
    final = final + torch.linspace(-1, 1, 300)[:, None]  # one direction that all weights share
    distance = PermutationDistance(toy.spec)
    found = null_models(distance, final[:200], final, final[:200], noise_distance=1.0, seed=0)
    aligned = distance.align(final, final[0])
    for name in ("gaussian", "pca_gaussian"):
        assert found[name].shape == (200, toy.spec.size)
        torch.testing.assert_close(found[name].mean(0), aligned.mean(0), rtol=0, atol=0.25)
        torch.testing.assert_close(found[name].std(0), aligned.std(0), rtol=0.25, atol=0)
    shared = [float(found[name].mean(1).std() / aligned.mean(1).std()) for name in ("gaussian", "pca_gaussian")]
    assert shared[0] < 0.5 and shared[1] == pytest.approx(1, rel=0.2)  # only components know what weights share


def test_a_ratio_without_a_whole_is_unknown() -> None:
    assert ratio(1.0, 2.0) == 0.5 and ratio(1.0, 0.0) != ratio(1.0, 0.0)


def test_drawn_networks_are_set_beside_the_runs_from_the_same_starts(toy: Classification, toy_zoo: Zoo) -> None:
    training, heldout = toy_zoo.split_by_run(4)
    ends = heldout.read(heldout.last)

    class Trained(Idle):
        """Returns what became of the starts, or one and the same of these networks."""

        def __call__(self, starts: Tensor, target_loss: Tensor, **_: object) -> tuple[Tensor, int]:
            assert torch.equal(starts, heldout.read(heldout.first)) and torch.equal(
                target_loss, heldout.loss[heldout.last]
            )
            return (ends + self.spread * (ends[:1] - ends)), 1

    exact = _as_trained(Exhibits(toy, training, heldout, Trained(), EvaluateConfig(), seed=0))
    assert exact["dispersion"] == exact["diversity"] == 1
    assert exact["accuracy_mean"] == exact["trained_accuracy_mean"] and exact["accuracy_std"] > 0
    scores = toy.measure(ends, "test")["accuracy"]
    assert exact["accuracy_std"] == pytest.approx(float(scores.std()), rel=1e-6)
    half = _as_trained(Exhibits(toy, training, heldout, Trained(0.5), EvaluateConfig(), seed=0))
    assert half["dispersion"] == pytest.approx(0.5, rel=1e-4)
    one = _as_trained(Exhibits(toy, training, heldout, Trained(1.0), EvaluateConfig(), seed=0))
    assert one["accuracy_std"] == 0 and one["diversity"] == pytest.approx(0, abs=1e-6)
