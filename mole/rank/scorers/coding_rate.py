"""Coding rates: bits that features need, alone and when the class is known."""

import torch
from torch import Tensor

from mole.rank.scorers.protocol import Evidence, centred, scorer

EPSILON = 1e-4


def rate(x: Tensor) -> float:
    """Nats per example to code (n, D) up to a distortion."""
    n, width = x.shape
    gram = x.T @ x if width <= n else x @ x.T
    return 0.5 * float(torch.logdet(torch.eye(len(gram), dtype=x.dtype) + gram / (max(1, n) * EPSILON)))


def _scaled(evidence: Evidence) -> Tensor:
    """Centred, of mean squared norm 1: otherwise larger features would score higher."""
    x = centred(evidence.x)
    return x / x.square().sum(1).mean().sqrt().clamp_min(1e-12)


@scorer("transrate", needs=["classes"], source="Huang et al. 2022", cost="n D^2 + K D^3")
def transrate(evidence: Evidence) -> float:
    """Coding rate of all features less the mean of those of the classes, each class counting once, as in the authors'
    listing."""
    x, classes = _scaled(evidence), evidence.one_hot.shape[1]
    return rate(x) - sum(rate(x[evidence.member == k]) for k in range(classes)) / classes


@scorer("coding_rate", needs=[], source="Ma et al. 2007", cost="n D^2 + D^3")
def coding_rate(evidence: Evidence) -> float:
    """Coding rate of the centred features, whose scale counts too; no labels."""
    return rate(centred(evidence.x))
