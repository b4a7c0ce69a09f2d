"""How far generated networks are from the training networks, in weights and in mistakes.

Distances are Euclidean over the plain weights, minimised over the order of interchangeable neurons
(Zeng et al. 2025): a permuted copy is no new network.

Dimensions: N and M networks, P parameters, H neurons, B images.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mole.errors import MoleError
from mole.representations import WeightSpec, neuron_view
from mole.representations.handling import aligned


class PermutationDistance:
    """Distances between networks modulo the order of their hidden neurons.

    Exact for one hidden layer. For more, every network is first brought into the order nearest to a reference by weight
    matching, and distances between those are upper bounds.

    Args:
        spec: of the networks.
        reference: (P,), a trained network; needed for more than one hidden layer.

    Example:
        >>> distance = PermutationDistance(task.spec)
        >>> distance.nearest(generated, training).shape
        torch.Size([64])
    """

    def __init__(self, spec: WeightSpec, reference: Tensor | None = None) -> None:
        self.view, self.reference = neuron_view(spec), reference
        if self.view.edges and reference is None:
            names = ", ".join(kind.name for kind in self.view.edges)
            raise MoleError(f"{names} joins two hidden layers: distances between such networks need a reference")

    def pairwise(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (N, M) between networks (N, P) and (M, P)."""
        if not len(first) or not len(second):
            return torch.zeros(len(first), len(second), dtype=torch.float64)
        if self.view.edges:
            assert self.reference is not None
            first, second = (self.align(flat, self.reference).double() for flat in (first, second))
            return torch.cdist(first, second)
        tokens, others = self.view.encode(first).nodes, self.view.encode(second).nodes
        squared = np.zeros((len(first), len(second)))
        for kind, (a, b) in enumerate(zip(tokens, others, strict=True)):
            a, b = a.double(), b.double()
            if self.view.nodes[kind].ordered:  # what belongs to no group has one order only
                squared += torch.cdist(a.flatten(1), b.flatten(1)).square().numpy()
                continue
            for row, network in enumerate(a):
                costs = torch.cdist(network.expand(len(b), -1, -1), b).square().numpy()  # (M, H, H)
                squared[row] += [cost[linear_sum_assignment(cost)].sum() for cost in costs]
        return torch.from_numpy(np.sqrt(np.maximum(squared, 0)))

    def nearest(self, first: Tensor, second: Tensor, *, exclude: Tensor | None = None) -> Tensor:
        """Distance (N,) from each network to the nearest of `second`.

        Args:
            first: (N, P).
            second: (M, P).
            exclude: (N,), per network the index in `second` that does not count (itself).
        """
        distances = self.pairwise(first, second)
        if exclude is not None:
            distances[torch.arange(len(first)), exclude] = torch.inf
        return distances.min(1).values

    def spread(self, flat: Tensor) -> float:
        """Mean distance between two different ones of networks (N, P); NaN where there are none."""
        if not len(flat):
            return float("nan")
        distances = self.pairwise(flat[:64], flat[:64])
        return float(distances.sum() / max(1, distances.numel() - len(distances)))

    def align(self, flat: Tensor, reference: Tensor) -> Tensor:
        """Networks (N, P) with their hidden neurons in the order that lies nearest to `reference` (P,)."""
        return aligned(self.view.spec, flat, reference)


def max_wrong_iou(wrong: Tensor, training_wrong: Tensor, *, exclude: Tensor | None = None) -> Tensor:
    """Behavioural similarity to the most similar training network: (N,), 1 for the same mistakes.

    Intersection over union of the sets of misclassified images, maximised over training networks.

    Args:
        wrong: (N, B) bool.
        training_wrong: (M, B) bool.
        exclude: (N,), per network the index of the training network that does not count.
    """
    a, b = wrong.float(), training_wrong.float()
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    iou = torch.where(either > 0, both / either.clamp_min(1), 1.0)  # two faultless networks are alike
    if exclude is not None:
        iou[torch.arange(len(a)), exclude] = -1
    return iou.max(1).values


def dispersion(generated: Tensor, training: Tensor) -> float:
    """Root-mean-square spread of generated over that of training networks: 1 is right, 0 is collapsed.

    NaN where there is one training network only.
    """
    return ratio(_spread(generated), _spread(training))


def ratio(part: float, whole: float) -> float:
    """Their quotient; NaN where there is nothing to compare with."""
    return part / whole if whole else float("nan")


def _spread(flat: Tensor) -> float:
    return float((flat - flat.mean(0)).square().sum(1).mean().sqrt())
