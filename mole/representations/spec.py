"""The canonical object: one flat vector per network, a table of whole numbers, and the specification that reads them.

Dimensions: N networks (any leading shape), P parameters of one network, Q whole numbers of one network.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mole.errors import MoleError
from mole.files import value_digest
from mole.representations.dtypes import FLOATS, INTEGERS, NAMES, narrow, widen
from mole.representations.groups import AxisGroup, AxisTerms, Element, check_tables, positions, random_tables
from mole.representations.symmetry import Symmetry, derive
from mole.representations.trace import Flow


def weights_digest(flat: Tensor) -> str:
    """SHA-256 of the bytes of flat weights (*N, P), in hex."""
    return hashlib.sha256(flat.contiguous().cpu().numpy().tobytes()).hexdigest()


class WeightState(NamedTuple):
    """All that a network's state holds."""

    flat: Tensor
    """(*N, P), every floating-point number."""
    table: Tensor
    """(*N, Q) int64, every whole number: counters, index buffers, truth values."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a network: where it lies in the flat vector or in the table, and what its axes are."""

    name: str
    shape: tuple[int, ...]
    offset: int
    axes: tuple[AxisTerms, ...]
    """Per axis blocks of factors, each a group of interchangeable neurons or None."""
    dtype: torch.dtype = torch.float32
    """Of the network's own tensor."""
    role: str = "other"
    """What it is to its layer: `linear.weight`, `conv.bias`, `norm.running_mean`, `embedding.weight`, `other`."""
    aliases: tuple[str, ...] = ()
    """Further names of the same tensor (tied weights)."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.size

    @property
    def groups(self) -> tuple[str | None, ...]:
        """Per axis the one group that runs over all of it, or None."""
        return tuple(
            terms[0][0][0] if len(terms) == 1 and len(terms[0]) == 1 and terms[0][0][1] == size else None
            for terms, size in zip(self.axes, self.shape, strict=True)
        )

    @property
    def moves(self) -> frozenset[str]:
        """Every group that reorders something in it."""
        return frozenset(g for terms in self.axes for factors in terms for g, _ in factors if g is not None)


@dataclass(frozen=True)
class WeightSpec:
    """Names, shapes, dtypes, roles, tied names and interchangeable axes of a network's weights.

    Example:
        >>> spec = WeightSpec.of(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
        >>> spec.size, spec.groups["0"].size
        (1210, 16)
    """

    entries: tuple[Entry, ...]
    """Floating-point tensors, in the order of the flat vector."""
    table: tuple[Entry, ...] = ()
    """Tensors of whole numbers, in the order of the table."""
    groups: dict[str, AxisGroup] = field(default_factory=dict)
    """Interchangeable neurons, by name."""
    flow: Flow = field(default_factory=Flow)
    """The operation graph, as far as weights see it."""
    unknown: tuple[str, ...] = ()
    """Operations that have no rule, and froze what they touched."""

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @classmethod
    def of(cls, module: nn.Module, example_inputs: Any = None) -> "WeightSpec":
        """The specification of any network, its symmetry derived from a run and proved numerically.

        Args:
            module: the network.
            example_inputs: a tensor, a tuple of arguments or a dictionary of named ones that its forward takes.
                Without them some that may fit are tried.

        Raises:
            MoleError: a tensor is complex, quantised, or not initialised yet.

        Warns:
            SymmetryWarning: less is known to be interchangeable than might be.
        """
        state = module.state_dict(keep_vars=True)
        check_dtypes(state)
        found = cls.of_state(state, roles=_roles(module))
        return found.with_symmetry(derive(module, example_inputs))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], *, roles: Mapping[str, str] | None = None) -> "WeightSpec":
        """The specification of a plain state dict, of which nothing is known to be interchangeable.

        Raises:
            MoleError: a tensor is complex, quantised, or not initialised yet.
        """
        check_dtypes(state)
        names: dict[tuple[Any, ...], list[str]] = {}
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                names.setdefault(_identity(name, tensor), []).append(name)
        entries, table = list[Entry](), list[Entry]()
        for name, *aliases in names.values():
            tensor = state[name]
            row = entries if tensor.dtype in FLOATS else table
            shape = tuple(tensor.shape)
            axes = tuple((((None, size),),) for size in shape)
            role = (roles or {}).get(name, "other")
            offset = row[-1].stop if row else 0
            row.append(Entry(name, shape, offset, axes, tensor.dtype, role, tuple(aliases)))
        return cls(tuple(entries), tuple(table))

    def with_symmetry(self, symmetry: Symmetry) -> "WeightSpec":
        """The same tensors, with these groups."""
        entries = tuple(replace(e, axes=symmetry.axes.get(e.name, e.axes)) for e in self.entries)
        return replace(
            self, entries=entries, groups=dict(symmetry.groups), flow=symmetry.flow, unknown=symmetry.unknown
        )

    def with_axes(self, axes_to_group: Mapping[str, Sequence[str | None]]) -> "WeightSpec":
        """The same tensors, with groups that a person declares: tensor name to a group, or None, per axis.

        Nothing is proved; `mole.representations.proved` does that.

        Raises:
            MoleError: a name is unknown, a number of axes is wrong, or a group has two sizes.
        """
        sizes: dict[str, int] = {}
        entries, known = list[Entry](), {entry.name: entry for entry in self.entries}
        faults = [f"{name!r} is no tensor of this network" for name in axes_to_group if name not in known]
        for name, entry in known.items():
            given = axes_to_group.get(name, (None,) * len(entry.shape))
            if len(given) != len(entry.shape):
                faults.append(f"{name!r} has {len(entry.shape)} axes; {len(given)} are given")
                continue
            for group, size in zip(given, entry.shape, strict=True):
                if group is not None and sizes.setdefault(group, size) != size:
                    faults.append(f"group {group!r} has {sizes[group]} members, but {size} in {name!r}")
            axes = tuple((((group, size),),) for group, size in zip(given, entry.shape, strict=True))
            entries.append(replace(entry, axes=axes))
        if faults:
            raise MoleError("; ".join(faults))
        return replace(self, entries=tuple(entries), groups={g: AxisGroup(g, size) for g, size in sizes.items()})

    @property
    def size(self) -> int:
        """Floating-point numbers of one network, P."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def table_size(self) -> int:
        """Whole numbers of one network, Q."""
        return self.table[-1].stop if self.table else 0

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the flat vector: float32, or float64 where a tensor needs it."""
        return torch.float64 if any(e.dtype == torch.float64 for e in self.entries) else torch.float32

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names, shapes, dtypes and axes: equal for networks that one generator can serve."""
        return value_digest(self.to_json())

    # Networks in and out, bit for bit

    def encode(self, module: nn.Module | Mapping[str, Tensor]) -> WeightState:
        """The state of one network, bit for bit, also NaN and -0.0.

        Raises:
            MoleError: naming every tensor that does not fit.
        """
        state = module.state_dict(keep_vars=True) if isinstance(module, nn.Module) else module
        self.check(state)
        empty = [e.name for e in (*self.entries, *self.table) if state[e.name].is_meta]
        if empty:
            raise MoleError(f"{', '.join(empty)} has no data (it is on the meta device)")
        with torch.no_grad():
            parts = [widen(state[e.name].detach(), self.dtype).flatten().cpu() for e in self.entries]
            whole = [state[e.name].detach().to(torch.int64).flatten().cpu() for e in self.table]
        flat = torch.cat(parts) if parts else torch.empty(0)
        return WeightState(flat, torch.cat(whole) if whole else torch.empty(0, dtype=torch.int64))

    @torch.no_grad()
    def decode(self, state: WeightState, module: nn.Module) -> nn.Module:
        """Write a state into a network, in place; tied tensors stay tied. The inverse of `encode`.

        Raises:
            MoleError: the network is another one; naming the first tensor that differs, and both shapes.
        """
        wanted = module.state_dict(keep_vars=True)
        found = differences(self, WeightSpec.of_state(wanted))
        if found is not None:
            raise MoleError(f"another network than the one that was encoded: {found}")
        if state.flat.shape != (self.size,) or state.table.shape != (self.table_size,):
            shapes = tuple(state.flat.shape), tuple(state.table.shape)
            raise MoleError(f"a state of shapes {shapes}; this network has ({self.size},) and ({self.table_size},)")
        parts: dict[str, Tensor] = {}
        for entry in self.entries:
            part = state.flat[entry.offset : entry.stop].reshape(entry.shape)
            parts |= dict.fromkeys((entry.name, *entry.aliases), narrow(part, entry.dtype))
        for entry in self.table:
            part = state.table[entry.offset : entry.stop].reshape(entry.shape)
            parts |= dict.fromkeys((entry.name, *entry.aliases), part.to(entry.dtype))
        live = [*module.parameters(), *module.buffers()]
        mine = {id(tensor) for tensor in live}
        if any(id(wanted[name]) not in mine for name in parts):  # it hands out copies: its own way in, then
            module.load_state_dict({**wanted, **parts})
            return module
        for entry in (*self.entries, *self.table):
            try:
                wanted[entry.name].data.copy_(parts[entry.name])
            except RuntimeError as error:
                raise MoleError(f"{entry.name} cannot be written ({' '.join(str(error).split())[:120]})") from None
        return module

    # Populations as tensors

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """Weights as one vector, differentiable.

        Args:
            state: name to tensor of shape (*N, *entry.shape).

        Returns:
            (*N, P), in the order of `entries`.

        Raises:
            MoleError: naming every tensor that is missing, unexpected or of another shape.
        """
        self.check(state)
        first = state[self.entries[0].name]
        lead = first.shape[: first.ndim - len(self.entries[0].shape)]
        return torch.cat([state[e.name].reshape((*lead, e.size)).to(self.dtype) for e in self.entries], -1)

    def flatten_table(self, state: Mapping[str, Tensor]) -> Tensor:
        """Whole numbers (*N, Q) int64 of a state like that of `flatten`."""
        first = state[self.entries[0].name]
        lead = first.shape[: first.ndim - len(self.entries[0].shape)]
        parts = [state[e.name].reshape((*lead, e.size)).to(torch.int64) for e in self.table]
        return torch.cat(parts, -1) if parts else torch.empty(*lead, 0, dtype=torch.int64)

    def unflatten(self, flat: Tensor, table: Tensor | None = None) -> dict[str, Tensor]:
        """The inverse of `flatten`: views into `flat` (*N, P) where the dtype is the same.

        Whole numbers come from `table` (*N, Q), and are 0 without it. Tied tensors stand under all of their names.
        """
        if flat.shape[-1] != self.size:
            raise MoleError(f"a vector of {flat.shape[-1]} parameters; this network has {self.size}")
        lead = flat.shape[:-1]
        if table is None and self.table:
            table = torch.zeros((*lead, self.table_size), dtype=torch.int64, device=flat.device)
        found: dict[str, Tensor] = {}
        for source, entries in ((flat, self.entries), (table, self.table)):
            for e in entries:
                assert source is not None
                part = source[..., e.offset : e.stop].reshape((*lead, *e.shape)).to(e.dtype)
                found |= dict.fromkeys((e.name, *e.aliases), part)
        return found

    # Symmetry

    def element(
        self,
        permutations: Mapping[str, Tensor] | None = None,
        scales: Mapping[tuple[str, int], Tensor] | None = None,
        signs: Mapping[tuple[str, int], Tensor] | None = None,
    ) -> Element:
        """The group element that reorders, scales and flips neurons.

        Args:
            permutations: group to the order of its neurons, (S,), or (S', S) where it has a parent of S' members.
            scales: (group, number of one of its scalings) to log factors, shaped like a permutation.
            signs: (group, number of one of its signs) to 1 and -1, likewise.

        Raises:
            MoleError: a group is unknown, or something is no permutation of it.
        """
        check_tables(self.groups, permutations or {})
        index, factor = torch.arange(self.size), torch.ones(self.size, dtype=torch.float64)
        for e in self.entries:
            if e.moves:
                moved, scaled = positions(
                    e.name, e.shape, e.axes, self.groups, permutations or {}, scales or {}, signs or {}
                )
                index[e.offset : e.stop] = moved.flatten() + e.offset
                factor[e.offset : e.stop] = scaled.flatten()
        return Element(index, factor)

    def random_element(
        self, seed: int | torch.Generator, *, permute: bool = True, scale: float = 1.0, sign: bool = False
    ) -> Element:
        """A random element: orders, factors from 1 / `scale` to `scale`, signs."""
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        permutations, scales, signs = random_tables(self.groups, generator, largest=scale)
        return self.element(permutations if permute else {}, scales if scale != 1 else {}, signs if sign else {})

    def permute(self, flat: Tensor, permutations: Mapping[str, Tensor]) -> Tensor:
        """Reorder interchangeable neurons of (*N, P): the same function, other weights."""
        return self.element(permutations).act(flat)

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state whose names, shapes or dtypes are not these."""
        known = {e.name: e for e in (*self.entries, *self.table)}
        tied = {alias for e in known.values() for alias in e.aliases}
        faults = [f"{name} is missing (shape {e.shape})" for name, e in known.items() if name not in state]
        faults += [
            f"{name} is unexpected" for name, tensor in state.items()
            if name not in known and name not in tied and isinstance(tensor, Tensor)
        ]  # fmt: skip
        for name, entry in known.items():
            found = state.get(name)
            if found is not None and tuple(found.shape[found.ndim - len(entry.shape) :]) != entry.shape:
                faults.append(f"{name} has shape {tuple(found.shape)}, expected {entry.shape}")
            elif found is not None and found.dtype != entry.dtype:
                faults.append(f"{name} is {found.dtype}, expected {entry.dtype}")
        if faults:
            raise MoleError("these weights do not fit the network: " + "; ".join(faults))

    # Files

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return {
            "tensors": [_entry_to_json(e) for e in (*self.entries, *self.table)],
            "flow": {
                "reads": {name: list(made) for name, made in self.flow.reads.items()},
                "acts_on": {name: list(made) for name, made in self.flow.acts_on.items()},
                "residual": [list(pair) for pair in self.flow.residual],
            },
            "unknown": list(self.unknown),
            "groups": [
                {
                    "name": g.name, "size": g.size, "parent": g.parent,
                    "scalings": [[list(part) for part in one] for one in g.scalings],
                    "signs": [[list(part) for part in one] for one in g.signs],
                }
                for g in self.groups.values()
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "WeightSpec":
        entries, table = list[Entry](), list[Entry]()
        for item in value["tensors"]:
            row = entries if NAMES[item["dtype"]] in FLOATS else table
            row.append(_entry_from_json(item, row[-1].stop if row else 0))
        groups = {
            g["name"]: AxisGroup(
                g["name"], g["size"], g["parent"],
                tuple(tuple((t, a, p) for t, a, p in one) for one in g["scalings"]),
                tuple(tuple((t, a, p) for t, a, p in one) for one in g["signs"]),
            )
            for g in value["groups"]
        }  # fmt: skip
        flow = Flow(
            {name: tuple(made) for name, made in value["flow"]["reads"].items()},
            {name: tuple(made) for name, made in value["flow"]["acts_on"].items()},
            [(one, other) for one, other in value["flow"]["residual"]],
        )
        return cls(tuple(entries), tuple(table), groups, flow, tuple(value["unknown"]))


def _identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """The same for two names of one tensor."""
    if tensor.numel() == 0 or is_lazy(tensor):
        return (name,)
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)


def check_dtypes(state: Mapping[str, Tensor]) -> None:
    """Refuse what is no plain number.

    Raises:
        MoleError: naming every such tensor.
    """
    faults = []
    for name, tensor in state.items():
        if is_lazy(tensor):
            faults.append(f"{name} is not initialised yet: run the network once")
        elif isinstance(tensor, Tensor) and tensor.is_complex():
            faults.append(f"{name} is {tensor.dtype}: store torch.view_as_real of it")
        elif isinstance(tensor, Tensor) and (tensor.dtype not in {**FLOATS, **INTEGERS} or tensor.is_quantized):
            faults.append(f"{name} is {tensor.dtype}; legal is any plain dtype of real or whole numbers")
    if faults:
        raise MoleError("; ".join(faults))


KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (nn.Linear, "linear"),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transposed"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "norm"),
    (nn.Embedding, "embedding"),
    (nn.MultiheadAttention, "attention"),
    (nn.RNNBase, "recurrent"),
)


def _roles(module: nn.Module) -> dict[str, str]:
    """What each tensor is to its layer."""
    found: dict[str, str] = {}
    for prefix, layer in module.named_modules():
        kind = next((name for types, name in KINDS if isinstance(layer, types)), "other")
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        for name, _ in own:
            found[f"{prefix}.{name}" if prefix else name] = f"{kind}.{name}" if kind != "other" else "other"
    return found


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    """An axis is null, a group's name, or blocks of factors, each a name or a size."""
    axes: list[Any] = []
    for terms, size in zip(entry.axes, entry.shape, strict=True):
        if terms == (((None, size),),) or size == 1:
            axes.append(None)
        elif len(terms) == 1 and len(terms[0]) == 1:
            axes.append(terms[0][0][0])
        else:
            axes.append([[[group, s] for group, s in factors] for factors in terms])
    names = {dtype: name for name, dtype in NAMES.items()}
    return {
        "name": entry.name, "shape": list(entry.shape), "dtype": names[entry.dtype], "role": entry.role,
        "aliases": list(entry.aliases), "axes": axes,
    }  # fmt: skip


def _entry_from_json(item: Mapping[str, Any], offset: int) -> Entry:
    axes: list[AxisTerms] = []
    for axis, size in zip(item["axes"], item["shape"], strict=True):
        if axis is None or isinstance(axis, str):
            axes.append((((axis, size),),))
        else:
            axes.append(tuple(tuple((group, s) for group, s in factors) for factors in axis))
    shape, aliases = tuple(item["shape"]), tuple(item["aliases"])
    return Entry(item["name"], shape, offset, tuple(axes), NAMES[item["dtype"]], item["role"], aliases)


def differences(one: WeightSpec, other: WeightSpec) -> str | None:
    """The first tensor that differs between two layouts, with both shapes; None if there is none."""
    first, second = ({e.name: (e.shape, e.dtype) for e in (*s.entries, *s.table)} for s in (one, other))
    for name in [*first, *second]:
        if first.get(name) != second.get(name):
            shapes = [found[0] if found else "absent" for found in (first.get(name), second.get(name))]
            dtypes = [found[1] if found else "" for found in (first.get(name), second.get(name))]
            kinds = f" ({dtypes[0]} and {dtypes[1]})" if shapes[0] == shapes[1] else ""
            return f"{name} is {shapes[0]} and {shapes[1]}{kinds}"
    return None
