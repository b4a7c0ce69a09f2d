"""Ridge regression, every example predicted by the others."""

import torch

from mole.rank.scorers.protocol import Evidence, centred, scorer

PENALTIES = [10.0**power for power in range(-6, 3)]


@scorer("ridge", needs=["targets"], source="leave-one-out in closed form, Allen 1974", cost="n D^2")
def ridge(evidence: Evidence) -> float:
    """R2 of the labels (one column per class) at the best of nine penalties; 1 is perfect, 0 is the mean."""
    x, y = centred(evidence.x), centred(evidence.y)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    n, squares, seen = len(x), s.square(), u.T @ y
    best = -torch.inf
    for penalty in PENALTIES:
        shrunk = squares / (squares + penalty * max(1e-300, float(squares.max())))
        leverage = (u.square() * shrunk).sum(1, keepdim=True) + 1 / n  # the mean is fitted too
        left = (y - u @ (shrunk[:, None] * seen)) / (1 - leverage).clamp_min(1e-9)
        best = max(best, float(1 - left.square().sum() / y.square().sum().clamp_min(1e-300)))
    return best
