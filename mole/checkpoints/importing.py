"""Takes in checkpoints that somebody else has written; nothing in a file is ever executed.

Dimensions: P parameters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mole.checkpoints import foreign
from mole.checkpoints.buffer import Buffer
from mole.checkpoints.foreign import Found, UnusableError
from mole.checkpoints.format import Dtype, Header, column_names, read_header, read_layouts
from mole.checkpoints.writer import first_free
from mole.errors import MoleError
from mole.files import locked
from mole.representations import WeightSpec, differences, weights_digest

LISTED = 10
"""Names that a report gives for each reason; `ImportReport.skipped` has all of them."""
METRICS = ("eval_loss", "val_loss", "val/loss", "valid_loss", "avg_test_loss", "test_loss", "loss", "train_loss")
"""Of the metrics that the first checkpoint has, the first of these is the one to be conditioned on."""


@dataclass
class ImportReport:
    """What was taken in, and what was left out and why."""

    zoo: Path
    checkpoints: int = 0
    runs: set[str] = field(default_factory=set)
    known: int = 0
    """Checkpoints that an earlier import had taken in already."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Reason to the files that were left out for it."""

    def skip(self, reason: str, path: str) -> None:
        """Leave a file out."""
        self.skipped.setdefault(reason, []).append(path)

    without_metric: str | None = None
    """Name of the conditioning metric, if none of the checkpoints that were taken in has it."""

    def __str__(self) -> str:
        known = f", {self.known} were there already" if self.known else ""
        lines = [f"{self.zoo}: {self.checkpoints} checkpoints of {len(self.runs)} runs taken in{known}"]
        for reason, paths in sorted(self.skipped.items(), key=lambda item: -len(item[1])):
            more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
            lines.append(f"  {len(paths)} left out: {reason} ({', '.join(paths[:LISTED])}{more})")
        if self.without_metric is not None:
            lines.append(
                f"  none of them has the metric {self.without_metric!r}: they can be looked at, but no generator can "
                "be conditioned on it; --metric names another one, in another zoo"
            )
        return "\n".join(lines)


def import_checkpoints(
    path: str | Path,
    into: str | Path,
    *,
    metric: str | None = None,
    module: nn.Module | None = None,
    dtype: Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Take checkpoint files into a zoo.

    Read are `.pt`, `.pth`, `.ckpt`, `.bin` and `.safetensors` files (plain state dicts, or dictionaries that hold one),
    Lightning checkpoints (prefixes removed), Hugging Face folders (`checkpoint-500` with `trainer_state.json`), and
    the LMDB runs of G.pt (`pip install lmdb`). A run is a folder; its steps come from the files, or from their
    names, or are the files' order. The same call again takes in only what is new.

    Args:
        path: a file, or a folder that is searched through.
        into: folder of the zoo, which is created if there is none.
        metric: the one that generators shall be conditioned on; by default the first of `METRICS` that is found.
        module: the network, if its symmetry shall be known; its names and shapes decide what fits.
        dtype: of the weights on disk; by default the zoo's, or float32.
        progress: told how many files have been read, and of how many.

    Returns:
        What was taken in, and what was left out, grouped by reason. All networks of an import are of one
        layout: that of `module`, of the zoo, or of the first file.

    Raises:
        MoleError: there is nothing at `path`, or `into` is another zoo.
    """
    source, zoo = Path(path), Path(into)
    if not source.exists():
        raise MoleError(f"{source}: no such file or folder")
    files = foreign.candidates(source, without=zoo)
    report = ImportReport(zoo)
    intake = _Intake(zoo, report, metric, WeightSpec.of(module) if module is not None else None, dtype)
    try:
        for done, file in enumerate(files, 1):
            intake.take(file)
            if progress is not None:
                progress(done, len(files))
    finally:
        intake.close()
    if report.checkpoints and not intake.has_metric:
        report.without_metric = intake.metric
    if not report.checkpoints and not report.known and not report.skipped:
        report.skip(f"no {', '.join(sorted(foreign.SUFFIXES))} file and no LMDB run", str(source))
    return report


class _Intake:
    """The open zoo of an import, and the layout that everything must fit."""

    def __init__(
        self, zoo: Path, report: ImportReport, metric: str | None, spec: WeightSpec | None, dtype: Dtype | None
    ) -> None:
        self.zoo, self.report, self.metric, self.spec = zoo, report, metric, spec
        self.dtype: Dtype = dtype or "float32"
        self.known: dict[tuple[str, int], str | None] = {}
        self.buffer: Buffer | None = None
        self.has_metric = False
        if (zoo / "zoo.json").exists():
            header = read_header(zoo)
            if metric is not None and metric != header.metric:
                raise MoleError(f"{zoo}: a zoo of metric {header.metric!r}; legal here is that one, or another folder")
            if dtype is not None and dtype != header.dtype:
                raise MoleError(f"{zoo}: a zoo of dtype {header.dtype}; legal here is that one, or another folder")
            self.metric, self.dtype = header.metric, header.dtype
            layouts = list(read_layouts(zoo).values())
            self.spec = self.spec or (layouts[0] if layouts else None)

    def take(self, file: foreign.Candidate) -> None:
        """Read one file, or one LMDB run, and keep what fits."""
        for found in self._read(file):
            self._keep(found)

    def _read(self, file: foreign.Candidate) -> Iterator[Found]:
        if file.fault:
            self.report.skip(file.fault, file.name)
            return
        try:
            if file.is_lmdb:
                yield from foreign.read_lmdb(file, self.spec)
            else:
                yield foreign.read_file(file)
        except UnusableError as error:
            self.report.skip(str(error), file.name)
        except OSError as error:
            self.report.skip(f"cannot be read ({error.strerror or error})", file.name)
        except Exception as error:  # one odd file is not the end of the others
            self.report.skip(
                f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})", file.name
            )

    def _keep(self, found: Found) -> None:
        try:
            spec = found.spec or WeightSpec.of_state(found.state)
        except (MoleError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            self.report.skip(" ".join(str(error).split())[:200], found.name)
            return
        if spec.dtype != torch.float32:
            self.report.skip("float64 weights, which no zoo holds", found.name)
            return
        self.spec = self.spec or spec
        difference = differences(self.spec, spec)
        if difference is not None:
            self.report.skip(f"another shape than the first: {difference}", found.name)
            return
        flat, table = self.spec.flatten(found.state), self.spec.flatten_table(found.state)
        if not flat.isfinite().all():
            self.report.skip("weights that are NaN or infinite", found.name)
            return
        metrics = column_names(found.metrics, "metrics")
        buffer = self._open(metrics)
        content = weights_digest(flat)[:16]
        step = self._step(found, content)
        if step is None:
            return
        row = {**metrics, "run": found.run, "step": step, "source": found.name, "content": content}
        if not buffer.add(row, flat, table):
            self.report.skip(f"weights too large for {self.dtype}", found.name)
            return
        self.known[found.run, step] = content
        self.has_metric = self.has_metric or self.metric in metrics
        self.report.checkpoints += 1
        self.report.runs.add(found.run)
        if buffer.is_full:
            self._flush()

    def _step(self, found: Found, content: str) -> int | None:
        """The step to keep a network as; None, and that is counted, if it is known, or another one has its place."""
        mine = (
            {step: kept for (run, step), kept in self.known.items() if run == found.run} if found.step is None else {}
        )
        step = max(mine, default=-1) + 1 if found.step is None else found.step
        if content in mine.values() or self.known.get((found.run, step), "") in (content, None):
            self.report.known += 1
        elif (found.run, step) in self.known:
            self.report.skip(_taken(step, found.run), found.name)
        else:
            return step
        return None

    def _open(self, metrics: dict[str, float]) -> Buffer:
        if self.buffer is None:
            assert self.spec is not None
            self.metric = self.metric or next((name for name in METRICS if name in metrics), "loss")
            header = Header(self.metric, self.dtype, {"source": "import"})
            self.buffer = Buffer(first_free(self.zoo, header, "import"), self.spec, family="import")
            self.known = self.buffer.written()
        return self.buffer

    def _flush(self) -> None:
        """Write what has gathered; what another import has written meanwhile is known now."""
        assert self.buffer is not None
        with locked(self.zoo / "shards" / ".importing.lock", "another import writes a shard there", wait=True):
            written = self.buffer.written()
            for row in self.buffer.leave_out(written):
                self.report.checkpoints -= 1
                if written[row["run"], row["step"]] in (row["content"], None):
                    self.report.known += 1
                else:
                    self.report.skip(_taken(row["step"], row["run"]), row["source"])
            self.buffer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self.buffer is not None:
            try:
                self._flush()
            finally:
                self.buffer.writer.close()


def _taken(step: int, run: str) -> str:
    return (
        f"another network is there already as step {step} of run {run!r}: let file names tell their steps, and import "
        "the folder above the runs' folders, whose names tell runs apart"
    )
