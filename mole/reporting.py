"""How the pipeline tells what it is doing; the command line decides how that looks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], None]
"""Told how many units are done so far."""


class Reporter(Protocol):
    """Where the pipeline sends its lines and its progress."""

    def say(self, line: str) -> None:
        """One line for a person."""
        ...

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A stage of `total` units; the block calls what it is given with the units done so far."""
        ...
