"""Which neurons may be scaled, or flipped in sign, without changing the function: a linear system per group.

Every axis of every value has an unknown log scale; operations relate them (`rules.Relation`). What is left undetermined
is a symmetry. For signs the same system is solved modulo 2, where odd functions pass what positive scales may not.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Literal

from mole.representations.axes import Axis
from mole.representations.trace import Trace, Value

Variable = tuple[int, int]
"""Number of a value, and one of its axes."""

Exponents = dict[Variable, int]
"""How each tensor's axis takes part: the power of a neuron's factor that multiplies it."""


class Equations:
    """Linear equations, solved as they come; `modulo` 2 for signs, 0 for real scales."""

    def __init__(self, modulo: int) -> None:
        self.modulo = modulo
        self.solved: dict[Variable, dict[Variable, Fraction]] = {}

    def _plain(self, value: Fraction) -> Fraction:
        return Fraction(value % self.modulo) if self.modulo else value

    def reduced(self, row: Mapping[Variable, Fraction]) -> dict[Variable, Fraction]:
        """The same row in undetermined variables only."""
        found: dict[Variable, Fraction] = defaultdict(Fraction)
        waiting = list(row.items())
        while waiting:
            variable, factor = waiting.pop()
            if variable in self.solved:
                waiting += [(other, factor * share) for other, share in self.solved[variable].items()]
            else:
                found[variable] = self._plain(found[variable] + factor)
        return {variable: factor for variable, factor in found.items() if factor}

    def add(self, row: Mapping[Variable, Fraction]) -> None:
        """One more equation: the row is zero. The variable that came last is expressed by the others."""
        left = self.reduced(row)
        if not left:
            return
        pivot = max(left)
        factor = left.pop(pivot)
        self.solved[pivot] = {variable: self._plain(-share / factor) for variable, share in left.items()}


def solve(
    trace: Trace, leaves: Sequence[Axis], parameters: Mapping[str, Value], field: Literal["positive", "sign"]
) -> dict[int, list[dict[tuple[str, int], int]]]:
    """The scalings of every group.

    Args:
        trace: of the network.
        leaves: the groups' axes.
        parameters: name to the value that stands for a tensor of the state.
        field: real factors above zero, or signs.

    Returns:
        Identity of a leaf to its independent scalings, each (tensor name, axis) to an exponent.
    """
    wanted = {id(leaf): leaf for leaf in leaves}
    systems = {key: Equations(2 if field == "sign" else 0) for key in wanted}
    present = _Present(trace, wanted)
    for relation in trace.relations:
        if relation.field not in ("both", field):
            continue
        for key in {id(leaf) for leaf in relation.over.leaves()} & wanted.keys():
            row: dict[Variable, Fraction] = defaultdict(Fraction)
            for number, dim, factor in relation.terms:
                if key in present[number, dim]:
                    row[number, dim] += factor
            systems[key].add(row)
    for source, result in trace.views:
        _relate_view(source, result, systems, wanted)
    names = {value.number: name for name, value in parameters.items()}
    own = [(number, dim) for number in names for dim in range(len(trace.values[number].axes))]
    return {key: _basis(systems[key], [v for v in own if key in present[v]], names) for key in wanted}


class _Present:
    """Which groups run along an axis of a value."""

    def __init__(self, trace: Trace, wanted: Mapping[int, Axis]) -> None:
        self.trace, self.wanted = trace, wanted
        self.known: dict[Variable, set[int]] = {}

    def __getitem__(self, variable: Variable) -> set[int]:
        if variable not in self.known:
            number, dim = variable
            leaves = self.trace.values[number].axes[dim].leaves()
            self.known[variable] = {id(leaf) for leaf in leaves} & self.wanted.keys()
        return self.known[variable]


def _relate_view(source: Value, result: Value, systems: Mapping[int, Equations], wanted: Mapping[int, Axis]) -> None:
    """The same leaves in the same order keep their scales; where the orders differ they may have none."""
    old = [(id(leaf), dim) for dim, axis in enumerate(source.axes) for leaf in axis.leaves() if id(leaf) in wanted]
    new = [(id(leaf), dim) for dim, axis in enumerate(result.axes) for leaf in axis.leaves() if id(leaf) in wanted]
    if [key for key, _ in old] == [key for key, _ in new]:
        for (key, before), (_, after) in zip(old, new, strict=True):
            systems[key].add({(source.number, before): Fraction(1), (result.number, after): Fraction(-1)})
    else:
        for value, places in ((source, old), (result, new)):
            for key, dim in places:
                systems[key].add({(value.number, dim): Fraction(1)})


def _basis(system: Equations, own: Sequence[Variable], names: Mapping[int, str]) -> list[dict[tuple[str, int], int]]:
    """Independent solutions, as whole exponents of the parameters' axes."""
    reduced = {variable: system.reduced({variable: Fraction(1)}) for variable in own}
    found: list[dict[tuple[str, int], int]] = []
    seen = Equations(system.modulo)
    for free in sorted({variable for row in reduced.values() for variable in row}):
        vector = {variable: row[free] for variable, row in reduced.items() if row.get(free)}
        before = len(seen.solved)
        seen.add(vector)
        if len(seen.solved) == before:
            continue
        scale = lcm(*(share.denominator for share in vector.values()))
        found.append({(names[number], dim): int(share * scale) for (number, dim), share in sorted(vector.items())})
    return found
