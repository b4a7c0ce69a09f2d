"""Which neurons of a network are interchangeable: derived from one run of it, proved numerically.

Nothing is declared. `tracing` follows the axes of every tensor through a run, `axes` merges what must be the same and
freezes what has an order; what is left free is a group. A head's width may be reordered within each head, so a group
may have a parent. `scaling` finds which neurons may be scaled or flipped. Then every group has to prove itself: at
random weights, in float64, a random element must leave the outputs as they are. What fails is dropped and named.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mole.errors import SymmetryWarning
from mole.representations.axes import Axis, freeze
from mole.representations.groups import AxisGroup, AxisTerms, Factor, positions, random_tables
from mole.representations.inputs import Inputs, as_inputs, example_inputs
from mole.representations.scaling import solve
from mole.representations.trace import Flow, Trace, Value
from mole.representations.tracing import plainly, record, tensors_of

TOLERANCE = 1e-10
"""Largest difference of an output, relative to the largest output, that rounding in float64 may explain."""

ELEMENTS = 3
"""Random elements that a group has to prove itself by: one alone may be the identity of a small group."""

WIDE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Symmetry:
    """What was derived of a network."""

    groups: dict[str, AxisGroup]
    axes: dict[str, tuple[AxisTerms, ...]]
    """Of every floating-point tensor of the state, under the first of its names."""
    flow: Flow = field(default_factory=Flow)
    unknown: tuple[str, ...] = ()
    """Operations that have no rule, and froze what they touched."""

    @classmethod
    def none(cls, state: Mapping[str, Tensor]) -> "Symmetry":
        """Nothing is known to be interchangeable."""
        return cls({}, {name: tuple((((None, size),),) for size in t.shape) for name, t in state.items()})


def floating(module: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The floating-point tensors of a network's state, each under the first of its names, or under these names."""
    state = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if names is not None:
        return {name: state[name] for name in names}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def derive(module: nn.Module, inputs: Any = None) -> Symmetry:
    """The symmetry of a network.

    Args:
        module: any network; it is neither run nor changed itself, a copy is.
        inputs: example inputs: a tensor, a tuple of arguments, or a dictionary of named ones. Without them
            some that may fit are tried.

    Warns:
        SymmetryWarning: no input fitted, so nothing is derived; or a group did not prove itself and was dropped.
    """
    names = list(floating(module))  # conversion to another type can untie tensors, so names are fixed before
    try:
        network = _prepared(module)
    except Exception as error:  # activations kept as attributes, tensors without data, ...
        _warn(f"{type(module).__name__} cannot be copied ({_told(error)}), so no symmetry is known of it")
        return Symmetry.none(floating(module))
    state = floating(network, names)
    candidates = [converted(as_inputs(inputs), torch.float32)] if inputs is not None else example_inputs(network)
    found = _traced(network, state, candidates)
    if found is None:
        return Symmetry.none(state)
    trace, axes, values, used = found
    return _proved(network, _named(trace, axes, values), used)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _warn(message: str) -> None:
    warnings.warn(message, SymmetryWarning, stacklevel=5)


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Inputs with their floating-point tensors in another type, on the CPU; also those inside of data objects."""

    def change(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.detach().cpu().to(dtype) if item.is_floating_point() else item.cpu()
        if hasattr(item, "apply") and hasattr(item, "to") and not isinstance(item, nn.Module):
            return copy.copy(item).apply(change)
        return item

    return tree_map(change, value)


def _prepared(module: nn.Module) -> nn.Module:
    """A copy that can be run: in evaluation mode, on the CPU, without caches among its outputs."""
    network = _in(copy.deepcopy(module).cpu(), torch.float32).eval()
    config = getattr(network, "config", None)
    if getattr(config, "use_cache", None):
        config.use_cache = False  # type: ignore[union-attr]
    return network


def _in(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another type, tensors that are plain attributes included."""
    for part in network.to(dtype).modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(part, name, value.detach().cpu().to(dtype))
    return network


def _traced(
    network: nn.Module, state: Mapping[str, Tensor], candidates: Iterable[Inputs]
) -> tuple[Trace, dict[str, list[Axis]], dict[str, Value], Inputs] | None:
    """The first run that succeeds."""
    problem = "no layer tells what its inputs look like"
    for inputs in candidates:
        trace = Trace()
        axes = {name: [Axis(size) for size in tensor.shape] for name, tensor in state.items()}
        try:
            values, used = record(network, state, inputs, trace, axes)
        except Exception as error:  # whatever the network raises: the next input may fit
            problem = _told(error)
            continue
        for name in _overlapping(state):
            for axis in axes[name]:
                freeze(axis)
        _freeze_unread(network, axes, state.keys() - used)
        return trace, axes, values, inputs
    _warn(f"{type(network).__name__} could not be run ({problem}), so no symmetry is known of it; give example_inputs")
    return None


def _freeze_unread(network: nn.Module, axes: Mapping[str, list[Axis]], missed: Set[str]) -> None:
    """What no operation computed with may meet any axis of its size on other inputs: those are frozen too."""
    sizes = {axis.size for name in missed for axis in axes[name] if axis.size > 1}
    for name, row in axes.items():
        for axis in row:
            if name in missed or axis.size in sizes:
                freeze(axis)
            for leaf in axis.leaves():
                if not leaf.read:
                    freeze(leaf)
    if sizes:
        _warn(
            f"{type(network).__name__}: the run did not reach {', '.join(sorted(missed)[:5])}"
            f"{f' and {len(missed) - 5} more' if len(missed) > 5 else ''}; whatever has an axis of the same size is "
            "taken for ordered. Give example_inputs that reach them for more symmetry"
        )


def _overlapping(state: Mapping[str, Tensor]) -> set[str]:
    """Tensors that share memory without being one."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if tensor.numel():
            places[tensor.untyped_storage().data_ptr()].append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}


def _named(trace: Trace, axes: Mapping[str, list[Axis]], values: Mapping[str, Value]) -> Symmetry:
    """Groups with names, parents and scalings."""
    every = [axis for row in axes.values() for axis in row]
    while True:  # reading an axis may freeze it, and with it parts of others
        before = sum(leaf.frozen for axis in every for leaf in axis.leaves())
        terms = {name: [list(axis.terms()) for axis in row] for name, row in axes.items()}
        if sum(leaf.frozen for axis in every for leaf in axis.leaves()) == before:
            break
    leaves: dict[int, tuple[str, Axis]] = {}
    for name, row in terms.items():
        for leaf in (leaf for blocks in row for factors in blocks for leaf in factors):
            if not leaf.frozen and id(leaf) not in leaves:
                leaves[id(leaf)] = (_group_name(name, leaves.values()), leaf)
    parents = _parents(trace, {key: leaf for key, (_, leaf) in leaves.items()})
    scalings = solve(trace, [leaf for _, leaf in leaves.values()], values, "positive")
    signs = solve(trace, [leaf for _, leaf in leaves.values()], values, "sign")
    groups = {
        name: AxisGroup(
            name,
            leaf.size,
            leaves[parents[key]][0] if key in parents else None,
            tuple(tuple((t, a, p) for (t, a), p in one.items()) for one in scalings[key]),
            tuple(tuple((t, a, p) for (t, a), p in one.items()) for one in signs[key]),
        )
        for key, (name, leaf) in leaves.items()
    }

    def factor(leaf: Axis) -> Factor:
        return (None if leaf.frozen else leaves[id(leaf)][0]), leaf.size

    named = {name: tuple(_mapped(blocks, factor) for blocks in row) for name, row in terms.items()}
    return Symmetry(groups, named, trace.flow, tuple(sorted(trace.unknown)))


def _mapped(blocks: Iterable[Iterable[Any]], factor: Callable[[Any], Factor]) -> AxisTerms:
    return tuple(tuple(factor(item) for item in block) or ((None, 1),) for block in blocks)


def _group_name(tensor: str, taken: Iterable[tuple[str, Axis]]) -> str:
    """The layer whose tensor it is first met in, with a number if there are several."""
    base = tensor.rpartition(".")[0] or tensor
    names = {name for name, _ in taken}
    number = 1
    while (base if number == 1 else f"{base}#{number}") in names:
        number += 1
    return base if number == 1 else f"{base}#{number}"


def _parents(trace: Trace, leaves: Mapping[int, Axis]) -> dict[int, int]:
    """Groups that never come without another one may have an order of their own within each of its members."""
    together: dict[int, set[int]] = {}
    for value in trace.values:
        blocks = [[{id(leaf) for leaf in term} & leaves.keys() for term in axis.terms()] for axis in value.axes]
        always = [set.intersection(*terms) if terms else set() for terms in blocks]  # in every block of an axis
        for dim, terms in enumerate(blocks):
            beside = set().union(*(found for other, found in enumerate(always) if other != dim))
            for term in terms:
                for key in term:
                    here = term | beside
                    together[key] = together[key] & here if key in together else set(here)
    found: dict[int, int] = {}
    for key in leaves:
        others = [other for other in together.get(key, set()) if other != key and found.get(other) != key]
        others = [other for other in others if other not in found]
        if others and key not in found.values():
            found[key] = max(others, key=lambda other: leaves[other].size)
    return found


# The proof


def _proved(network: nn.Module, symmetry: Symmetry, inputs: Inputs) -> Symmetry:
    """The groups and scalings that leave the outputs of a network with random weights as they are."""
    if not symmetry.groups:
        return symmetry
    try:
        proof = Proof(network, inputs, names=symmetry.axes)
    except Exception as error:  # an operation without float64, say: what cannot be proved is not used
        _warn(
            f"{type(network).__name__} cannot be run in float64 ({_told(error)}), so its groups are not proved, and "
            "dropped"
        )
        return without(symmetry, list(symmetry.groups))
    names = list(symmetry.groups)
    failed = _failing(names, lambda part: proof.holds(symmetry, part, scaled=False))
    symmetry = without(symmetry, failed)
    unscaled = _failing(list(symmetry.groups), lambda part: proof.holds(symmetry, part, scaled=True))
    groups = {n: replace(g, scalings=(), signs=()) if n in unscaled else g for n, g in symmetry.groups.items()}
    if failed or unscaled:
        what = [f"{', '.join(failed)} (order)"] * bool(failed) + [f"{', '.join(unscaled)} (scale)"] * bool(unscaled)
        _warn(f"{type(network).__name__}: groups that did not prove themselves are dropped: {'; '.join(what)}")
    return replace(symmetry, groups=groups)


def _failing(names: Sequence[str], holds: Any) -> list[str]:
    """Those of the names that do not hold, found by halves."""
    if not names or holds(names):
        return []
    if len(names) == 1:
        return list(names)
    middle = len(names) // 2
    found = _failing(names[:middle], holds) + _failing(names[middle:], holds)
    return found or list(names)  # each half holds alone, but not both together


def without(symmetry: Symmetry, dropped: Sequence[str]) -> Symmetry:
    """The same symmetry, these groups frozen."""
    if not dropped:
        return symmetry
    groups = {
        name: replace(group, parent=None if group.parent in dropped else group.parent)
        for name, group in symmetry.groups.items()
        if name not in dropped
    }

    def kept(factor: Factor) -> Factor:
        return (None if factor[0] in dropped else factor[0]), factor[1]

    axes = {name: tuple(_mapped(terms, kept) for terms in row) for name, row in symmetry.axes.items()}
    return replace(symmetry, groups=groups, axes=axes)


class Proof:
    """A network with random weights in float64, and its outputs."""

    def __init__(
        self,
        network: nn.Module,
        inputs: Inputs,
        *,
        names: Iterable[str] | None = None,
        seed: int = 0,
        train: bool = False,
    ) -> None:
        self.network = _in(copy.deepcopy(network), torch.float64).train(train)
        self.inputs = converted(inputs, torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.state = floating(self.network, names)
        self._jitter()
        self.weights = {name: tensor.detach().clone() for name, tensor in self.state.items()}
        self.before = self.outputs()
        if not self.before:
            raise ValueError("no number among what it returns")

    @torch.no_grad()
    def _jitter(self) -> None:
        """Away from initialisations at which much of a network has no effect: zeros, ones, equal rows."""
        for name, tensor in self.state.items():
            noise = torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor.copy_(tensor * (1 + 0.1 * noise) + (0.1 * spread + 0.02) * noise)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)

    def outputs(self) -> list[Tensor]:
        """Every output."""
        with torch.no_grad(), plainly(), Widened(), _same_randomness():
            found = tensors_of(self.network(*self.inputs[0], **self.inputs[1]))
        plain = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in found]
        return [tensor.double().clone() for tensor in plain]

    @torch.no_grad()
    def error(self, symmetry: Symmetry, names: Iterable[str], *, scaled: bool) -> float:
        """The largest difference that a random element of these groups makes, relative to the largest output."""
        tables = random_tables(symmetry.groups, self.generator, largest=2.0)
        names = set(names)
        permutations = {name: table for name, table in tables[0].items() if name in names}
        factors = [{key: t for key, t in part.items() if scaled and key[0] in names} for part in tables[1:]]
        for name, tensor in self.state.items():
            index, factor = positions(name, tensor.shape, symmetry.axes[name], symmetry.groups, permutations, *factors)
            tensor.copy_(self.weights[name].flatten()[index.flatten()].reshape(tensor.shape) * factor)
        after = self.outputs()
        for name, tensor in self.state.items():
            tensor.copy_(self.weights[name])
        return max((_difference(a, b) for a, b in zip(self.before, after, strict=True)), default=0.0)

    def holds(self, symmetry: Symmetry, names: Iterable[str], *, scaled: bool) -> bool:
        """Whether random elements of these groups leave the outputs as they are."""
        try:
            return all(self.error(symmetry, names, scaled=scaled) <= TOLERANCE for _ in range(ELEMENTS))
        except (RuntimeError, IndexError, ValueError):  # what the network cannot compute is no proof
            return False


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    same = (one == other) | (one.isnan() & other.isnan())
    finite = torch.where(same, 0.0, (one - other).abs())
    largest = one[one.isfinite()].abs().max() if bool(one.isfinite().any()) else torch.tensor(1.0)
    found = float(finite.max() / largest.clamp_min(1e-300)) if finite.numel() else 0.0
    return found if found == found else float("inf")


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Dropout in training mode drops the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Widened(TorchDispatchMode):
    """Computes in float64 also where a network asks for less."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in WIDE:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
