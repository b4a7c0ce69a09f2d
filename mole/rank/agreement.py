"""How well scores order networks.

Dimensions: N networks.
"""

from math import isfinite
from typing import Any

import torch
from scipy.stats import kendalltau, rankdata, weightedtau
from torch import Tensor


def kendall_tau(scores: Tensor, truth: Tensor) -> float:
    """Rank correlation of `scores` and `truth`, both (N,): 1 for the same order, 0 where there is none to compare."""
    if len(scores) < 2:
        return 0.0
    found: Any = kendalltau(scores.numpy(), truth.numpy())
    return float(found.statistic) if isfinite(found.statistic) else 0.0


def weighted_tau(scores: Tensor, truth: Tensor) -> float:
    """The same with hyperbolic weights: the order of the best networks counts most (Vigna 2015)."""
    if len(scores) < 2 or scores.unique().numel() < 2 or truth.unique().numel() < 2:
        return 0.0
    found: Any = weightedtau(scores.double().numpy(), truth.double().numpy())
    return float(found.statistic)


def regret(scores: Tensor, truth: Tensor) -> float:
    """How much of `truth` (N,) is lost by taking the network of the highest score (N,) instead of the best."""
    return float(truth.max() - truth[scores.argmax()])


def with_the_others(answers: Tensor) -> Tensor:
    """How often networks give the answer of another one, (N,): mean over the others and over the examples of `answers`
    (N, n). Networks that are right agree, and errors differ, where they were not trained to make the same ones (Jiang
    et al. 2022)."""
    same = torch.zeros(len(answers), dtype=torch.float64)
    for answer in answers.unique().tolist():
        gave = answers == answer  # (N, n)
        same += (gave * (gave.sum(0) - 1)).sum(1)
    return same / (max(1, len(answers) - 1) * answers.shape[1])


def mean_rank(scores: Tensor) -> Tensor:
    """An ensemble of scorers: minus the mean over scorers (S, N) of the rank of each network, (N,); NaN ranks last."""
    filled = scores.double().nan_to_num(nan=-torch.inf)
    return -torch.from_numpy(rankdata(-filled.numpy(), axis=1)).mean(0)
