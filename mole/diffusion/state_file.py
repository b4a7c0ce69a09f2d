"""The state of an unfinished training on disk: whole or absent, sealed, and written where it shall lie."""

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from mole.errors import CorruptFileError
from mole.files import replacing
from mole.reading.guard import check_file

SEAL = "seal"


class StateFile(CheckpointIO):
    """How Lightning writes and reads the training state; its own way leads through the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state, with its seal."""
        data = io.BytesIO()  # PyTorch tells of a full disk in other words than the system
        torch.save({**checkpoint, SEAL: state_digest(checkpoint)}, data)
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(data.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a state that `read_state` has found to be whole."""
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a state."""
        Path(path).unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any]:
    """A state, every number of it as it was written.

    Raises:
        CorruptFileError: it is truncated, altered or something else.
        OSError: it cannot be read now.
    """
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        seal = state.pop(SEAL)
        sound = state_digest(state) == seal
    except (OSError, MemoryError):
        raise  # it may be whole
    except Exception:  # truncated, foreign or hostile: PyTorch raises whatever its readers stumble over
        sound, state = False, {}
    if not sound:
        raise CorruptFileError(f"{path}: not a training state, or altered")
    return state


def state_digest(state: Any) -> str:
    """SHA-256 of nested dictionaries and lists of tensors and plain values, in hex."""
    digest = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, Tensor):
            digest.update(f"{tuple(item.shape)} {item.dtype};".encode())
            digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(item, Mapping):
            digest.update(f"{{{len(item)};".encode())
            for key, value in item.items():
                feed(key)
                feed(value)
        elif isinstance(item, list | tuple):
            digest.update(f"[{len(item)};".encode())
            for value in item:
                feed(value)
        else:
            digest.update(f"{item!r};".encode())

    feed(state)
    return digest.hexdigest()
