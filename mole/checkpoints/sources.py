"""Where the weights and the index of a zoo come from: its shards, or memory.

Dimensions: n checkpoints, P parameters.
"""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mole.checkpoints.format import INDEX_KEYS, Dtype, ShardFiles, weights_shape
from mole.errors import CorruptFileError, MoleError
from mole.reading.tables import read_parquet
from mole.representations import WeightSpec

OPEN_SHARDS = 256
"""Shards that stay mapped; the kernel keeps the bytes, this keeps the handles."""


class Source(Protocol):
    """Where the weights of checkpoints are; rows are numbered as in the index."""

    def read(self, rows: Tensor) -> Tensor:
        """Weights (n, P) float32 of the checkpoints at `rows` (n,)."""
        ...

    def table(self, row: int) -> Tensor | None:
        """Whole numbers (Q,) of one checkpoint; None where there are none."""
        ...


class MemorySource:
    """Weights (n, P) in memory."""

    def __init__(self, weights: Tensor, table: Tensor | None = None) -> None:
        self.weights, self.whole = weights, table

    def read(self, rows: Tensor) -> Tensor:
        return self.weights.index_select(0, rows)

    def table(self, row: int) -> Tensor | None:
        return self.whole[row] if self.whole is not None else None


class ShardSource:
    """Weights in the shards of a zoo, mapped into memory when they are first read."""

    def __init__(self, files: list[ShardFiles], sizes: list[int], dtype: Dtype) -> None:
        self.files = files
        self.dtype: Dtype = dtype
        self.ends = torch.tensor(sizes).cumsum(0)
        self.open: OrderedDict[int, Tensor] = OrderedDict()

    def read(self, rows: Tensor) -> Tensor:
        if len(self.files) == 1:
            return self._shard(0).index_select(0, rows).float()
        shard = torch.searchsorted(self.ends, rows, right=True)
        inside = rows - torch.cat([torch.zeros(1, dtype=torch.int64), self.ends])[shard]
        numbers = shard.unique().tolist()
        if len(numbers) == 1:
            return self._shard(numbers[0]).index_select(0, inside).float()
        out = torch.empty(len(rows), self._shard(numbers[0]).shape[1])
        for number in numbers:
            here = (shard == number).nonzero()[:, 0]
            out.index_copy_(0, here, self._shard(number).index_select(0, inside[here]).float())
        return out

    def table(self, row: int) -> Tensor | None:
        shard = int(torch.searchsorted(self.ends, torch.tensor([row]), right=True))
        inside = row - (int(self.ends[shard - 1]) if shard else 0)
        path = self.files[shard].weights
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice("table")[inside] if "table" in file.keys() else None  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"{path}: {error}") from None

    def _shard(self, number: int) -> Tensor:
        """Weights (n, P) of a shard, mapped: only what is read is loaded."""
        if number in self.open:
            self.open.move_to_end(number)
            return self.open[number]
        path = self.files[number].weights
        weights_shape(path, self.dtype)  # a file cut off since the zoo was opened is said, not a bus error
        tensor = self.open[number] = self._mapped(path)
        if len(self.open) > OPEN_SHARDS:
            self.open.popitem(last=False)
        return tensor

    def _mapped(self, path: Path) -> Tensor:
        """The weights of a file, mapped; where there is no room for another mapping, the older ones are given up."""
        for give_up in (True, False):
            try:
                with safe_open(path, framework="pt") as file:
                    return file.get_tensor("weights")
            except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not re.search(
                    "memory|os error 12", str(error), re.IGNORECASE
                ):
                    raise CorruptFileError(f"{path}: {error}") from None
                if not give_up:
                    break
                self.open.clear()
        raise MoleError(f"{path}: no memory to read it; give the process more, or choose a smaller harvest.group_size")


def read_indexes(
    files: list[ShardFiles], dtype: Dtype, layouts: dict[str, WeightSpec]
) -> tuple[list[pa.Table], list[int]]:
    """The index of every shard and its rows, checked against its weights' header."""
    tables, sizes, faults = [], [], []
    for shard in files:
        try:
            table = read_parquet(shard.index, dictionaries=["run", "layout", "digest"])
            rows, size = weights_shape(shard.weights, dtype)
            if fault := index_fault(table):
                raise CorruptFileError(f"{shard.index}: {fault}")
            missing = set(INDEX_KEYS) - set(table.column_names)
            unknown = missing or set(table["layout"].unique().to_pylist()) - layouts.keys()
            sizes_found = set() if unknown else {layouts[key].size for key in table["layout"].unique().to_pylist()}
            if unknown or len(table) != rows or sizes_found != {size}:
                raise CorruptFileError(
                    f"{shard.index}: {len(table)} checkpoints of {sorted(sizes_found)} parameters, but "
                    f"{shard.weights.name} holds {rows} of {size}" + (f"; unknown {sorted(unknown)}" if unknown else "")
                )
        except CorruptFileError as error:
            faults.append(str(error))
        except (pa.ArrowException, OSError, KeyError) as error:
            faults.append(f"{shard.index}: cannot be read ({' '.join(str(error).split())[:200]})")
        else:
            tables.append(table)
            sizes.append(rows)
    if faults:
        raise CorruptFileError("; ".join(faults) + "; make those shards again")
    return tables, sizes


def index_fault(table: pa.Table) -> str | None:
    """What makes no sense in the index of a shard; None if all does."""
    wanted = {"run": "texts", "layout": "texts", "digest": "texts", "step": "whole numbers", "diverged": "truth values"}
    is_kind = {"texts": _is_text, "whole numbers": pa.types.is_integer, "truth values": pa.types.is_boolean}
    for name, kind in wanted.items():
        if name not in table.column_names:
            continue  # named elsewhere
        column = table[name]
        unknown = column.null_count if name != "diverged" else 0  # where a callback has said nothing of it
        if not is_kind[kind](column.type) or unknown:
            nulls = f", {column.null_count} of them missing" if column.null_count else ""
            return f"column {name} holds {column.type}{nulls}; legal are {kind}"
    if "step" in table.column_names and len(table) and int(table["step"].to_numpy().min()) < 0:
        return "column step goes below 0"
    if {"run", "step"} <= set(table.column_names):
        pairs = table.select(["run", "step"]).unify_dictionaries().group_by(["run", "step"]).aggregate([])
        if len(pairs) != len(table):
            return f"{len(table) - len(pairs)} of its checkpoints have the run and the step of another one"
    return None


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)


def alike(tables: list[pa.Table]) -> list[pa.Table]:
    """The same tables; a column of different types becomes one of numbers if it can, else one of texts.

    A hyper-parameter may be a number in one training and a word in another.
    """
    kinds: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            if not pa.types.is_null(field.type) and not pa.types.is_dictionary(field.type):
                kinds.setdefault(field.name, set()).add(field.type)
    mixed = {name: _common(found) for name, found in kinds.items() if len(found) > 1}
    return [_cast(table, mixed) for table in tables] if mixed else tables


def _common(kinds: set[pa.DataType]) -> pa.DataType | None:
    """What all of these can be cast to; None if that is for Arrow to find."""
    if any(pa.types.is_nested(kind) for kind in kinds):
        return None
    if any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds):
        return pa.string()
    return pa.float64() if any(pa.types.is_boolean(kind) for kind in kinds) else None


def _cast(table: pa.Table, wanted: dict[str, pa.DataType | None]) -> pa.Table:
    for name, kind in wanted.items():
        if kind is None or name not in table.column_names:
            continue
        place, column = table.column_names.index(name), table[name]
        if pa.types.is_boolean(column.type) and kind == pa.float64():
            column = column.cast(pa.int8())
        table = table.set_column(place, name, column.cast(kind))
    return table
