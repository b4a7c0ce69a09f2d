"""`metrics.csv`: every metric of a run, one per row, appended as it is measured."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

from mole.files import write_text

COLUMNS = ("stage", "step", "metric", "value")


class MetricsFile:
    """Rows `stage,step,metric,value`; a stage that starts again from a step replaces what came after it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` after `step`, and a last row that a crash cut short."""
        rows: list[list[str]] = []
        if self.path.exists():
            whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
            rows = [row for row in csv.reader(io.StringIO(whole)) if len(row) == len(COLUMNS) and row[1].isdigit()]
        kept = [row for row in rows if row[0] != stage or int(row[1]) <= step]
        write_text(self.path, _format([list(COLUMNS), *kept]))

    def append(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add one row per metric; what is not a finite number is left out."""
        rows = [[stage, step, name, repr(float(value))] for name, value in values.items() if math.isfinite(value)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_format(rows))


def _format(rows: list[list[object]] | list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
