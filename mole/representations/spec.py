"""The canonical object: one flat vector per network, and the specification that reads it.

Dimensions: N networks (any leading shape), P parameters of one network.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mole.errors import MoleError
from mole.files import value_digest
from mole.representations.symmetry import Axes, derive_groups, permute_axes

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64,
    "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
"""What a state dict may hold. Whole numbers are counters (batch norm's), far below 2**24."""


def weights_digest(flat: Tensor) -> str:
    """SHA-256 of the bytes of flat weights (*N, P), in hex."""
    return hashlib.sha256(flat.contiguous().cpu().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One tensor of a network: where it lies in the flat vector, and what its axes are."""

    name: str
    shape: tuple[int, ...]
    offset: int
    axes: tuple[str | None, ...]
    """Per axis the group of interchangeable neurons it runs over, or None."""
    dtype: torch.dtype = torch.float32
    """Of the network's own tensor; the flat vector is float32 and holds every value of these types exactly."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class WeightSpec:
    """Names, shapes and interchangeable axes of a network's weights.

    Example:
        >>> spec = WeightSpec.of(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
        >>> spec.size, spec.groups
        (1210, {'0': 16})
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "WeightSpec":
        """The specification of `module`, its symmetry derived and proved numerically.

        Raises:
            MoleError: a tensor's dtype does not fit into float32, or it is shared by two names.
        """
        owners: dict[int, str] = {}
        state = module.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if id(tensor) in owners:
                raise MoleError(f"{name} and {owners[id(tensor)]} are one tensor; tied weights cannot be represented")
            owners[id(tensor)] = name
        return cls.of_state(state, derive_groups(module))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], axes: Axes | None = None) -> "WeightSpec":
        """The specification of a plain state dict; without `axes` nothing is known to be interchangeable.

        Raises:
            MoleError: a tensor's dtype does not fit into float32.
        """
        entries, offset = [], 0
        for name, tensor in state.items():
            if tensor.dtype not in DTYPES.values():
                legal = ", ".join(DTYPES)
                raise MoleError(f"{name} is {tensor.dtype}; legal is {legal}: convert with module.float()")
            shape = tuple(tensor.shape)
            entries.append(Entry(name, shape, offset, (axes or {}).get(name, (None,) * len(shape)), tensor.dtype))
            offset = entries[-1].stop
        return cls(tuple(entries))

    @property
    def size(self) -> int:
        """Parameters of one network, P."""
        return self.entries[-1].stop if self.entries else 0

    @cached_property
    def groups(self) -> dict[str, int]:
        """Each group of interchangeable neurons and how many there are."""
        found: dict[str, int] = {}
        for entry in self.entries:
            for group, length in zip(entry.axes, entry.shape, strict=True):
                if group is not None:
                    found[group] = length
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names, shapes and axes: equal for networks that one generator can serve."""
        return value_digest(self.to_json())

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """Weights as one vector.

        Args:
            state: name to tensor of shape (*N, *entry.shape), float32.

        Returns:
            (*N, P), in the order of `entries`.

        Raises:
            MoleError: naming every tensor that is missing, unexpected or of another shape.
        """
        self.check(state)
        first = state[self.entries[0].name]
        lead = first.shape[: first.ndim - len(self.entries[0].shape)]
        return torch.cat([state[e.name].reshape((*lead, e.size)).float() for e in self.entries], -1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of `flatten`: views into `flat` of shape (*N, P) where the dtype is float32."""
        if flat.shape[-1] != self.size:
            raise MoleError(f"a vector of {flat.shape[-1]} parameters; this network has {self.size}")
        lead = flat.shape[:-1]
        return {e.name: flat[..., e.offset : e.stop].reshape((*lead, *e.shape)).to(e.dtype) for e in self.entries}

    def permute(self, flat: Tensor, permutations: Mapping[str, Tensor]) -> Tensor:
        """Reorder interchangeable neurons: the same function, other weights.

        Args:
            flat: (*N, P).
            permutations: group to the order of its neurons; absent groups stay.
        """
        state = self.unflatten(flat)
        return self.flatten({e.name: permute_axes(state[e.name], e.axes, permutations) for e in self.entries})

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state whose names, shapes or dtypes are not these."""
        wanted, dtypes = {e.name: e.shape for e in self.entries}, {e.name: e.dtype for e in self.entries}
        faults = [f"{name} is missing (shape {shape})" for name, shape in wanted.items() if name not in state]
        faults += [f"{name} is unexpected" for name in state if name not in wanted]
        for name, shape in wanted.items():
            found = state.get(name)
            if found is not None and tuple(found.shape[found.ndim - len(shape) :]) != shape:
                faults.append(f"{name} has shape {tuple(found.shape)}, expected {shape}")
            elif found is not None and found.dtype != dtypes[name]:
                faults.append(f"{name} is {found.dtype}, expected {dtypes[name]}")
        if faults:
            raise MoleError("these weights do not fit the network: " + "; ".join(faults))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values that `from_json` reads back."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return [
            {"name": e.name, "shape": list(e.shape), "axes": list(e.axes), "dtype": names[e.dtype]}
            for e in self.entries
        ]

    @classmethod
    def from_json(cls, value: list[dict[str, Any]]) -> "WeightSpec":
        entries, offset = [], 0
        for item in value:
            shape, axes = tuple(item["shape"]), tuple(item["axes"])
            entries.append(Entry(item["name"], shape, offset, axes, DTYPES[item["dtype"]]))
            offset = entries[-1].stop
        return cls(tuple(entries))


def differences(one: WeightSpec, other: WeightSpec) -> str | None:
    """The first tensor that differs between two layouts, with both shapes; None if there is none."""
    first, second = ({e.name: (e.shape, e.dtype) for e in spec.entries} for spec in (one, other))
    for name in [*first, *second]:
        if first.get(name) != second.get(name):
            shapes = [found[0] if found else "absent" for found in (first.get(name), second.get(name))]
            dtypes = [found[1] if found else "" for found in (first.get(name), second.get(name))]
            kinds = f" ({dtypes[0]} and {dtypes[1]})" if shapes[0] == shapes[1] else ""
            return f"{name} is {shapes[0]} and {shapes[1]}{kinds}"
    return None
