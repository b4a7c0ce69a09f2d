import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from torch import nn

from mole.errors import MoleError
from mole.rank import hidden_features, kendall_tau, principal_components, regret, silhouette


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


def test_features_are_what_the_last_layer_reads() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    images = torch.randn(5, 4)
    assert torch.equal(hidden_features(network, images), torch.relu(network[0](images)))
    assert not network[2]._forward_pre_hooks
    with pytest.raises(MoleError, match="ReLU has no linear layer"):
        hidden_features(nn.ReLU(), images)


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
