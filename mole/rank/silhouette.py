"""The silhouette coefficient, exactly, in linear time.

With unit vectors u the mean cosine distance from u to the n members of a class with sum S is
1 - <u, S> / n, so every point against every class costs O(n K D) instead of O(n^2 D). Squared
Euclidean distance has the same property: the mean over a class is |x|^2 - 2 <x, S> / n + Q / n,
with Q the sum of its squared norms.

Dimensions: n points, D features, K classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.errors import check_choice

Metric = Literal["cosine", "sqeuclidean"]
Variant = Literal["standard", "centroid"]


def silhouette(features: Tensor, labels: Tensor, *, metric: Metric = "cosine", variant: Variant = "standard") -> float:
    """Mean silhouette coefficient (Rousseeuw 1987), as in scikit-learn.

    A point alone in its class scores 0, and so does a point at no distance from its own class and the nearest other
    one. A zero vector is at cosine distance 1 from everything, itself excepted.

    Args:
        features: (n, D), finite; a tensor, or an array of NumPy.
        labels: (n,) whole numbers, at least two different ones.
        metric: cosine, or squared Euclidean, distance.
        variant: `standard`, the mean distance to the members of a class; `centroid`, as the text of Desai et al. has
            it: distance to the centroids of the other classes (their tables were made with the standard one).

    Raises:
        ValueError: a feature is NaN or infinite, labels are of another length, or there are fewer than two classes.
        ChoiceError: there is no such metric or variant.
    """
    return float(silhouette_samples(features, labels, metric=metric, variant=variant).mean())


def silhouette_samples(
    features: Tensor, labels: Tensor, *, metric: Metric = "cosine", variant: Variant = "standard"
) -> Tensor:
    """The coefficient of every point, (n,) float64; see `silhouette`."""
    check_choice("metric", metric, get_args(Metric))
    check_choice("variant", variant, get_args(Variant))
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    _check(features, labels)
    if metric == "sqeuclidean":
        features = features.double() - features.double().mean(0)  # far from the origin digits would be lost
    classes, member = labels.unique(return_inverse=True)
    sums = Sums.none(len(classes), features.shape[1], metric).add(features, member)
    return sums.scores(features, member, variant)


def _check(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{len(features)} points {tuple(features.shape)} and labels {tuple(labels.shape)}; legal is (n, D) and (n,)"
        )
    if not bool(features.sum().isfinite()) and not bool((finite := features.isfinite().all(1)).all()):
        raise ValueError(f"{int((~finite).sum())} of {len(features)} points are NaN or infinite")


@dataclass(frozen=True)
class Sums:
    """All that must be known of every class: linear sums, so that parts of the data can be added."""

    metric: Metric
    sizes: Tensor
    """(K,)"""
    vectors: Tensor
    """(K, D): sums of members; of unit vectors for cosine."""
    squares: Tensor
    """(K,): sums of squared norms."""

    @classmethod
    def none(cls, classes: int, features: int, metric: Metric = "cosine") -> "Sums":
        """Of no points; float64.

        Raises:
            ChoiceError: there is no such metric.
        """
        check_choice("metric", metric, get_args(Metric))
        zeros = torch.zeros(classes, dtype=torch.float64)
        return cls(metric, zeros, torch.zeros(classes, features, dtype=torch.float64), zeros)

    def _points(self, features: Tensor) -> Tensor:
        return F.normalize(features.double(), dim=1) if self.metric == "cosine" else features.double()

    def add(self, features: Tensor, member: Tensor) -> "Sums":
        """With the points (n, D) of classes (n,) numbered from 0."""
        points, one_hot = self._points(features), F.one_hot(member, len(self.sizes)).double()
        return Sums(
            self.metric,
            self.sizes + one_hot.sum(0),
            self.vectors + one_hot.T @ points,
            self.squares + one_hot.T @ (points * points).sum(1),  # `square` takes four times as long
        )

    def scores(self, features: Tensor, member: Tensor, variant: Variant = "standard") -> Tensor:
        """Coefficients (n,) of points (n, D), which were added before.

        Raises:
            ValueError: fewer than two classes have members.
        """
        if int((self.sizes > 0).sum()) < 2:
            raise ValueError(f"the silhouette needs at least two classes; found {int((self.sizes > 0).sum())}")
        points = self._points(features)
        norms, own_size = (points * points).sum(1), self.sizes[member]
        dots = points @ self.vectors.T  # (n, K)
        own_dot = dots.gather(1, member[:, None])[:, 0]
        if self.metric == "cosine":
            # a point's distance to itself is 0, so it drops out of the sum over the n - 1 others
            own_sum = (own_size - 1) - (own_dot - norms)
            means = 1 - dots / self.sizes
        else:
            own_sum = own_size * norms - 2 * own_dot + self.squares[member]
            means = norms[:, None] + (self.squares / self.sizes - dots * (2 / self.sizes))
        own = own_sum / (own_size - 1).clamp_min(1)
        if variant == "centroid":
            means = self._to_centroids(norms, dots)
        means[:, self.sizes == 0] = torch.inf
        others = means.scatter_(1, member[:, None], torch.inf).amin(1)
        own, others = own.clamp_min(0), others.clamp_min(0)  # rounding
        widest = torch.maximum(own, others)
        scores = torch.where(widest > 1e-15, (others - own) / widest.clamp_min(1e-300), 0.0)
        return torch.where(own_size > 1, scores, 0.0)

    def _to_centroids(self, norms: Tensor, dots: Tensor) -> Tensor:
        """Distances (n, K) to the classes' means."""
        if self.metric == "sqeuclidean":
            return norms[:, None] - 2 * dots / self.sizes + self.vectors.square().sum(1) / self.sizes.square()
        lengths = self.vectors.square().sum(1).sqrt().clamp_min(1e-12)
        return 1 - dots / lengths


def silhouette_of(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], classes: int, *, metric: Metric = "cosine"
) -> float:
    """The same of data that never lie in memory at once: `batches()` is read twice, first for the sums of the classes.

    Two readings are the fewest: a point's nearest class is known only when all of them are.

    Args:
        batches: gives features (n, D) and labels (n,) from 0 to `classes` - 1 in parts, the same ones each time.
        classes: K.
        metric: of the distance.
    """
    check_choice("metric", metric, get_args(Metric))
    sums, middle = Sums.none(classes, 0, metric), torch.zeros(0)
    for features, labels in batches():
        _check(features, labels)
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}; legal is 0 to {classes - 1}")
        if not sums.vectors.shape[1]:
            sums, middle = Sums.none(classes, features.shape[1], metric), features.double().mean(0)
        sums = sums.add(features.double() - middle if metric == "sqeuclidean" else features, labels)
    total, count = 0.0, 0
    for features, labels in batches():
        points = features.double() - middle if metric == "sqeuclidean" else features
        total, count = total + float(sums.scores(points, labels).sum()), count + len(labels)
    if count != int(sums.sizes.sum()) or not count:
        raise ValueError(
            f"the first reading gave {int(sums.sizes.sum())} points, the second {count}; legal is the same"
        )
    return total / count
