"""How the pipeline tells what it is doing; the command line decides how that looks."""

from contextlib import AbstractContextManager
from typing import Protocol


class Advance(Protocol):
    """Told how many units are done so far, and whatever else a person would like to watch."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Reporter(Protocol):
    """Where the pipeline sends its lines and its progress."""

    def say(self, line: str) -> None:
        """One line for a person."""
        ...

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A stage of `total` units; the block calls what it is given with the units done so far."""
        ...
