"""Appends shards to a zoo: whole or absent, several writers at once, nothing lost to a kill.

Dimensions: n checkpoints of a shard, P parameters.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from mole.checkpoints.format import (
    TORCH_DTYPES,
    Header,
    ShardFiles,
    layout_path,
    read_header,
    read_layouts,
    shard_fault,
    shards,
    write_seal,
)
from mole.errors import CorruptFileError, MoleError
from mole.files import LockedError, file_digest, locked, read_sealed, replacing, sweep, write_json_once
from mole.reading.tables import read_parquet
from mole.representations import WeightSpec

Columns = Mapping[str, Sequence[Any] | Tensor]
"""Name to one value per checkpoint, of a type that Parquet has; None where a value is missing."""


class ZooWriter:
    """One writer of a zoo; others, with other names, may write at the same time.

    Args:
        folder: of the zoo, which is created if there is none.
        header: of the zoo; an existing one must have the same metric and dtype, and that of a harvest the same recipe.
        name: of this writer; the names of its shards begin with it.

    Raises:
        MoleError: the folder holds another zoo, or another process writes under this name.

    Example:
        >>> with ZooWriter("zoo/mine", Header("loss", "float32", {}), "me") as writer:
        ...     writer.write("me-0", spec, weights, {"run": ["a", "a"], "step": [0, 9], "loss": [2.3, 0.4]})
    """

    def __init__(self, folder: str | Path, header: Header, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
            raise MoleError(f"writer {name!r}: legal are up to 100 letters, digits, dots, hyphens and underscores")
        self.folder, self.header, self.name = Path(folder), header, name
        self.lock = locked(self.folder / "shards" / f".{name}.lock", f"another process writes there as {name!r}")
        self.lock.__enter__()
        sweep(self.folder, (self.folder / "shards", self.folder / "layouts"))
        try:
            if not write_json_once(self.folder / "zoo.json", header.to_json()):
                self.header = self._joined(read_header(self.folder), header)
        except BaseException:
            self.close()
            raise
        self.known = set(read_layouts(self.folder))

    def _joined(self, there: Header, mine: Header) -> Header:
        """The header of the zoo that is there; callbacks and imports may fill one zoo together, a harvest is alone.

        Raises:
            MoleError: naming what differs.
        """
        both = (("metric", there.metric, mine.metric), ("dtype", there.dtype, mine.dtype))
        told = [f"{name} {one} there, {other} here" for name, one, other in both if one != other]
        if there.recipe != mine.recipe and not all("source" in header.recipe for header in (there, mine)):
            told.append("networks of another recipe")
        if told:
            raise MoleError(
                f"{self.folder}: a zoo of another recipe, metric or dtype is here ({'; '.join(told)}); choose another "
                "folder"
            )
        return there

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write under this name; every shard is on disk already."""
        self.lock.__exit__(None, None, None)

    def files(self, shard: str) -> ShardFiles:
        """The files of a shard of this zoo."""
        return ShardFiles(self.folder, shard)

    def has(self, shard: str, runs: Sequence[str] | None = None) -> bool:
        """Whether this shard is visible and undamaged, and holds just these runs."""
        files = self.files(shard)
        if not files.index.exists() or shard_fault(files):
            return False
        return runs is None or _runs(files) == sorted(runs)

    def stored(self, spec: WeightSpec, weights: Tensor) -> Tensor:
        """Weights (*N, P) in the zoo's dtype; what is too large for it becomes infinite.

        Raises:
            MoleError: the network has float64 tensors, which no zoo holds.
        """
        if spec.dtype != torch.float32:
            names = ", ".join(e.name for e in spec.entries if e.dtype == torch.float64)
            raise MoleError(f"{self.folder}: a zoo holds at most float32; {names} is float64: use module.float()")
        return weights.to(TORCH_DTYPES[self.header.dtype])

    def keep_layout(self, spec: WeightSpec) -> str:
        """Write a layout down unless it is there; returns its name."""
        layout = spec.fingerprint[:16]
        if layout not in self.known:
            write_json_once(layout_path(self.folder, layout), spec.to_json())
            self.known.add(layout)
        return layout

    def fits(self, spec: WeightSpec, weights: Tensor) -> Tensor:
        """Which of the networks (n, P) can be kept in the zoo's dtype: (n,) bool."""
        return torch.cat([self.stored(spec, part).isfinite().all(-1) for part in weights.split(4096)])

    def write(
        self,
        shard: str,
        spec: WeightSpec,
        weights: Tensor,
        columns: Columns,
        *,
        table: Tensor | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Write one shard.

        Args:
            shard: its name, which begins with the writer's; a shard of that name is replaced.
            spec: layout of its networks, stored once per zoo.
            weights: (n, P), finite.
            columns: `run` and `step`, factors, metrics; each with n values.
            table: (n, Q) int64, the whole numbers of the networks; 0 without it.
            seconds: that its networks took to train.

        Raises:
            MoleError: shapes do not fit, or a weight is no finite number in the zoo's dtype.
        """
        stored = self.stored(spec, weights.detach().cpu()).contiguous()
        count = len(columns["run"])
        if stored.shape != (count, spec.size):
            found = tuple(stored.shape)
            raise MoleError(f"{self.folder}: weights of shape {found} for {count} checkpoints of {spec.size} numbers")
        if not stored.isfinite().all():
            raise MoleError(
                f"{self.folder}: shard {shard} holds weights that are NaN, infinite or too large for "
                f"{self.header.dtype}; leave them out, or choose dtype bfloat16 or float32"
            )
        tensors = {"weights": stored}
        if spec.table_size:
            whole = torch.zeros(count, spec.table_size, dtype=torch.int64) if table is None else table
            if whole.shape != (count, spec.table_size):
                raise MoleError(f"{self.folder}: a table of shape {tuple(whole.shape)} for {count} checkpoints")
            tensors["table"] = whole.contiguous()
        layout = self.keep_layout(spec)
        files = self.files(shard)
        files.index.unlink(missing_ok=True)
        with replacing(files.weights) as temporary:
            temporary.write_bytes(save(tensors, metadata={"layout": layout}))  # whose errors are the system's own
        digest = file_digest(files.weights)
        index = _parquet(
            {"diverged": [False] * count, **columns, "layout": [layout] * count, "digest": [digest] * count}
        )
        write_seal(files, digest, hashlib.sha256(index).hexdigest(), self.header, seconds)
        with replacing(files.index) as temporary:
            temporary.write_bytes(index)

    def seconds(self) -> float:
        """What the visible shards took to train, in whichever session they were made."""
        total = 0.0
        for files in shards(self.folder):
            with suppress(CorruptFileError, FileNotFoundError):
                total += float(read_sealed(files.seal, {"seconds"})["seconds"])
        return total

    def discard(self, shard: str) -> None:
        """Take a shard of this writer back."""
        files = self.files(shard)
        for path in (files.index, files.seal, files.weights):  # invisible first
            path.unlink(missing_ok=True)


def first_free(folder: str | Path, header: Header, name: str) -> ZooWriter:
    """A writer under this name, or under it and a number where another process writes already.

    Raises:
        MoleError: the folder holds another zoo.
    """
    number = 1
    while True:
        try:
            return ZooWriter(folder, header, name if number == 1 else f"{name}{number}")
        except LockedError:
            number += 1


def _runs(files: ShardFiles) -> list[str]:
    return sorted(set(read_parquet(files.index, ["run"])["run"].to_pylist()))


DICTIONARIES = ("run", "layout", "digest")
"""Columns of texts that repeat."""


def _parquet(columns: Columns) -> bytes:
    """The index as the bytes of a Parquet file."""
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        array = pa.array(values.numpy() if isinstance(values, torch.Tensor) else list(values), from_pandas=False)
        arrays[name] = array.dictionary_encode() if name in DICTIONARIES else array
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer, compression="zstd")
    return buffer.getvalue()
