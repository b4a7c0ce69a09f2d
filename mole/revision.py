"""Which code this is: its version, its commit, and a digest of its source."""

import hashlib
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mole

PACKAGE = Path(mole.__file__).resolve().parent


@dataclass(frozen=True)
class Revision:
    """The code of a result."""

    version: str
    commit: str | None
    """Of the checkout that the package lies in; None where it was installed, or git is not there."""
    clean: bool | None
    """Whether the checkout had no changes beside its commit."""
    source: str
    """SHA-256 of every Python file of the package, the first 16 digits: equal for equal code, wherever it lies."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)

    def __str__(self) -> str:
        commit = f", commit {self.commit[:10]}" if self.commit else f", source {self.source}"
        return f"mole {self.version}{commit}{'' if self.clean in (True, None) else ' with changes'}"


def source_digest(package: Path = PACKAGE) -> str:
    """SHA-256 of every Python file of a package, the first 16 digits."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@cache
def revision() -> Revision:
    """The code that runs now."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", "mole", "train.py", "configs")
    tracked = commit is not None and _git("ls-files", "--error-unmatch", "mole/__init__.py") is not None
    if not tracked:  # installed into an environment that lies within somebody else's checkout
        commit = changes = None
    clean = None if changes is None else not changes
    return Revision(mole.__version__, commit, clean, source_digest())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - no text of a user's
            ["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=10, check=False,  # noqa: S607
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
