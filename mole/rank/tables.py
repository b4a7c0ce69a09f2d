"""A leaderboard as people want it: CSV, Parquet, a table for the terminal or for wandb, a figure."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from mole.files import replacing, write_text
from mole.rank.leaderboard import Leaderboard
from mole.reporting import printable

TOLD = ("name", "reason")
"""Columns of words, which fold where a terminal is narrow."""
LEAST = 16
"""Characters that those have at least."""
MOST = 60
"""Networks that a figure shows."""


def columns_and_rows(board: Leaderboard) -> tuple[list[str], list[list[Any]]]:
    """The table as lists, as `wandb.Table(columns=..., data=...)` takes it."""
    records = board.records()
    columns = list(records[0])
    return columns, [[record.get(name) for name in columns] for record in records]


def save(board: Leaderboard, folder: Path) -> list[Path]:
    """Write `leaderboard.csv`, `leaderboard.parquet` and `leaderboard.png`; returns their paths."""
    columns, rows = columns_and_rows(board)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(folder / "leaderboard.csv", text.getvalue())
    with replacing(folder / "leaderboard.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(board.records()), temporary)
    with replacing(folder / "leaderboard.png") as temporary:
        _figure(board).savefig(temporary, dpi=150, format="png")
    return [folder / f"leaderboard.{end}" for end in ("csv", "parquet", "png")]


def terminal(board: Leaderboard, most: int = 20, width: int = 100) -> Table:
    """The first rows, and every row with a reason, as a table of rich, with as many scorers as `width` characters
    hold."""
    records = board.records()
    shown = [record for place, record in enumerate(records) if place < most or record["reason"]]
    ends = [name for name in ("low", "high", "best_probability") if name in records[0]]
    ends += ["reason"] * any(record["reason"] for record in shown)

    def names(others: list[str]) -> list[str]:
        return ["rank", "name", *([board.by] if board.scorers else []), *others, *ends]

    def needed(columns: list[str]) -> int:
        longest = {name: max(len(name), *(len(_text(record[name])) for record in shown)) for name in columns}
        return 1 + sum(3 + (min(LEAST, size) if name in TOLD else size) for name, size in longest.items())

    others = [name for name in board.scorers if name != board.by]
    count = next((n for n in range(len(others), 0, -1) if needed(names(others[:n])) <= width), 0)
    table = Table(title=Text(f"{len(board.rows)} networks by {board.by}"))
    for name in names(others[:count]):
        table.add_column(
            Text(printable(name)),
            justify="left" if name in TOLD else "right",
            overflow="fold",
            no_wrap=name not in TOLD,
        )
    for record in shown:
        table.add_row(*(Text(printable(_text(record[name]))) for name in names(others[:count])))  # no markup
    left = [f"{len(records) - len(shown)} more networks"] if len(shown) < len(records) else []
    left += [f"{', '.join(others[count:])} with --out or a wider terminal"] if count < len(others) else []
    table.caption = Text("; ".join(left)) if left else None
    return table


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _figure(board: Leaderboard) -> Figure:
    """Scores of the networks, best first, with their intervals where there are some."""
    rows = [row for row in board.rows if board.by in row.scores][:MOST]
    figure = Figure(figsize=(7.2, 1.2 + 0.22 * max(4, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    axes, places = figure.add_subplot(), np.arange(len(rows))
    axes.plot([row.scores[board.by] for row in rows], places, "o", color="#0072B2", markersize=4)
    for place, row in zip(places, rows, strict=True):
        if (ends := board.interval(row)) is not None:
            axes.plot(ends, [place, place], color="#0072B2", alpha=0.4, linewidth=2)
    axes.set_yticks(places, [printable(row.name[-40:]).replace("$", r"\$") for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel=f"{board.by} (bars: 90 % intervals)" if board.resampled else board.by)
    left = len(board.rows) - len(rows)
    axes.set_title(f"{len(rows)} best networks" + (f", {left} more" if left else ""), fontsize=10)
    return figure
