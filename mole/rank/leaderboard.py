"""Networks in order of how well their features separate the classes (neuralRank, Desai et al.).

Dimensions: n images, N networks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from mole.rank.features import hidden_features, principal_components
from mole.rank.silhouette import silhouette


@dataclass(frozen=True)
class Ranking:
    """Scores (N,) in the order the networks were given, and the order from best to worst."""

    scores: Tensor
    order: list[int]

    @classmethod
    def of(cls, scores: Tensor) -> "Ranking":
        """From scores alone; equal ones stay in the order they were given."""
        return cls(scores, sorted(range(len(scores)), key=lambda index: -float(scores[index])))


def rank_networks(networks: Iterable[nn.Module], images: Tensor, labels: Tensor, *, components: int = 10) -> Ranking:
    """Silhouette of each network's hidden features after PCA; higher is better.

    Args:
        networks: any networks that take `images` and end in a linear layer.
        images: labelled target images.
        labels: (n,) int64.
        components: principal components kept; 0 keeps the features as they are.
    """
    scores = []
    for network in networks:
        features = principal_components(hidden_features(network, images), components)
        scores.append(silhouette(features, labels))
    return Ranking.of(torch.tensor(scores, dtype=torch.float64))


def kendall_tau(scores: Tensor, truth: Tensor) -> float:
    """Rank correlation of `scores` and `truth`, both (N,): 1 for the same order, 0 where there is none to compare."""
    if len(scores) < 2:
        return 0.0
    found: Any = kendalltau(scores.numpy(), truth.numpy())
    return float(found.statistic) if isfinite(found.statistic) else 0.0


def regret(scores: Tensor, truth: Tensor) -> float:
    """How much of `truth` (N,) is lost by taking the network of the highest score (N,) instead of the best."""
    return float(truth.max() - truth[scores.argmax()])
