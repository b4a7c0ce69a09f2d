"""An append-only ledger in the terms of W3C PROV: entities, and the activities that made them.

One JSON object per line. An `id` is the digest of the rest of the record, so that the same fact has
the same name wherever it is written, and is written once.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mole.errors import CorruptFileError
from mole.files import value_digest
from mole.reading.guard import check_file, check_promise
from mole.reading.text import parse_json


class Ledger:
    """Records in one file; a line that a crash cut short is dropped at the next opening.

    Example:
        >>> ledger = Ledger(Path("runs/digits/provenance/ledger.jsonl"))
        >>> ledger.append([{"kind": "entity", "type": "zoo", "digest": "..."}])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        """Everything in the ledger, oldest first."""
        if path.exists():
            self._read()
        self._known = {record["id"] for record in self.records}

    def _read(self) -> None:
        check_promise(self.path, 4 * check_file(self.path))
        whole, cut, rest = self.path.read_bytes().rpartition(b"\n")
        if rest:  # the last line has no end: the process died while writing it
            with self.path.open("rb+") as file:
                file.truncate(len(whole) + len(cut))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = parse_json(line)
                identity = record.pop("id")
            except (ValueError, KeyError, AttributeError, TypeError):
                raise CorruptFileError(
                    f"{self.path}:{number}: not a record of the ledger; move the file away, and the same "
                    "command writes what finished stages know of it again"
                ) from None
            if value_digest(record) != identity:
                raise CorruptFileError(f"{self.path}:{number}: altered after it was written; move the file away, and "
                                       "the same command writes what finished stages know of it again")  # fmt: skip
            self.records.append({"id": identity, **record})

    def append(self, records: Iterable[dict[str, Any]]) -> list[str]:
        """Write the records that are not there yet, all of them safely on disk at return; gives their ids."""
        identities, lines = [], []
        for record in records:
            identity = value_digest(record)
            identities.append(identity)
            if identity in self._known:
                continue
            self._known.add(identity)
            self.records.append({"id": identity, **record})
            lines.append(json.dumps({"id": identity, **record}, sort_keys=True))
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return identities
