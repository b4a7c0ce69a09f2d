"""Rows of a ranking on disk, from which an interrupted one goes on."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole.files import is_sealed, sealed
from mole.reading.guard import check_file, is_regular
from mole.reading.text import json_lines

logger = logging.getLogger("mole")


@dataclass(frozen=True)
class Row:
    """What is known of one network."""

    name: str
    scores: dict[str, float]
    """By scorer; one that could not be had is not there."""
    reason: str
    """Why scores are missing; empty if none are."""
    seconds: float
    digest: str
    """SHA-256 of the network; empty where it could not be loaded."""
    provenance: dict[str, Any]
    resampled: dict[str, list[float]] = field(default_factory=dict)
    """By scorer: scores on random halves of the examples, the same halves for every network."""
    answers: list[int] = field(default_factory=list)
    """The likeliest class of every example, where the agreement of networks is asked for."""
    outputs: int = 0
    """How many classes it has answers for, where that is asked for."""


class Finished:
    """Rows on disk, from which an interrupted ranking goes on."""

    def __init__(self, path: Path | None, settings: str) -> None:
        self.path, self.rows = path, dict[tuple[str, str], Row]()
        self.settings = hashlib.sha256(settings.encode()).hexdigest()
        if path is not None and path.exists():
            check_file(path)
        for row in self._sound() if path is not None and is_regular(path) else ():
            self.rows[row.name, row.digest] = row

    def _sound(self) -> Iterator[Row]:
        """Rows of these settings that are as they were written; others are scored again."""
        assert self.path is not None
        altered = 0
        for _, values in json_lines(self.path):
            if values is None:
                continue  # cut off when the last ranking was killed
            if not is_sealed(values, {"settings"}):
                altered += 1
            elif values.pop("settings") == self.settings:
                del values["seal"]
                with suppress(TypeError):
                    yield Row(**values)
        if altered:
            logger.warning("%s: %d rows were altered; these networks are scored again", self.path, altered)

    def row(self, name: str, digest: str) -> Row | None:
        """What an earlier session found of this network."""
        return self.rows.get((name, digest))

    def add(self, row: Row) -> None:
        """Keep a row, on disk when this returns; one with a reason is tried again the next time."""
        if self.path is None or row.reason:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps(sealed({**asdict(row), "settings": self.settings})) + "\n")
            file.flush()
            os.fsync(file.fileno())


def network_digest(network: nn.Module) -> str:
    """SHA-256 of a network's structure, as it prints itself, and of its weights."""
    found = hashlib.sha256(repr(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def data_digest(data: tuple[Tensor, Tensor | None]) -> str:
    """SHA-256 of inputs and labels."""
    found = hashlib.sha256()
    for tensor in data:
        if tensor is not None:
            found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
