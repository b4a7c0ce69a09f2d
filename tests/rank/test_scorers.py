import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from mole.config.sections import ScorerName
from mole.errors import MoleError
from mole.rank import REGISTRY, Evidence, find_scorers
from mole.rank.scorers.ridge import PENALTIES

from .conformance import check_scorer, evidence


def test_the_configuration_knows_every_scorer() -> None:
    assert set(get_args(ScorerName)) == set(REGISTRY)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_scorer_conforms(name: str) -> None:
    check_scorer(REGISTRY[name])


def score(name: str, given: Evidence) -> float:
    return REGISTRY[name](given)


def test_class_means_leave_the_example_out() -> None:
    """Two classes of two: the second example of class 0 lies with class 1, and its own class is then the other's."""
    x = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.0, 1.1]])
    given = Evidence(x, classes=torch.tensor([0, 0, 1, 1]))
    assert score("class_mean", given) == 0.5  # the first has only the second left, which points elsewhere
    alone = Evidence(x, classes=torch.tensor([0, 1, 1, 1]))
    assert score("class_mean", alone) == 0.75  # one alone in its class cannot be right


def test_h_score_by_hand() -> None:
    """One feature: the variance between classes over all variance: means -1, 1, within 1."""
    x = torch.tensor([[-2.0], [0.0], [0.0], [2.0]])
    assert score("h_score", Evidence(x, classes=torch.tensor([0, 0, 1, 1]))) == pytest.approx(1 / 2)


def test_neighbours_are_those_of_scikit_learn() -> None:
    given = evidence(1.0)
    assert given.classes is not None
    units = torch.nn.functional.normalize(given.features, dim=1).numpy()
    model = KNeighborsClassifier(5)
    votes = cross_val_predict(model, units, given.classes.numpy(), cv=LeaveOneOut(), method="predict_proba")
    best = votes == votes.max(1, keepdims=True)
    expected = (best[np.arange(len(units)), given.classes.numpy()] / best.sum(1)).mean()
    assert score("knn", given) == pytest.approx(expected)


def test_ridge_is_left_out_one_by_one() -> None:
    given = evidence(1.0, examples=40)
    x, y = given.x.numpy(), given.y.numpy()
    largest = float(torch.linalg.svdvals(given.x - given.x.mean(0)).max() ** 2)
    expected = max(
        r2_score(y.ravel(), cross_val_predict(Ridge(alpha=p * largest), x, y, cv=LeaveOneOut()).ravel() * 1.0)
        for p in PENALTIES
    )
    assert score("ridge", given) == pytest.approx(expected, abs=0.02)  # penalties of 40 and of 39 examples


def test_logme_is_the_greatest_evidence_of_a_linear_model() -> None:
    given = evidence(1.0, examples=30, features=4)
    x, target = given.x.numpy(), given.y[:, 0].numpy()

    def log_evidence(alpha: float, beta: float) -> float:
        covariance = np.eye(30) / beta + x @ x.T / alpha
        return float(multivariate_normal(np.zeros(30), covariance).logpdf(target)) / 30

    grid = np.exp(np.linspace(-3, 4, 60))
    best = max(log_evidence(alpha, beta) for alpha in grid for beta in grid)
    one = Evidence(given.features, targets=given.y[:, :1])
    assert score("logme", one) == pytest.approx(best, abs=1e-3)


def test_scores_of_the_networks_own_answers_by_hand() -> None:
    """Two answers, each sure; the first always right, the second right half of the time."""
    sure = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 50.0], [0.0, 50.0]])
    given = Evidence(torch.randn(4, 2), sure, classes=torch.tensor([0, 0, 0, 1]))
    assert score("nce", given) == pytest.approx(0.5 * math.log(0.5))
    assert score("leep", given) == pytest.approx(0.5 * math.log(0.5))
    assert score("minus_loss", given) == pytest.approx(-50 / 4)
    assert score("mutual_information", given) == pytest.approx(math.log(2))
    assert score("confidence", given) == pytest.approx(1.0)
    assert score("nuclear_norm", given) == pytest.approx(1.0)


def test_two_round_gaussians_overlap_as_the_formula_says() -> None:
    x = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])  # means -2 and 2, variances 1
    found = score("gbc", Evidence(x, classes=torch.tensor([0, 0, 1, 1])))
    assert found == pytest.approx(-math.exp(-16 / 8))


def test_numbers_may_be_told_instead_of_classes() -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    easy, hard = x @ torch.tensor([1.0, -2.0, 0.5]), torch.randn(60, generator=torch.Generator().manual_seed(1))
    for name in ("ridge", "logme"):
        assert score(name, Evidence(x, targets=easy)) > score(name, Evidence(x, targets=hard))


def test_what_cannot_be_scored_is_said() -> None:
    one = Evidence(torch.randn(5, 2), classes=torch.zeros(5).long())
    with pytest.raises(MoleError, match="class_mean needs at least two classes; found one"):
        score("class_mean", one)
    with pytest.raises(MoleError, match="leep needs outputs"):
        score("leep", Evidence(torch.randn(5, 2), classes=torch.arange(5) % 2))
    with pytest.raises(MoleError, match="knn needs classes"):
        score("knn", Evidence(torch.randn(5, 2)))
    with pytest.raises(MoleError, match="no scorer nuralrank; nearest: neuralrank"):
        find_scorers(["nuralrank"])
    few = Evidence(torch.randn(5, 2), classes=torch.tensor([0, 0, 0, 0, 1]))
    with pytest.raises(MoleError, match="linear_probe needs 3 examples of every class; found 1"):
        score("linear_probe", few)
