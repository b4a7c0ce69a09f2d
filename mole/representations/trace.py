"""What a run tells: values, the axes they run along, how their scales are related, and where they came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mole.representations.axes import Axis


@dataclass(eq=False)
class Value:
    """A tensor as it was at one moment of the run."""

    axes: list[Axis]
    number: int
    constant: bool = False
    """Every number in it is the same, and was not computed from anything."""
    pending: list[tuple[Axis, Axis]] = field(default_factory=list)
    """Axes to be merged once something reads the value."""
    origin: str | None = None
    """The tensor of the state that it is, or is a view of."""
    producers: tuple[str, ...] = ()
    """The weights whose products it holds."""


Term = tuple[int, int, int]
"""Number of a value, one of its axes, and a coefficient."""


@dataclass(frozen=True)
class Relation:
    """The sum of the terms' log scales is zero, for every leaf of `over` that an axis of theirs has."""

    terms: tuple[Term, ...]
    over: Axis
    field: Literal["both", "positive", "sign"] = "both"


@dataclass
class Flow:
    """Which weights read what which others have made: the operation graph, as far as weights see it."""

    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Weight to the weights whose outputs it multiplies; none for the network's input."""
    acts_on: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Bias, or tensor of a normalisation, to the weights whose outputs it shifts or scales."""
    residual: list[tuple[str, str]] = field(default_factory=list)
    """Sums without parameters: the outputs of the first are added to those of the second."""


@dataclass
class Trace:
    """What one or more runs of a network told."""

    values: list[Value] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)
    views: list[tuple[Value, Value]] = field(default_factory=list)
    """The same numbers in the same order under other axes."""
    flow: Flow = field(default_factory=Flow)
    unknown: dict[str, int] = field(default_factory=dict)
    """Operations without a rule, and how often they came."""

    def new(self, axes: Sequence[Axis]) -> Value:
        value = Value(list(axes), len(self.values))
        self.values.append(value)
        return value

    # Scales

    def relate(self, over: Axis, *terms: tuple[Value, int, int], field: Any = "both") -> None:
        self.relations.append(Relation(tuple((v.number, dim, c) for v, dim, c in terms), over, field))

    def unscaled(self, value: Value, *dims: int, field: Any = "both") -> None:
        for dim in dims or range(len(value.axes)):
            self.relate(value.axes[dim], (value, dim, 1), field=field)

    def alike(self, one: Value, dim: int, other: Value, other_dim: int, *, times: int = 1, field: Any = "both") -> None:
        self.relate(one.axes[dim], (one, dim, 1), (other, other_dim, -times), field=field)


@dataclass
class Call:
    """One operation with what is known of its operands."""

    trace: Trace
    name: str
    arguments: dict[str, Any]
    known: Callable[[Tensor], Value]
    output: Any

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def value(self, name: str) -> Value | None:
        found = self.arguments.get(name)
        return self.known(found) if isinstance(found, Tensor) else None

    def operand(self, name: str) -> Value:
        found = self.value(name)
        assert found is not None
        return found

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        found: list[Tensor] = []
        for argument in self.arguments.values():
            if isinstance(argument, Tensor):
                found.append(argument)
            elif isinstance(argument, list | tuple):
                found += [item for item in argument if isinstance(item, Tensor)]
        return found

    def give(self, axes: Sequence[Axis]) -> Value:
        return self.trace.new(axes)


def frozen(tensor: Tensor) -> list[Axis]:
    """Axes of which nothing is known."""
    return [Axis(size, frozen=True) for size in tensor.shape]


def free(tensor: Tensor) -> list[Axis]:
    """Axes along which the tensor is the same everywhere."""
    return [Axis(size) for size in tensor.shape]
