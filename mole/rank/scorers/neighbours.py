"""k nearest neighbours, leaving one out."""

import torch
import torch.nn.functional as F

from mole.rank.scorers.protocol import Evidence, few, scorer

NEIGHBOURS, MOST = 5, 5000


@scorer("knn", needs=["classes"], source="Cover and Hart 1967", cost="n^2 D, n at most 5,000")
def knn(evidence: Evidence) -> float:
    """Share of examples that most of their 5 nearest others, by cosine, are of the class of; ties count in part."""
    evidence = few(evidence, MOST)
    units = F.normalize(evidence.x, dim=1).float()
    count, right = min(NEIGHBOURS, len(units) - 1), 0.0
    for low in range(0, len(units), 1024):
        near = units[low : low + 1024] @ units.T
        rows = torch.arange(len(near))
        near[rows, low + rows] = -torch.inf
        votes = evidence.one_hot[near.topk(count, 1).indices].sum(1)  # (b, K)
        best = votes == votes.max(1, keepdim=True).values
        own = best.gather(1, evidence.member[low : low + 1024, None])[:, 0]
        right += float((own / best.sum(1)).sum())
    return right / len(units)
