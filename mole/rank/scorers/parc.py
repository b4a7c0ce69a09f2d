"""PARC: do examples of one class lie close together?"""

import torch
from scipy.stats import spearmanr
from torch import Tensor

from mole.errors import MoleError
from mole.rank.features import principal_components
from mole.rank.scorers.protocol import Evidence, few, scorer

COMPONENTS, MOST = 32, 500


def _apart(x: Tensor) -> Tensor:
    """1 - Pearson correlation of all pairs of rows."""
    rows = x - x.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return 1 - rows @ rows.T


@scorer("parc", needs=["classes"], source="Bolya, Mittapalli, Hoffman 2021", cost="n^2, n at most 500")
def parc(evidence: Evidence) -> float:
    """Spearman correlation of distances between features (PCA to 32) with distances between labels, in percent."""
    evidence = few(evidence, MOST)
    x = principal_components(evidence.x, min(COMPONENTS, *evidence.x.shape))
    upper = torch.triu_indices(len(x), len(x), 1)
    one, other = (_apart(part)[upper[0], upper[1]] for part in (x, evidence.one_hot))
    if min(one.std(), other.std()) < 1e-12:
        raise MoleError("parc needs distances that differ")
    return 100 * float(spearmanr(one.numpy(), other.numpy())[0])  # pyright: ignore
