"""What is known of a file before a byte of it is read: is it a file, how large, and does what it promises fit?"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from mole.errors import CorruptFileError

TEXT_BYTES = 2**31
"""The largest text file that is read."""
SHARE = 0.8
"""Of the memory that is free now, what one file may take."""

CONTROL = Path("/sys/fs/cgroup")
LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""What a control group may take and has taken, in its second and first version."""

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_file(path: Path, most: int | None = None) -> int:
    """Size in bytes of a regular file, behind links too.

    Args:
        path: of the file.
        most: the largest size that is read.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it cannot be looked at.
        CorruptFileError: it is a folder, a pipe or a device, which might never end, or it is too large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in KINDS if is_kind(status.st_mode)), "no regular file")
        raise CorruptFileError(f"{path}: {kind}; legal is a regular file")
    if most is not None and status.st_size > most:
        raise CorruptFileError(f"{path}: {status.st_size:,} bytes; legal are at most {most:,}")
    return status.st_size


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, behind links too."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def available_memory() -> int:
    """Bytes that this process can still take: what the machine, its control group and its own limits leave."""
    free = [2**63]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33)
    for limit, used in LIMITS:
        try:
            cache = _reclaimable(CONTROL / Path(used).parent / "memory.stat")
            free.append(int((CONTROL / limit).read_text()) - int((CONTROL / used).read_text()) + cache)
        except (OSError, ValueError):  # no such group, or no limit
            continue
    with suppress(ImportError, OSError, ValueError, IndexError):  # elsewhere than on Unix
        import resource

        own = resource.getrlimit(resource.RLIMIT_AS)[0]
        if own != resource.RLIM_INFINITY:
            free.append(own - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    return max(0, min(free))


def _reclaimable(statistics: Path) -> int:
    """Bytes of a control group that are files kept in memory while nobody else needs it."""
    try:
        rows = dict(line.split() for line in statistics.read_text().splitlines())
        return int(rows.get("inactive_file", rows.get("total_inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def check_promise(path: Path, promised: int) -> None:
    """Refuse a file whose header promises more numbers than fit into memory.

    Raises:
        CorruptFileError: naming both numbers.
    """
    free = int(SHARE * available_memory())
    if promised > free:
        raise CorruptFileError(f"{path}: promises {in_bytes(promised)}, of which {in_bytes(free)} fit into memory")


def in_bytes(count: float) -> str:
    """`512 B`, `3.2 MB` or `160 GB`.

    Example:
        >>> in_bytes(3_200_000)
        '3.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
