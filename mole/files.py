"""Files that are either whole or absent: temporary name, fsync, rename; their digests, seals and locks."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from mole.errors import CorruptFileError, MoleError
from mole.reading.guard import check_file
from mole.reading.text import read_json

logger = logging.getLogger("mole")

TEMPORARY = ".tmp-"
"""Every file that is being written begins with this; its writer holds a lock on it until it has its name."""
TEMPORARY_NAME = r"\.tmp-[a-z0-9_]{8}(\.[a-z]+)?"
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
ABANDONED = 86_400
"""Seconds after which a temporary file counts as left behind, on file systems without locks."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well.

    A crash at any moment leaves either the old file or the new one, never a part.
    The temporary name keeps the suffix, because some writers choose the format by it.
    """
    with _temporary(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    _sync_folder(path.parent)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new file beside `path`, locked while the block runs, and gone after it unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = _claimed(path)
    try:
        yield Path(name)
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        os.close(handle)


def _claimed(path: Path) -> tuple[int, str]:
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        _lock(handle)
        if Path(name).exists():  # else `sweep` of another process came between the two lines above
            return handle, name
        os.close(handle)


def sweep(folder: Path, inner: Iterable[Path] = ()) -> int:
    """Remove what killed writers have left in a folder, and anywhere below the `inner` ones; returns how many files.

    What a living process writes is locked by it, and stays; so does what has another name than `_claimed` gives.
    """
    paths = [*folder.glob(f"{TEMPORARY}*"), *(path for part in inner for path in part.rglob(f"{TEMPORARY}*"))]
    removed = 0
    for path in paths:
        if not re.fullmatch(TEMPORARY_NAME, path.name):
            continue
        try:
            handle = os.open(path, os.O_RDWR | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            continue
        try:
            state = _lock(handle)
            age = time.time() - os.fstat(handle).st_mtime
            if state == "ours" or (state == "no locks" and age > ABANDONED):
                path.unlink(missing_ok=True)
                removed += 1
        finally:
            os.close(handle)
    return removed


def _lock(handle: int) -> Literal["ours", "held", "no locks"]:
    """Lock an open file; the operating system releases it when it is closed, however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return "no locks"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "held" if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else "no locks"
    return "ours"


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems and Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class LockedError(MoleError):
    """Another process works where only one may."""


@contextmanager
def locked(path: Path, problem: str, note: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; the operating system releases it when the process ends, however it ends.

    Where the file system has no locks, one line says so, and the block runs without.

    Args:
        path: of the lock file.
        problem: what to say where another process holds it.
        note: what that other process shall find in the file.
        wait: whether to wait for the other process.

    Raises:
        LockedError: another process holds it; the message says `problem`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o644)
    try:
        state = _lock(handle)
        while wait and state == "held":
            time.sleep(0.01)
            state = _lock(handle)
        if state == "held":
            raise LockedError(f"{path.parent}: {problem}; wait for it, or choose another")
        if state == "no locks" and os.name != "nt":
            logger.warning("%s: this file system has no locks; let one process alone work there", path.parent)
        os.truncate(handle, 0)
        os.write(handle, note.encode("utf-8", "replace"))
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused, because JSON has neither."""
    write_text(path, _indented(value))


def write_json_once(path: Path, value: Any) -> bool:
    """Write a JSON file unless there is one; of several writers at once just one succeeds."""
    if path.exists():
        return False
    with _temporary(path) as temporary:
        temporary.write_text(_indented(value), encoding="utf-8")
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            temporary.replace(path)
    _sync_folder(path.parent)
    return True


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        CorruptFileError: it is no regular file.
    """
    check_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces), in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same values with their digest under `seal`."""
    rest = {key: item for key, item in value.items() if key != "seal"}
    return {**rest, "seal": value_digest(rest)}


def is_sealed(value: Any, keys: set[str]) -> bool:
    """Whether a value is a dictionary with these keys and the digest of all that it holds."""
    try:
        return isinstance(value, dict) and keys <= value.keys() and sealed(value) == value
    except (ValueError, RecursionError):  # NaN, which no seal has
        return False


def read_sealed(path: Path, keys: set[str]) -> dict[str, Any]:
    """Read a JSON file that carries its own digest.

    Raises:
        CorruptFileError: it does not hold what was written.
        FileNotFoundError: there is no such file.
    """
    value = read_json(path)
    if not is_sealed(value, keys):
        raise CorruptFileError(f"{path}: truncated or altered (its seal differs)")
    return value


def remove(path: Path) -> None:
    """Delete a file or a folder; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
