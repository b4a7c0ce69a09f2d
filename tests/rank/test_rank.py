import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from torch import nn

from mole.errors import MoleError
from mole.rank import kendall_tau, principal_components, regret, see, silhouette, silhouette_of
from mole.rank.silhouette import Metric


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 40), st.integers(1, 8), st.integers(2, 5), st.integers(0, 10_000))
def test_it_equals_scikit_learn(points: int, features: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(points, features)), rng.integers(classes, size=points)
    y[:classes] = range(classes)
    expected = silhouette_score(x, y, metric="cosine") if len(np.unique(y)) < points else 0
    assert silhouette(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, abs=1e-10)


def test_four_points_by_hand() -> None:
    x = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3]])
    assert silhouette(x, torch.tensor([0, 0, 1, 1])) == 1
    # each point: 1 from its own partner, (0 + 1) / 2 from the other class: (0.5 - 1) / 1
    assert silhouette(x, torch.tensor([0, 1, 0, 1])) == pytest.approx(-0.5)


def test_lone_and_zero_points() -> None:
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert silhouette(x, torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)  # the lone point scores 0
    assert silhouette(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])) == 0


def test_what_it_cannot_score_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 points are NaN"):
        silhouette(torch.tensor([[1.0], [float("nan")], [2]]), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="at least two classes; found 1"):
        silhouette(torch.randn(3, 2), torch.zeros(3).long())


def features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return see(network, [images]).features["last hidden"]


def test_features_are_what_the_last_layer_reads() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    images = torch.randn(5, 4)
    assert torch.equal(features(network, images), torch.relu(network[0](images)))
    assert not network[2]._forward_pre_hooks and network.training
    with pytest.raises(MoleError, match="no layer '9'"):
        see(network, [images], ["0", "9"])
    assert not network[0]._forward_hooks
    with pytest.raises(MoleError, match="no layer of ReLU is linear"):
        features(nn.ReLU(), images)


def test_features_are_those_before_a_layer_that_works_in_place() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    images = torch.randn(5, 4)
    found = see(network, [images], ["0"]).features["0"]
    assert torch.equal(found, network[0](images)) and bool((found < 0).any())


def test_the_last_layer_is_the_one_that_runs_last() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.spare = nn.Linear(6, 3), nn.Linear(4, 6), nn.Linear(9, 9)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.body(images)))

    network, images = Unused(), torch.randn(5, 4)
    assert torch.equal(features(network, images), torch.relu(network.body(images)))
    with pytest.raises(MoleError, match="layer spare was not run"):
        see(network, [images], ["spare"])


def test_tokens_folded_into_the_batch_are_not_examples() -> None:
    folding = nn.Sequential(nn.Linear(4, 6), nn.Flatten(0, 1), nn.Linear(6, 3), nn.Unflatten(0, (-1, 5)))
    with pytest.raises(MoleError, match="layer last hidden gives 10 rows for 2 inputs"):
        features(folding, torch.randn(2, 5, 4))


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_in_parts_it_is_the_same(metric: Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator, dtype=torch.float64) + 5, torch.arange(60) % 3
    parts = list(zip(x.split(17), y.split(17), strict=True))
    whole = silhouette(x, y, metric=metric)
    assert silhouette_of(lambda: parts, 3, metric=metric) == pytest.approx(whole, abs=1e-12)
    expected = silhouette_score(x.numpy(), y.numpy(), metric=metric)
    assert whole == pytest.approx(expected, abs=1e-10)
    once = iter(parts)
    with pytest.raises(ValueError, match="the first reading gave 60 points, the second 0"):
        silhouette_of(lambda: once, 3, metric=metric)
    with pytest.raises(ValueError, match="labels from 0 to 2; legal is 0 to 1"):
        silhouette_of(lambda: parts, 2, metric=metric)


def test_far_from_the_origin_no_digits_are_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator, dtype=torch.float64), torch.arange(60) % 3
    found = silhouette(x + 1e7, y, metric="sqeuclidean")
    assert found == pytest.approx(silhouette(x, y, metric="sqeuclidean"), abs=1e-6)


def test_the_centroid_variant_by_hand() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    # each point: 1 from its partner; the other class's mean points the opposite way of (1, 1): 1 + 1 / sqrt(2)
    expected = 1 - 1 / (1 + 0.5**0.5)
    assert silhouette(x, torch.tensor([0, 0, 1, 1]), variant="centroid") == pytest.approx(expected)


def test_components_equal_scikit_learns_up_to_sign() -> None:
    x = torch.randn(30, 6, dtype=torch.float64)
    expected = PCA(3, svd_solver="full").fit_transform(x.numpy())
    torch.testing.assert_close(principal_components(x, 3).abs(), torch.from_numpy(expected).abs())
    assert principal_components(x, 0) is x


def test_tau_and_regret_by_hand() -> None:
    scores, truth = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.7, 0.5, 0.9])
    assert kendall_tau(scores, truth) == pytest.approx(1 / 3)
    assert regret(scores, truth) == pytest.approx(0.2)
    assert kendall_tau(torch.ones(3), truth) == 0
