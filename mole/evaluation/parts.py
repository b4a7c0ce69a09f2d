"""What an evaluation has found so far, part by part on disk, so that an interrupted one goes on."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mole.errors import CorruptFileError
from mole.files import read_sealed, sealed, write_json


class Parts:
    """Results by name, each kept as soon as it is computed.

    Args:
        folder: where they are kept; None keeps nothing.
        identity: of all that decides them; parts of another identity are computed again.
        tick: called after each part.
    """

    def __init__(self, folder: Path | None = None, identity: str = "", tick: Callable[[], None] = lambda: None) -> None:
        self.folder, self.identity, self.tick = folder, identity, tick

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a part as plain values, NaN as None: from disk, or computed now."""
        path = self.folder / f"{name}.json" if self.folder is not None else None
        if path is not None:
            with suppress(FileNotFoundError, CorruptFileError):  # not done yet, or damaged
                kept = read_sealed(path, {"identity", "result"})
                if kept["identity"] == self.identity:
                    self.tick()
                    return kept["result"]
        result = without_nan(compute())
        if path is not None:
            write_json(path, sealed({"identity": self.identity, "result": result}))
        self.tick()
        return result


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what a diverged network or optimiser reached becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
