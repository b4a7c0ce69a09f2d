"""What is done about symmetry before weights reach a model: random elements (augmentation), or a canonical one.

Dimensions: N networks, R runs, P parameters, S neurons of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mole.representations.groups import AxisGroup, Element
from mole.representations.spec import WeightSpec
from mole.representations.structure import blocks

SWEEPS = 50
"""Rounds of weight matching over all groups; each takes exact steps, and most networks need two or three."""


@dataclass(frozen=True)
class Elements:
    """One group element per network."""

    index: Tensor
    """(N, P) int64."""
    factor: Tensor
    """(N, P) float64."""

    def __getitem__(self, which: Tensor) -> "Elements":
        return Elements(self.index[which], self.factor[which])

    def act(self, flat: Tensor) -> Tensor:
        """On flat weights (N, P), each by its own."""
        return (flat.gather(1, self.index.to(flat.device)) * self.factor.to(flat.device)).to(flat.dtype)

    def act_on_all(self, flat: Tensor) -> Tensor:
        """The one element on every row of (N, P)."""
        return (flat[:, self.index[0].to(flat.device)] * self.factor[0].to(flat.device)).to(flat.dtype)

    def undo(self, flat: Tensor) -> Tensor:
        """The inverse of `act`."""
        divided = (flat / self.factor.to(flat.device)).to(flat.dtype)
        return torch.empty_like(flat).scatter_(1, self.index.to(flat.device), divided)

    @classmethod
    def stack(cls, elements: Sequence[Element]) -> "Elements":
        return cls(torch.stack([e.index for e in elements]), torch.stack([e.factor for e in elements]))


class Augmentation:
    """Random elements, drawn fast: products of two from a pool.

    The same element must act on a start, its target and the moments of an optimiser.
    """

    def __init__(self, spec: WeightSpec, *, seed: int = 0, pool: int = 256) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.stack([spec.random_element(generator).index for _ in range(pool)])

    def draw(self, count: int, generator: torch.Generator) -> Elements:
        """Elements for `count` networks: orders only."""
        one, other = torch.randint(len(self.pool), (2, count), generator=generator)
        index = self.pool[other].gather(1, self.pool[one])
        return Elements(index, torch.ones(index.shape))


class Canonical:
    """The element that brings a network nearest to a reference: balanced scales, order and signs.

    Args:
        spec: of the networks.
        reference: (P,), a trained network of the same kind.
        balance: whether positive scales are balanced, where they are a symmetry.
    """

    def __init__(self, spec: WeightSpec, reference: Tensor, *, balance: bool = True) -> None:
        self.spec, self.balance = spec, balance
        self._places: dict[str, list[tuple[str, Tensor]]] = {}
        self._scalable = {
            name: group.scalings[0]  # one per group: several of one group share tensors
            for name, group in spec.groups.items()
            if group.scalings and not self._nested(group) and {power for _, _, power in group.scalings[0]} == {1, -1}
        }
        self.reference = self._balanced(reference.double()).act(reference.double()) if balance else reference.double()

    def elements(self, flat: Tensor) -> Elements:
        """One element per network (N, P)."""
        return Elements.stack([self.element(row) for row in flat])

    def element(self, flat: Tensor) -> Element:
        """The element for one network (P,)."""
        flat = flat.double().cpu()
        found = self._balanced(flat) if self.balance else self.spec.element()
        return self.match(found.act(flat)).after(found)

    def match(self, flat: Tensor) -> Element:
        """Weight matching: groups take turns, each step exact, until none improves (Ainsworth et al. 2023).

        Where signs are a symmetry, a neuron resembles another one up to its sign, which is set with the order.
        """
        plain = [name for name, group in self.spec.groups.items() if not self._nested(group)]
        orders = {name: torch.arange(self.spec.groups[name].size) for name in plain}
        signs = {(name, 0): torch.ones(len(orders[name])) for name in plain if self.spec.groups[name].signs}
        for _ in range(SWEEPS):
            changed = False
            for name in plain:
                others = {n: order for n, order in orders.items() if n != name}
                flips = {key: sign for key, sign in signs.items() if key[0] != name}
                similar = self._similarity(name, self.spec.element(others, signs=flips).act(flat))
                gain = np.abs(similar) if (name, 0) in signs else similar
                order = linear_sum_assignment(gain, maximize=True)[1]
                rows = np.arange(len(order))
                here = gain[rows, orders[name].numpy()].sum()
                if gain[rows, order].sum() > here + 1e-12 * abs(here):
                    orders[name], changed = torch.from_numpy(order), True
                if (name, 0) in signs:
                    sign = torch.from_numpy(np.where(similar[rows, orders[name].numpy()] < 0, -1.0, 1.0)).float()
                    changed = changed or not torch.equal(sign, signs[name, 0])
                    signs[name, 0] = sign
            if not changed:
                break
        return self.spec.element(orders, signs=signs)

    def _nested(self, group: AxisGroup) -> bool:
        """Orders within heads are left as they are: only plain groups are matched."""
        return group.parent is not None

    def _similarity(self, name: str, flat: Tensor) -> np.ndarray:
        """(S, S): how much neuron j of the network resembles neuron i of the reference, over all of its weights."""
        size = self.spec.groups[name].size
        total = torch.zeros(size, size, dtype=torch.float64)
        for _, places in self._rows(name):
            total += self.reference[places] @ flat[places].T
        return total.numpy()

    def _rows(self, name: str) -> list[tuple[str, Tensor]]:
        """Per block of a tensor its name and the places (S, K) of each neuron's numbers."""
        if name not in self._places:
            found = []
            for entry in self.spec.entries:
                for block in blocks(entry) if name in entry.moves else ():
                    dims = [group for factors in block.factors for group, _ in factors]
                    for at in [i for i, group in enumerate(dims) if group == name]:
                        found.append((entry.name, block.places.movedim(at, 0).reshape(block.places.shape[at], -1)))
            self._places[name] = found
        return self._places[name]

    def _balanced(self, flat: Tensor) -> Element:
        """Scales at which what a factor multiplies and what it divides have the same norm, per neuron."""
        found = self.spec.element()
        if not self._scalable:
            return found
        for _ in range(SWEEPS):
            largest = 0.0
            for name, scaling in self._scalable.items():
                moved = found.act(flat)
                up, down = (self._norms(name, scaling, power, moved) for power in (1, -1))
                usable = (up > 1e-12) & (down > 1e-12)
                logs = torch.where(usable, 0.5 * (down.log() - up.log()), 0.0)
                found = self.spec.element(scales={(name, 0): logs}).after(found)
                largest = max(largest, float(logs.abs().max()))
            if largest < 1e-10 or len(self._scalable) == 1:
                break
        return found

    def _norms(self, name: str, scaling: Sequence[tuple[str, int, int]], power: int, flat: Tensor) -> Tensor:
        """(S,), of all numbers that a neuron's factor enters with this power."""
        parts = {tensor for tensor, _, p in scaling if p == power}
        rows = [flat[places].square().sum(1) for tensor, places in self._rows(name) if tensor in parts]
        return torch.stack(rows).sum(0).sqrt()


def aligned(spec: WeightSpec, flat: Tensor, reference: Tensor) -> Tensor:
    """Networks (N, P), each in the order of neurons that lies nearest to `reference` (P,)."""
    canonical = Canonical(spec, reference, balance=False)
    return canonical.elements(flat).act(flat)
