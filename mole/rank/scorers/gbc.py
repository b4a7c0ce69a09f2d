"""Gaussian Bhattacharyya coefficient: how little the classes overlap."""

import torch

from mole.rank.features import principal_components
from mole.rank.scorers.protocol import Evidence, scorer

COMPONENTS = 64


@scorer("gbc", needs=["classes"], source="Pandy et al. 2022, spherical", cost="n D^2 (PCA)")
def gbc(evidence: Evidence) -> float:
    """Minus the summed Bhattacharyya coefficients of all pairs of classes, as round Gaussians after PCA to 64."""
    x = principal_components(evidence.x, min(COMPONENTS, evidence.x.shape[1]))
    counts = evidence.one_hot.sum(0)
    means = evidence.one_hot.T @ x / counts[:, None]  # (K, D)
    wide = evidence.one_hot.T @ (x - means[evidence.member]).square().mean(1) / counts  # (K,)
    wide = wide + 1e-12 * x.square().mean().clamp_min(1e-300)
    middle = (wide[:, None] + wide) / 2
    apart = (means[:, None] - means).square().sum(-1) / (8 * middle)
    volume = 0.5 * x.shape[1] * (middle.log() - 0.5 * (wide.log()[:, None] + wide.log()))
    pairs = torch.triu(torch.exp(-apart - volume), 1)
    return -float(pairs.sum())
