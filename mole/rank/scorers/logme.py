"""LogME: the logarithm of the evidence that a Bayesian linear model has for the labels."""

import math

import torch

from mole.rank.scorers.protocol import Evidence, scorer

ROUNDS, TOLERANCE = 50, 1e-6


@scorer("logme", needs=["targets"], source="You et al. 2021, fixed point of You et al. 2022", cost="n D^2")
def logme(evidence: Evidence) -> float:
    """Mean over the columns of the labels of the greatest log evidence per example."""
    x, y = evidence.x, evidence.y
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    s = s / s.max().clamp_min(1e-300)  # the evidence is the same at any scale
    n, width, squares = len(x), x.shape[1], s.square()  # (R,)
    found = []
    for target in y.T:
        part = (u.T @ target).square()  # (R,)
        rest = max(float(target.square().sum() - part.sum()), 0.0)
        alpha, beta = 1.0, 1.0
        for _ in range(ROUNDS):
            ratio = alpha / beta
            gamma = float((squares / (squares + ratio)).sum())
            size = float((squares * part / (squares + ratio).square()).sum())  # |m|^2
            wrong = float((part * ratio**2 / (squares + ratio).square()).sum()) + rest
            alpha, beta = gamma / (size + 1e-12), (n - gamma) / (wrong + 1e-12)
            if abs(alpha / beta - ratio) <= TOLERANCE * ratio:
                break
        ratio = alpha / beta
        size = float((squares * part / (squares + ratio).square()).sum())
        wrong = float((part * ratio**2 / (squares + ratio).square()).sum()) + rest
        determinant = float((beta * squares + alpha).log().sum()) + (width - len(s)) * math.log(alpha)
        log = width * math.log(alpha) + n * math.log(beta) - determinant
        found.append((log - beta * wrong - alpha * size - n * math.log(2 * math.pi)) / (2 * n))
    return sum(found) / len(found)
