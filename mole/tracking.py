"""wandb, as a view of a run: it never prompts, never ends the run and never names an entity.

`metrics.csv` and `report.json` are the record. Nothing else of MOLE imports wandb.
"""

import logging
import netrc
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mole.config import TrackingConfig

Mode = Literal["online", "offline", "disabled"]

DEFAULT_SERVER = "https://api.wandb.ai"
PATIENCE = 5.0
"""Seconds that a server gets to answer."""
LAST_UPLOAD = 30.0
"""Seconds that the last upload of a run gets."""

log = logging.getLogger("mole")


def choose_mode(config: TrackingConfig) -> tuple[Mode, str]:
    """The mode to use, and one line that says why and what to do."""
    wanted = config.mode if config.mode != "auto" else os.environ.get("WANDB_MODE", "auto").lower()
    if wanted in ("disabled", "dryrun", "offline"):
        mode: Mode = "disabled" if wanted == "disabled" else "offline"
        return mode, f"wandb {mode}, as asked"
    if not _has_key():
        return "offline", "wandb offline: no key found (WANDB_API_KEY or `wandb login`)"
    if not server_answers(PATIENCE):
        return "offline", f"wandb offline: {server()} does not answer"
    return "online", f"wandb online at {server()}"


def server() -> str:
    """Address of the wandb server, without a slash at its end."""
    return os.environ.get("WANDB_BASE_URL", DEFAULT_SERVER).rstrip("/")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(server()).hostname or ""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            if name and netrc.netrc(str(Path(name).expanduser())).authenticators(host):
                return True
    return False


def server_answers(patience: float) -> bool:
    """Whether the wandb server sends any HTTP response within `patience` seconds."""
    try:
        with urllib.request.urlopen(f"{server()}/healthz", timeout=patience):  # noqa: S310 - the user's own server
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


class Tracker:
    """One wandb run; every fault of wandb becomes a warning, and the run goes on without it."""

    def __init__(self, config: TrackingConfig, *, name: str, folder: Path, settings: dict[str, Any]) -> None:
        mode, self.line = choose_mode(config)
        self.mode: Mode = mode
        self._run: Any = None
        if self.mode != "disabled":
            self._guard(self._start, config.project, name, folder, settings)
        if self.mode == "offline" and self._run is not None:
            self.line += f"; to sync: wandb sync {Path(self._run.dir).parent}"

    def _start(self, project: str, name: str, folder: Path, settings: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        options = wandb.Settings(
            silent=True, console="off", init_timeout=PATIENCE * 2, disable_git=True, disable_code=True
        )
        arguments: dict[str, Any] = {
            "project": project,
            "name": name,
            "dir": str(folder),
            "config": settings,
            "settings": options,
        }
        try:
            self._run = wandb.init(mode=self.mode, **arguments)
        except Exception as error:
            if self.mode == "offline":
                raise
            self.mode, self.line = "offline", f"wandb offline: {server()} refused ({type(error).__name__})"
            self._run = wandb.init(mode="offline", **arguments)

    def log(self, values: Mapping[str, Any]) -> None:
        """Add one row to the panels."""
        self._guard(lambda: self._run.log(dict(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table."""

        def send() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._guard(send)

    def finish(self) -> None:
        """Close the run; an upload that hangs is left behind after half a minute."""
        if self._run is None:
            return
        closing = threading.Thread(target=self._guard, args=(self._run.finish,), daemon=True)
        closing.start()
        closing.join(LAST_UPLOAD)
        if closing.is_alive():
            log.warning("wandb: the last upload did not end within %.0f s; to sync: wandb sync", LAST_UPLOAD)
        self._run = None

    def _guard(self, action: Any, *arguments: Any) -> None:
        if self._run is None and action != self._start:
            return
        try:
            action(*arguments)
        except Exception as error:  # whatever wandb does, the run goes on
            log.warning("wandb: %s: %s; going on without it", type(error).__name__, error)
            self._run = None
