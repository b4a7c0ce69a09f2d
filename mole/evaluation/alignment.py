"""Prompt alignment: does a generated network have the loss that was asked for? (Peebles et al. 2022)

Dimensions: S starts, Q prompts.
"""

from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor


def alignment(prompted: Tensor, achieved: Tensor, start: Tensor) -> dict[str, float | int]:
    """Scores of obedience, each the mean over starts.

    Args:
        prompted: (S, Q), losses asked for; several different ones per start.
        achieved: (S, Q), losses reached; a start with one that is not finite is left out.
        start: (S,), losses of the start networks, measured as `achieved` is.

    Returns:
        `r2_mean` (1 is perfect), `spearman`, `slope` of the least-squares line (1 is perfect), and
        `noop_r2`, the R2 of returning the start for every prompt; NaN where no start is left.
    """
    sound = achieved.isfinite().all(1) & start.isfinite()
    prompted, achieved, start = prompted[sound], achieved[sound], start[sound]
    centred = prompted - prompted.mean(1, keepdim=True)
    slope = (centred * (achieved - achieved.mean(1, keepdim=True))).sum(1) / centred.square().sum(1)
    ranks = [_spearman(p, a) for p, a in zip(prompted, achieved, strict=True)]
    return {
        "prompts": prompted.shape[1],
        "starts": prompted.shape[0],
        "r2_mean": float(r2(prompted, achieved).mean()),
        "spearman": sum(ranks) / len(ranks) if ranks else float("nan"),
        "slope": float(slope.mean()),
        "noop_r2": float(r2(prompted, start[:, None].expand_as(prompted)).mean()),
    }


def r2(prompted: Tensor, achieved: Tensor) -> Tensor:
    """Coefficient of determination of `achieved` as a prediction of `prompted`, per start: (S,)."""
    residual = (achieved - prompted).square().sum(1)
    return 1 - residual / (prompted - prompted.mean(1, keepdim=True)).square().sum(1)


def _spearman(prompted: Tensor, achieved: Tensor) -> float:
    """Rank correlation; 0 where every achieved value is the same."""
    if bool((achieved == achieved[0]).all()):
        return 0.0
    found: Any = spearmanr(prompted.numpy(), achieved.numpy())
    return float(found.statistic)


def prompts(best: float, start: Tensor, count: int) -> Tensor:
    """Prompts (S, Q), evenly spaced from the zoo's best loss to each start's own loss (S,)."""
    return best + (start[:, None] - best) * torch.linspace(0, 1, count)
