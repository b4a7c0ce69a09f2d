"""Nearest class mean, leaving one out."""

import torch
import torch.nn.functional as F

from mole.rank.scorers.protocol import Evidence, scorer


@scorer("class_mean", needs=["classes"], source="nearest class mean, e.g. Mensink et al. 2013", cost="n K D")
def class_mean(evidence: Evidence) -> float:
    """Share of examples whose nearest class mean, by cosine and without the example itself, is that of their class."""
    units, one_hot = F.normalize(evidence.x, dim=1), evidence.one_hot
    sums = one_hot.T @ units  # (K, D)
    near = units @ F.normalize(sums, dim=1).T  # (n, K)
    rest = sums[evidence.member] - units
    alone = rest.square().sum(1) < 1e-18
    own = (units * F.normalize(rest, dim=1)).sum(1).masked_fill(alone, -torch.inf)
    others = near.masked_fill(one_hot.bool(), -torch.inf).max(1).values
    return float((own > others).double().mean())
