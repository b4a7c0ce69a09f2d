"""H-score: how much of the features' variance lies between the classes."""

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from mole.errors import MoleError
from mole.rank.scorers.protocol import Evidence, centred, scorer


def _between(evidence: Evidence) -> Tensor:
    """Covariance (D, D) of the class means, each example counting once."""
    means = (evidence.one_hot.T @ centred(evidence.x)) / evidence.one_hot.sum(0)[:, None]  # (K, D)
    spread = means * (evidence.one_hot.mean(0)).sqrt()[:, None]
    return spread.T @ spread


@scorer("h_score", needs=["classes"], source="Bao et al. 2019", cost="n D^2 + D^3")
def h_score(evidence: Evidence) -> float:
    """Trace of the inverse covariance times that of the class means."""
    x = centred(evidence.x)
    if len(x) <= x.shape[1] + evidence.one_hot.shape[1]:
        raise MoleError(f"h_score needs more examples than features; found {len(x)} and {x.shape[1]}: h_score_shrunk")
    covariance = x.T @ x / len(x)
    return float(torch.trace(torch.linalg.pinv(covariance, hermitian=True, rtol=1e-9) @ _between(evidence)))


@scorer("h_score_shrunk", needs=["classes"], source="Ibrahim, Ponomareva, Mazumder 2022", cost="n D^2 + D^3")
def h_score_shrunk(evidence: Evidence) -> float:
    """The same with the covariance of Ledoit and Wolf, which few examples do not spoil."""
    covariance, shrinkage = ledoit_wolf(centred(evidence.x).numpy(), assume_centered=True)
    known = np.eye(len(covariance)) * 1e-12 * max(1e-300, float(np.trace(covariance))) + covariance
    inverse = torch.from_numpy(np.linalg.pinv(known, hermitian=True))
    return float((1 - float(shrinkage)) * torch.trace(inverse @ _between(evidence)))
