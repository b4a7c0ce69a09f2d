"""How the pipeline tells what it is doing; the command line decides how that looks."""

import re
from contextlib import AbstractContextManager
from typing import Protocol

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]")
LONGEST = 2000
"""Characters of a line that is printed."""


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control sequences in names become visible, very long lines are cut.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    lines = (line if len(line) <= LONGEST else f"{line[:LONGEST]} ... (cut)" for line in text.split("\n"))
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), "\n".join(lines))


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
