"""Checkpoints that arrive one by one, gathered into shards.

Dimensions: n checkpoints, P parameters.
"""

import time
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mole.checkpoints.format import plain, shards
from mole.checkpoints.writer import ZooWriter
from mole.errors import CorruptFileError
from mole.reading.tables import read_parquet
from mole.representations import WeightSpec

DEFAULTS = {"diverged": False}
"""What a column holds where a checkpoint says nothing of it; others hold nothing."""
SHARD_BYTES, SHARD_ROWS = 2**26, 4096
"""A shard is written once it has so many bytes or rows."""


class Buffer:
    """Gathers checkpoints of one layout and writes them as shards `<writer>-00000` and on."""

    def __init__(self, writer: ZooWriter, spec: WeightSpec, family: str | None = None) -> None:
        self.writer, self.spec = writer, spec
        self.family = family or f"{writer.name}-"
        """What the names of shards begin with whose checkpoints count as written before."""
        prefix = f"{writer.name}-"
        mine = [files for files in shards(writer.folder) if files.name.startswith(prefix)]
        numbers = [int(end) for files in mine if (end := files.name.removeprefix(prefix)).isdigit()]
        self.number = max(numbers, default=-1) + 1
        self._clear()

    def _clear(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self.weights: list[Tensor] = []
        self.tables: list[Tensor] = []
        self.since = time.monotonic()
        """When the first checkpoint of the next shard could have come."""

    @property
    def is_full(self) -> bool:
        """Whether a shard's worth of checkpoints has gathered."""
        count = len(self.weights)
        return count >= SHARD_ROWS or count * self.spec.size * 4 >= SHARD_BYTES

    def add(self, row: dict[str, Any], flat: Tensor, table: Tensor) -> bool:
        """One more checkpoint: its columns, its weights (P,) and its whole numbers (Q,).

        Returns:
            Whether it was taken: every weight is a finite number in the zoo's dtype.
        """
        stored = self.writer.stored(self.spec, flat.detach().cpu())
        if not stored.isfinite().all():
            return False
        count = len(self.weights)
        for name in row.keys() - self.columns.keys():
            self.columns[name] = [None] * count
        for name, values in self.columns.items():
            values.append(plain(row.get(name, DEFAULTS.get(name))))
        self.weights.append(stored)
        self.tables.append(table.detach().cpu())
        return True

    def update_last(self, values: dict[str, Any]) -> None:
        """Set columns of the checkpoint that came last."""
        for name, value in values.items():
            self.columns.setdefault(name, [None] * len(self.weights))[-1] = value

    def set_all(self, name: str, value: Any) -> None:
        """Give a column this value in every checkpoint that has not been written yet."""
        self.columns[name] = [value] * len(self.weights)

    def leave_out(self, known: Collection[tuple[str, int]]) -> list[dict[str, Any]]:
        """Forget gathered checkpoints whose run and step another writer has written; returns their columns."""
        keys = list(zip(self.columns.get("run", ()), self.columns.get("step", ()), strict=True))
        rows = [row for row, key in enumerate(keys) if key not in known]
        gone = [{name: values[row] for name, values in self.columns.items()}
                for row, key in enumerate(keys) if key in known]  # fmt: skip
        if gone:
            self.columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
            self.weights, self.tables = ([part[row] for row in rows] for part in (self.weights, self.tables))
        return gone

    def flush(self) -> None:
        """Write what has gathered."""
        if self.weights:
            columns = dict(sorted(self.columns.items()))
            name = f"{self.writer.name}-{self.number:05d}"
            weights, table = torch.stack(self.weights), torch.stack(self.tables)
            self.number += 1
            self._clear()  # also if the disk is full: the next shard is not to fail for this one
            self.writer.write(name, self.spec, weights, columns, table=table)

    def close(self) -> None:
        """Write what has gathered, and let the name go."""
        try:
            self.flush()
        finally:
            self.writer.close()

    def last_step(self, run: str) -> int | None:
        """The last step of a run that this writer has written before; None if there is none."""
        steps = [step for name, step in self.written() if name == run]
        return max(steps, default=None)

    def written(self) -> dict[tuple[str, int], str | None]:
        """Run and step of every checkpoint of this family that is in the zoo now, and its `content`, if it has one."""
        found: dict[tuple[str, int], str | None] = {}
        for files in shards(self.writer.folder):
            if not files.name.startswith(self.family) or not files.name.rpartition("-")[2].isdigit():
                continue
            table = read_parquet(files.index, ["content", "run", "step"])
            if missing := {"run", "step"} - set(table.column_names):
                raise CorruptFileError(f"{files.index}: no column {', '.join(sorted(missing))}; make that shard again")
            keys = zip(table["run"].to_pylist(), table["step"].to_pylist(), strict=True)
            contents = table["content"].to_pylist() if "content" in table.column_names else [None] * len(table)
            found |= dict(zip(keys, contents, strict=True))
        return found
