"""The silhouette coefficient with cosine distance, exactly, in linear time.

With unit vectors u the mean cosine distance from u to the n members of a class with sum S is
1 - <u, S> / n, so every point against every class costs O(n K D) instead of O(n^2 D).

Dimensions: n points, D features, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def silhouette(features: Tensor, labels: Tensor) -> float:
    """Mean silhouette coefficient (Rousseeuw 1987) under cosine distance, as in scikit-learn.

    A point alone in its class scores 0. A zero vector is at distance 1 from everything, itself excepted.

    Args:
        features: (n, D), finite.
        labels: (n,) int64, at least two classes.

    Returns:
        -1 (every point lies in a wrong class) to 1 (perfectly separated).

    Raises:
        ValueError: features that are not finite, or fewer than two classes.
    """
    if not features.isfinite().all():
        raise ValueError(f"{int((~features.isfinite()).any(1).sum())} of {len(features)} points are NaN or infinite")
    classes, member = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"the silhouette needs at least two classes; found {len(classes)}")
    unit = F.normalize(features.double(), dim=1)  # (n, D), zero rows stay zero
    one_hot = F.one_hot(member, len(classes)).double()  # (n, K)
    sizes = one_hot.sum(0)  # (K,)
    dots = unit @ (one_hot.T @ unit).T  # (n, K)
    own_size = sizes[member]
    # a point's distance to itself is 0, so it drops out of the sum over the n - 1 others
    own = 1 - (dots.gather(1, member[:, None])[:, 0] - unit.square().sum(1)) / (own_size - 1).clamp_min(1)
    others = (1 - dots / sizes).masked_fill(one_hot.bool(), torch.inf).min(1).values
    widest = torch.maximum(own, others)
    scores = torch.where(widest > 0, (others - own) / widest.clamp_min(1e-300), 0.0)
    return float(torch.where(own_size > 1, scores, 0.0).mean())
