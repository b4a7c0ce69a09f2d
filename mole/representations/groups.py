"""Groups of interchangeable neurons, and what their elements do to a flat vector.

Dimensions: P parameters, S neurons of a group, S' of its parent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from mole.errors import MoleError

Factor = tuple[str | None, int]
"""A group, or None for an order that matters, and a size."""

AxisTerms = tuple[tuple[Factor, ...], ...]
"""An axis: blocks one after the other, each a row-major product of factors."""

Scaling = dict[tuple[str, int], int]
"""(tensor, axis) to the power of a neuron's factor that multiplies the tensor along this axis."""


@dataclass(frozen=True)
class AxisGroup:
    """Neurons whose order means nothing."""

    name: str
    size: int
    parent: str | None = None
    """Group within each of whose members these have an order of their own: head widths within heads."""
    scalings: tuple[tuple[tuple[str, int, int], ...], ...] = ()
    """Independent ways to scale a neuron by a positive factor without a change of the function: each names the
    tensors and axes that take part and the power of the factor: +1 for what is multiplied, -1 for what is divided."""
    signs: tuple[tuple[tuple[str, int, int], ...], ...] = ()
    """The same for a change of sign."""


@dataclass(frozen=True)
class Element:
    """One element of the symmetry group of a network: another order of neurons, other scales, the same function.

    It acts on flat weights as `factor[i] * flat[index[i]]`.

    Example:
        >>> element = spec.random_element(seed=0)
        >>> same = element.inverse().act(element.act(flat))
    """

    index: Tensor
    """(P,) int64."""
    factor: Tensor
    """(P,) float64."""

    def act(self, flat: Tensor) -> Tensor:
        """On flat weights (*N, P), in their own precision; on moments of an optimiser with `inverse` factors."""
        moved = flat.index_select(-1, self.index.to(flat.device))
        if bool((self.factor == 1).all()):
            return moved
        return (moved.double() * self.factor.to(flat.device)).to(flat.dtype)

    def after(self, other: "Element") -> "Element":
        """Their product: `other` acts first."""
        return Element(other.index[self.index], self.factor * other.factor[self.index])

    def inverse(self) -> "Element":
        """What undoes it."""
        back = torch.empty_like(self.index)
        back[self.index] = torch.arange(len(self.index))
        return Element(back, 1 / self.factor[back])


def positions(
    name: str,
    shape: Sequence[int],
    axes: Sequence[AxisTerms],
    groups: Mapping[str, AxisGroup],
    permutations: Mapping[str, Tensor],
    scales: Mapping[tuple[str, int], Tensor],
    signs: Mapping[tuple[str, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """For one tensor where each number comes from (row-major, `shape`), and its factor.

    Args:
        name: of the tensor.
        shape: of the tensor.
        axes: of the tensor.
        groups: all of the network.
        permutations: group to (S,), or (S', S) where it has a parent; absent groups stay.
        scales: (group, number of a scaling) to log factors, in the shape of a permutation.
        signs: (group, number of a sign) to factors of 1 and -1, likewise.
    """
    index = torch.arange(prod(shape)).reshape(tuple(shape))
    factor = torch.ones(tuple(shape), dtype=torch.float64)
    starts = [_starts(terms) for terms in axes]
    for places in product(*(range(len(terms)) for terms in axes)):
        block = [terms[place] for terms, place in zip(axes, places, strict=True)]
        lows = [start[place] for start, place in zip(starts, places, strict=True)]
        sizes = [prod(size for _, size in factors) for factors in block]
        window = tuple(slice(low, low + size) for low, size in zip(lows, sizes, strict=True))
        grid = _Grid(block)
        index[window] = grid.sources(permutations, groups, lows, shape).reshape(sizes)
        factor[window] = grid.factors(name, groups, scales, signs).reshape(sizes)
    return index, factor


def _starts(terms: AxisTerms) -> list[int]:
    found, low = [], 0
    for factors in terms:
        found.append(low)
        low += prod(size for _, size in factors)
    return found


class _Grid:
    """All coordinates of one block of a tensor, one dimension per factor of its axes."""

    def __init__(self, block: Sequence[Sequence[Factor]]) -> None:
        self.block = block
        self.flat = [factor for factors in block for factor in factors]
        self.sizes = [size for _, size in self.flat]
        self.axis = [axis for axis, factors in enumerate(block) for _ in factors]

    def _coordinate(self, place: int) -> Tensor:
        shape = [1] * len(self.sizes)
        shape[place] = self.sizes[place]
        return torch.arange(self.sizes[place]).reshape(shape)

    def _look_up(self, table: Tensor, place: int, groups: Mapping[str, AxisGroup]) -> Tensor:
        """`table` (S,) or (S', S) at the coordinates of the factor at `place`, and of its parent."""
        here = self._coordinate(place)
        if table.ndim == 1:
            return table[here]
        name = self.flat[place][0]
        assert name is not None
        parents = [i for i, (group, _) in enumerate(self.flat) if group == groups[name].parent]
        near = [i for i in parents if self.axis[i] == self.axis[place]] or parents
        return table[self._coordinate(near[0]), here]

    def sources(
        self,
        permutations: Mapping[str, Tensor],
        groups: Mapping[str, AxisGroup],
        lows: Sequence[int],
        shape: Sequence[int],
    ) -> Tensor:
        """Where each number of the block comes from, as a position in the whole tensor."""
        along = [torch.tensor(low) for low in lows]
        within = [torch.tensor(0) for _ in lows]
        for place, (group, size) in enumerate(self.flat):
            moved = group is not None and group in permutations
            came = self._look_up(permutations[group], place, groups) if moved else self._coordinate(place)  # type: ignore[index]
            axis = self.axis[place]
            within[axis] = within[axis] * size + came
        total = torch.tensor(0)
        for axis, size in enumerate(shape):
            total = total * size + along[axis] + within[axis]
        return total.expand(self.sizes) if self.sizes else total

    def factors(
        self,
        name: str,
        groups: Mapping[str, AxisGroup],
        scales: Mapping[tuple[str, int], Tensor],
        signs: Mapping[tuple[str, int], Tensor],
    ) -> Tensor:
        """What each number of the block is multiplied by."""
        found = torch.ones(self.sizes, dtype=torch.float64)
        for place, (group, _) in enumerate(self.flat):
            if group is None:
                continue
            for kinds, tables in ((groups[group].scalings, scales), (groups[group].signs, signs)):
                for number, scaling in enumerate(kinds):
                    table = tables.get((group, number))
                    power = sum(p for tensor, axis, p in scaling if (tensor, axis) == (name, self.axis[place]))
                    if table is None or not power:
                        continue
                    here = self._look_up(table.double(), place, groups)
                    found = found * ((here * power).exp() if tables is scales else here.pow(power))
        return found


def random_tables(
    groups: Mapping[str, AxisGroup], generator: torch.Generator, *, largest: float
) -> tuple[dict[str, Tensor], dict[tuple[str, int], Tensor], dict[tuple[str, int], Tensor]]:
    """A random permutation of every group, log factors up to ln(`largest`) for every scaling, and signs."""
    permutations: dict[str, Tensor] = {}
    scales: dict[tuple[str, int], Tensor] = {}
    signs: dict[tuple[str, int], Tensor] = {}
    for name, group in groups.items():
        lead = (groups[group.parent].size,) if group.parent is not None else ()
        drawn = torch.rand(*lead, group.size, generator=generator)
        permutations[name] = drawn.argsort(-1)
        for number in range(len(group.scalings)):
            drawn = torch.rand(*lead, group.size, generator=generator, dtype=torch.float64)
            scales[name, number] = (2 * drawn - 1) * torch.tensor(largest, dtype=torch.float64).log()
        for number in range(len(group.signs)):
            drawn = torch.rand(*lead, group.size, generator=generator)
            signs[name, number] = torch.where(drawn < 0.5, -1.0, 1.0).double()
    return permutations, scales, signs


def check_tables(groups: Mapping[str, AxisGroup], permutations: Mapping[str, Tensor]) -> None:
    """Refuse what is not one permutation per group.

    Raises:
        MoleError: naming every fault.
    """
    faults = []
    for name, permutation in permutations.items():
        if name not in groups:
            faults.append(f"group {name!r} is unknown; legal are {', '.join(groups) or 'none'}")
            continue
        group = groups[name]
        shape = (*((groups[group.parent].size,) if group.parent is not None else ()), group.size)
        plain = tuple(permutation.shape) == (group.size,)
        if not plain and tuple(permutation.shape) != shape:
            faults.append(f"group {name!r}: a permutation of shape {tuple(permutation.shape)}; legal is {shape}")
        elif not torch.equal(permutation.sort(-1).values, torch.arange(group.size).expand(permutation.shape)):
            faults.append(f"group {name!r}: not a permutation of 0 to {group.size - 1}")
    if faults:
        raise MoleError("; ".join(faults))
