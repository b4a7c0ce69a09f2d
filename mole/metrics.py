"""`metrics.csv`: every metric of a run, one per row, appended as it is measured."""

import csv
import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from mole.files import value_digest, write_text
from mole.reading.guard import is_regular

COLUMNS = ("stage", "step", "metric", "value")

logger = logging.getLogger("mole")


class MetricsFile:
    """Rows `stage,step,metric,value`; a stage that starts again from a step replaces what came after it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` after `step`, and rows that are damaged."""
        rows, damaged = self._rows()
        if damaged:
            logger.warning("%s: %d damaged rows are left out", self.path, damaged)
        kept = [row for row in rows if row[0] != stage or int(row[1]) <= step]
        write_text(self.path, _format([list(COLUMNS), *kept]))

    def append(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add one row per metric; what is not a finite number is left out."""
        rows = [[stage, step, name, repr(float(value))] for name, value in values.items() if math.isfinite(value)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_format(rows))

    def digest(self, stage: str) -> str:
        """Digest of the rows of a stage."""
        return value_digest([row for row in self._rows()[0] if row[0] == stage])

    def _rows(self) -> tuple[list[list[str]], int]:
        """Whole rows, and how many lines are none; a last one that a crash cut short does not count."""
        if not is_regular(self.path):
            return [], 0
        whole = self.path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
        rows, damaged = [], 0
        for line in whole.split("\n")[1:]:
            row = _parsed(line)
            if row is None:
                damaged += 1
            else:
                rows.append(row)
        return rows, damaged


def _parsed(line: str) -> list[str] | None:
    try:
        (row,) = csv.reader([line])
        float(row[3])
    except (csv.Error, ValueError, IndexError):
        return None
    whole = len(row) == len(COLUMNS) and line.isascii() and row[1].isdigit() and len(row[1]) < 19
    return row if whole else None


def _format(rows: list[list[object]] | list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
