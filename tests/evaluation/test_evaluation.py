import itertools

import pytest
import torch

from mole.evaluation import (
    OptimiserCurve,
    PermutationDistance,
    alignment,
    best_curve,
    dispersion,
    max_wrong_iou,
    null_models,
    steps_to_match,
)
from mole.evaluation.alignment import prompts
from mole.tasks import Classification


def test_doing_nothing_scores_the_published_minus_2_71() -> None:
    asked = prompts(0.1, torch.tensor([2.3, 2.0]), 20)
    assert asked[0, 0] == pytest.approx(0.1) and asked[1, -1] == pytest.approx(2.0)
    start = torch.tensor([2.3, 2.0])
    scores = alignment(asked, start[:, None].expand(-1, 20), start)
    assert scores["noop_r2"] == pytest.approx(-2.71, abs=0.005)
    assert scores["r2_mean"] == pytest.approx(scores["noop_r2"])
    assert scores["spearman"] == 0 and scores["slope"] == pytest.approx(0, abs=1e-6)


def test_alignment_by_hand() -> None:
    asked = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    achieved = torch.tensor([[1.0, 2.0, 3.0], [1.5, 2.5, 3.5]])
    scores = alignment(asked, achieved, torch.tensor([2.0, 2.0]))
    # second row: residual 3 * 0.25 over total 2
    assert scores["r2_mean"] == pytest.approx((1 + (1 - 0.75 / 2)) / 2)
    assert scores["spearman"] == pytest.approx(1) and scores["slope"] == pytest.approx(1)
    assert scores["noop_r2"] == pytest.approx(0)
    assert (scores["prompts"], scores["starts"]) == (3, 2)


def test_a_permuted_copy_is_no_new_network(toy: Classification) -> None:
    flat = toy.initial([1, 2, 3])
    orders = torch.tensor([[1, 0, 3, 2], [3, 2, 1, 0], [2, 0, 1, 3]])
    copies = torch.stack([toy.spec.permute(f, {"0": order}) for f, order in zip(flat, orders, strict=True)])
    distance = PermutationDistance(toy.spec)
    assert distance.nearest(copies, flat).max() < 1e-5
    assert (copies - flat).norm(dim=1).min() > 0.1
    torch.testing.assert_close(distance.align(copies[0][None], flat[0])[0], flat[0])


def test_the_distance_is_the_smallest_over_all_orders(toy: Classification) -> None:
    first, second = toy.initial([1, 2]), toy.initial([8, 9])
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    brute = torch.tensor(
        [[min((toy.spec.permute(a, {"0": o}) - b).norm() for o in orders) for b in second] for a in first]
    )
    torch.testing.assert_close(PermutationDistance(toy.spec).pairwise(first, second), brute.double(), rtol=1e-5, atol=0)


def test_leaving_oneself_out(toy: Classification) -> None:
    flat = toy.initial([1, 2, 3])
    distance = PermutationDistance(toy.spec)
    index = torch.arange(3)
    assert distance.nearest(flat, flat).max() < 1e-5
    without = distance.nearest(flat, flat, exclude=index)
    pairs = distance.pairwise(flat, flat) + torch.eye(3) * 1e9
    torch.testing.assert_close(without, pairs.min(1).values)


def test_wrong_iou_by_hand() -> None:
    wrong = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    training = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    assert max_wrong_iou(wrong, training).tolist() == pytest.approx([2 / 3, 0])
    assert max_wrong_iou(wrong[1:], wrong[1:]).tolist() == [1]
    assert max_wrong_iou(training, training, exclude=torch.arange(2)).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_dispersion_compares_spreads() -> None:
    training = torch.randn(500, 6)
    assert dispersion(training * 0.5 + 3, training) == pytest.approx(0.5, rel=1e-4)
    assert dispersion(training[:1].expand(9, -1), training) == pytest.approx(0, abs=1e-6)


def test_null_models_are_what_they_say(toy: Classification) -> None:
    final, starts = toy.initial(range(20)), toy.initial(range(50, 53))
    nearest, distance = toy.initial(range(30, 33)), PermutationDistance(toy.spec)
    models = null_models(distance, starts, final, nearest, noise_distance=2.0, seed=0)
    assert all(flat.shape == starts.shape for flat in models.values())
    assert torch.equal(models["start"], starts)
    assert torch.equal(models["nearest_prompt_retrieval"], nearest)
    assert (models["noise"][:, None] - final).norm(dim=-1).min(1).values.tolist() == pytest.approx([2] * 3, rel=1e-5)
    assert torch.equal(
        models["mean_of_16_aligned"],
        null_models(distance, starts, final, nearest, noise_distance=2.0, seed=0)["mean_of_16_aligned"],
    )


def test_optimisers_are_compared_at_their_best_rate(toy: Classification) -> None:
    starts = toy.initial([1, 2])
    curve = best_curve(toy, starts, "adam", [1e-5, 0.03, 1e9], 20)
    assert curve.learning_rate == 0.03 and curve.steps[0] == 0 and curve.steps[-1] == 20
    assert curve.score[-1] > curve.score[0]


def test_steps_to_match() -> None:
    curve = OptimiserCurve("adam", 0.1, [0, 1, 2, 5], [2, 1, 1, 1], [0.1, 0.5, 0.8, 0.7])
    assert [steps_to_match(curve, a) for a in (0.05, 0.6, 0.8, 0.9)] == [0, 2, 2, None]
