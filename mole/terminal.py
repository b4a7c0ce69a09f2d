"""What a person sees while a run goes on: a bar on a terminal, a line about every 30 s elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from tqdm import tqdm

from mole.reporting import Advance, printable

SILENCE = 30.0
"""Seconds between two lines where there is no terminal."""


class _Steady:
    """A stream whose other end may go away: what cannot be written any more is left out, and the work goes on."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._gone()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._gone()

    def _gone(self) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_streams() -> None:
    """Make standard output and error survive: a reader that has gone (`| head -1`), a stream that was closed before
    the process began, characters that a terminal does not have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Steady):
            continue
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process ends
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Steady(stream))


class BarReporter:
    """One progress bar per stage, with rate and time left."""

    def say(self, line: str) -> None:
        tqdm.write(printable(line), file=sys.stdout)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        with tqdm(total=total, desc=f"{name:<8}", unit=f" {unit}", unit_scale=True, file=sys.stderr) as bar:

            def advance(done: int, note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                if bar.n == 0 and time.time() - bar.start_t < 1:
                    bar.initial = done  # resumed: what was done before does not count for the rate
                bar.update(done - bar.n)

            yield advance


class LineReporter:
    """A line when a stage begins and ends, and about every 30 s between."""

    def say(self, line: str) -> None:
        print(printable(line), flush=True)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        began = told = time.monotonic()
        first: list[int] = []

        def advance(done: int, note: str = "") -> None:
            nonlocal told
            first[:] = first or [done]
            now = time.monotonic()
            if now - told >= SILENCE and done > first[0]:
                told = now
                rate = (done - first[0]) / (now - began)
                left = (total - done) / rate
                more = f"; {note}" if note else ""
                self.say(f"{name}: {done:,} of {total:,} {unit}, {rate:,.1f} {unit}/s, {duration(left)} left{more}")

        self.say(f"{name}: {total:,} {unit}")
        yield advance
        self.say(f"{name}: finished in {duration(time.monotonic() - began)}")


def reporter() -> BarReporter | LineReporter:
    """What suits where the output goes."""
    return BarReporter() if sys.stdout.isatty() and sys.stderr.isatty() else LineReporter()


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s` or `2 h 5 min`.

    Example:
        >>> duration(200)
        '3 min 20 s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
