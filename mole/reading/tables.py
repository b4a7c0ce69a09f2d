"""Parquet tables from files of any origin."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mole.errors import CorruptFileError
from mole.reading.guard import check_file, check_promise


def read_parquet(path: Path, columns: Sequence[str] | None = None, dictionaries: Sequence[str] = ()) -> pa.Table:
    """The table in a file; of these columns, those that it has.

    Args:
        path: of the file.
        columns: that are wanted; by default all.
        dictionaries: columns of texts that repeat.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is truncated, something else, or larger than memory.
    """
    check_file(path)
    try:
        with pq.ParquetFile(path, read_dictionary=list(dictionaries)) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            check_promise(path, sum(group.total_byte_size for group in groups))
            there = set(file.schema_arrow.names)
            wanted = None if columns is None else [name for name in columns if name in there]
            table = file.read(columns=wanted)
            table.validate(full=True)
            return table
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise CorruptFileError(f"{path}: truncated or altered ({' '.join(str(error).split())[:200]})") from None
