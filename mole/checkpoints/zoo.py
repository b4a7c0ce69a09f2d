"""A zoo of checkpoint histories: its index in memory, its weights where they are, on disk or in memory.

Dimensions: R runs, n checkpoints, P parameters.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mole.checkpoints.format import INDEX_KEYS, Header, read_header, read_layouts, shards
from mole.checkpoints.sources import MemorySource, ShardSource, Source, alike, read_indexes
from mole.errors import MoleError
from mole.files import value_digest
from mole.representations import WeightSpec, differences, weights_digest


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One kept state of one run; two are equal if run, step and weights are."""

    run: str
    step: int
    values: dict[str, Any]
    """Metrics and factors."""
    weights: Tensor
    """(P,) float32."""
    spec: WeightSpec
    table: Tensor | None = None
    """(Q,) int64, whole numbers."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checkpoint):
            return False
        return (self.run, self.step) == (other.run, other.step) and torch.equal(self.weights, other.weights)

    def __hash__(self) -> int:
        return hash((self.run, self.step))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the network's own tensors."""
        return self.spec.unflatten(self.weights, self.table)


class Zoo:
    """Histories of many trainings, in order of run and step; opening reads the index, never the weights.

    Args:
        path: folder of the zoo.

    Raises:
        MoleError: there is no zoo, or nothing in it yet.
        CorruptFileError: naming every file that is missing or truncated. Bits that were flipped are
            found by `mole zoo verify`, which reads every byte.

    Example:
        >>> zoo = mole.Zoo("runs/digits/zoo")
        >>> good = zoo.filter(loss=lambda loss: loss < 0.2)
        >>> weights = good.read(torch.arange(8))
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        header, files = read_header(folder), shards(folder)
        layouts = read_layouts(folder)  # after the shards, whose layouts were written before them
        if not files:
            raise MoleError(f"{folder}: no finished shard; run the harvest stage, or whatever fills this zoo")
        tables, sizes = read_indexes(files, header.dtype, layouts)
        try:
            index = pa.concat_tables(alike(tables), promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise MoleError(f"{folder}: the shards disagree on what a column holds ({error})") from None
        source = ShardSource(files, sizes, header.dtype)
        self.digest = value_digest(sorted(index["digest"].unique().to_pylist()))
        """Identity of the zoo: of all its shards, also where only a part of them was chosen."""
        self._build(str(folder), header, layouts, index, source, torch.arange(len(index)))

    @classmethod
    def of(
        cls,
        spec: WeightSpec,
        columns: dict[str, Any],
        weights: Tensor,
        *,
        table: Tensor | None = None,
        metric: str = "loss",
        name: str = "in memory",
    ) -> "Zoo":
        """A zoo in memory: columns `run`, `step`, metrics and factors; weights (n, P), whole numbers (n, Q)."""
        count = len(weights)
        full = {"diverged": [False] * count, **columns, "layout": [spec.fingerprint[:16]] * count}
        arrays = {k: pa.array(v.numpy() if isinstance(v, Tensor) else list(v)) for k, v in full.items()}
        zoo = cls.__new__(cls)
        layouts = {spec.fingerprint[:16]: spec}
        zoo.digest = weights_digest(weights)
        header = Header(metric, "float32", {})
        zoo._build("in memory", header, layouts, pa.table(arrays), MemorySource(weights, table), torch.arange(count))
        return zoo

    def _build(
        self, name: str, header: Header, layouts: dict[str, WeightSpec], index: pa.Table, source: Source, rows: Tensor
    ) -> None:
        self.name, self.header, self.source = name, header, source
        codes = _codes(index, "run")
        steps = index["step"].to_numpy()
        if not _in_order(codes, steps):
            order = np.lexsort((steps, codes))
            index, rows, codes = index.take(pa.array(order)), rows[torch.from_numpy(order)], codes[order]
        self.index: pa.Table = index
        """Run, step, metrics and factors of every checkpoint, in order of run and step."""
        self.rows = rows
        used = set(index["layout"].unique().to_pylist())
        self.layouts = {key: spec for key, spec in layouts.items() if key in used}
        cuts = np.flatnonzero(np.diff(codes)) + 1
        self.bounds = torch.from_numpy(np.concatenate([[0], cuts, [len(codes)]]).astype(np.int64))
        """(R + 1,): the checkpoints of run r are those from `bounds[r]` to `bounds[r + 1]`."""

    def __len__(self) -> int:
        """Number of checkpoints, n."""
        return len(self.rows)

    @property
    def runs(self) -> int:
        """Number of runs, R."""
        return len(self.bounds) - 1

    @property
    def first(self) -> Tensor:
        """(R,), where each run's first checkpoint is."""
        return self.bounds[:-1]

    @property
    def last(self) -> Tensor:
        """(R,), where each run's last checkpoint is."""
        return self.bounds[1:] - 1

    @property
    def spec(self) -> WeightSpec:
        """The layout of the networks.

        Raises:
            MoleError: there are several; a filter must choose.
        """
        if len(self.layouts) == 1:
            return next(iter(self.layouts.values()))
        specs = list(self.layouts.values())
        found = differences(specs[0], specs[1]) or "tensors in another order"
        raise MoleError(f"{self.name}: networks of {len(specs)} layouts ({found}); filter by a factor first")

    @property
    def metric(self) -> str:
        """Name of the metric that generators are conditioned on."""
        return self.header.metric

    @cached_property
    def loss(self) -> Tensor:
        """(n,) float32: the conditioning metric of every checkpoint; NaN where it is not known."""
        if self.metric not in self.index.column_names or not _is_number(self.index[self.metric].type):
            return torch.full((len(self),), torch.nan)
        return torch.from_numpy(self.column(self.metric).astype(np.float32))

    def column(self, name: str) -> np.ndarray:
        """One column of the index: (n,).

        Raises:
            MoleError: there is no such column.
        """
        if name not in self.index.column_names:
            raise MoleError(f"{self.name}: no column {name!r}; it has {', '.join(self.index.column_names)}")
        return self.index[name].to_numpy()

    @property
    def columns(self) -> list[str]:
        """Names of metrics and factors."""
        return [name for name in self.index.column_names if name not in (*INDEX_KEYS, "digest")]

    def read(self, which: Tensor | Sequence[int]) -> Tensor:
        """Weights (m, P) float32 of the checkpoints at these places (m,) of the index."""
        _ = self.spec
        return self.source.read(self.rows[torch.as_tensor(which)])

    @overload
    def __getitem__(self, place: int) -> Checkpoint: ...
    @overload
    def __getitem__(self, place: slice) -> "Zoo": ...
    def __getitem__(self, place: int | slice) -> "Checkpoint | Zoo":
        if isinstance(place, slice):
            return self._part(np.arange(len(self))[place], f"checkpoints {place.start} to {place.stop}")
        place = operator.index(place)
        if not -len(self) <= place < len(self):
            raise IndexError(f"checkpoint {place} of {len(self)}")
        place %= len(self)
        row = {name: self.index[name][place].as_py() for name in self.index.column_names}
        values = {name: row[name] for name in self.columns}
        weights = self.source.read(self.rows[place : place + 1])[0]
        table = self.source.table(int(self.rows[place]))
        return Checkpoint(row["run"], row["step"], values, weights, self.layouts[row["layout"]], table)

    def __iter__(self) -> Iterator[Checkpoint]:
        return (self[place] for place in range(len(self)))

    def chunks(self, size: int = 4096) -> Iterator[Tensor]:
        """Every checkpoint's weights, in parts (size, P) of bounded memory."""
        for low in range(0, len(self), size):
            yield self.read(torch.arange(low, min(low + size, len(self))))

    def batches(self, size: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random batches: places in the index (size,), and weights (size, P)."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            which = torch.randint(len(self), (size,), generator=generator)
            yield which, self.read(which)

    def filter(self, **wanted: Any) -> "Zoo":
        """The checkpoints whose columns have these values, are among these values, or satisfy these functions.

        Args:
            wanted: column to a value, a list of values, or a function from the column (n,) to (n,) bool.

        Raises:
            MoleError: there is no such column, or nothing is left.
        """
        mask = np.ones(len(self), bool)
        for name, want in wanted.items():
            values = self.column(name)
            if isinstance(want, Callable):
                mask &= np.asarray(want(values), bool)
            elif pa.types.is_list(self.index[name].type):
                among = want if want and isinstance(next(iter(want)), list | tuple) else [want]
                mask &= np.array([any(list(value) == list(one) for one in among) for value in values])
            elif isinstance(want, list | tuple | set):
                mask &= np.isin(values, list(want))
            else:
                mask &= values == want
        return self._part(np.flatnonzero(mask), ", ".join(wanted))

    def finished(self) -> "Zoo":
        """The checkpoints of runs that did not diverge, whose conditioning metric is a finite number."""
        bounds = self.bounds.numpy()
        diverged = np.logical_or.reduceat(self.column("diverged").astype(bool), bounds[:-1])  # one row tells of a run
        good = ~np.repeat(diverged, np.diff(bounds)) & np.isfinite(self.loss.numpy())
        if not good.any():
            raise MoleError(f"{self.name}: {self._nothing_finished(diverged)}")
        return self if good.all() else self._part(np.flatnonzero(good), f"diverged, {self.metric}")

    def _nothing_finished(self, diverged: np.ndarray) -> str:
        """Why no checkpoint of any run can be learned from."""
        if diverged.all():
            return "every run diverged; lower task.learning_rate"
        if self.metric not in self.index.column_names or not np.isfinite(self.loss.numpy()).any():
            metrics = [name for name in self.columns if name not in ("seed", "source", "content")]
            return (
                f"no checkpoint has a number for the metric {self.metric!r}, which generators are conditioned on; "
                f"its columns are {', '.join(metrics) or 'none'}: choose another metric when harvesting or importing"
            )
        return f"every run that has the metric {self.metric!r} diverged; lower task.learning_rate"

    def of_runs(self, runs: slice) -> "Zoo":
        """The runs at these places, in their order."""
        low, high, _ = runs.indices(self.runs)
        return self._part(np.arange(int(self.bounds[low]), int(self.bounds[max(low, high)])), "runs")

    def split_by_run(self, heldout: int) -> tuple["Zoo", "Zoo"]:
        """Training runs and the last `heldout` runs, which share nothing with them."""
        if not 0 < heldout < self.runs:
            raise MoleError(f"cannot hold out {heldout} of {self.runs} runs; legal is 1 to {self.runs - 1}")
        return self.of_runs(slice(0, self.runs - heldout)), self.of_runs(slice(self.runs - heldout, None))

    def _part(self, places: np.ndarray, why: str) -> "Zoo":
        if not len(places):
            raise MoleError(f"{self.name}: no checkpoint is left ({why}); the zoo is {self!r}")
        zoo = type(self).__new__(type(self))
        zoo.digest = self.digest
        rows = self.rows[torch.from_numpy(places)]
        zoo._build(self.name, self.header, self.layouts, self.index.take(pa.array(places)), self.source, rows)
        return zoo

    def faults(self) -> list[str]:
        """What makes no sense in the zoo as a whole, a line each; every weight is read."""
        told = []
        alike = (np.diff(_codes(self.index, "run")) == 0) & (np.diff(self.index["step"].to_numpy()) == 0)
        if alike.any():
            told.append(f"{self.name}: {int(alike.sum())} checkpoints have the run and the step of another one")
        if self.metric in self.index.column_names and not _is_number(self.index[self.metric].type):
            told.append(
                f"{self.name}: the metric {self.metric} holds {self.index[self.metric].type}; legal are numbers"
            )
        odd = sum(int((~self.source.read(rows).isfinite().all(1)).sum()) for spec_rows in self._rows_by_layout()
                  for rows in spec_rows.split(4096))  # fmt: skip
        if odd:
            told.append(f"{self.name}: {odd} checkpoints have NaN or infinite weights")
        return told

    def _rows_by_layout(self) -> list[Tensor]:
        layouts = np.asarray(self.index["layout"].to_pylist())
        return [self.rows[torch.from_numpy(np.flatnonzero(layouts == layout))] for layout in self.layouts]

    def __repr__(self) -> str:
        sizes = " or ".join(sorted({f"{spec.size:,}" for spec in self.layouts.values()}))
        known = self.loss[self.loss.isfinite()]
        losses = f"{float(known.min()):.4g} to {float(known.max()):.4g}" if len(known) else "unknown"
        return (
            f"Zoo({self.name}: {self.runs:,} runs, {len(self):,} checkpoints of {sizes} parameters, "
            f"{self.header.dtype}, {self.metric} {losses}; columns {', '.join(self.columns)})"
        )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


def _codes(index: pa.Table, name: str) -> np.ndarray:
    """Whole numbers in the order of the texts of a column."""
    column = index[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string())
    if not isinstance(column, pa.DictionaryArray):
        column = column.dictionary_encode()
    names = column.dictionary.to_numpy(zero_copy_only=False)
    ranks = np.empty(len(names), np.int64)
    ranks[np.argsort(names, kind="stable")] = np.arange(len(names))
    return ranks[column.indices.to_numpy()]


def _in_order(codes: np.ndarray, steps: np.ndarray) -> bool:
    later = np.diff(codes)
    return bool(((later > 0) | ((later == 0) & (np.diff(steps) > 0))).all())
