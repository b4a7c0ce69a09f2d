import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mole import tracking
from mole.config import TrackingConfig
from mole.tracking import Tracker, choose_mode, server_answers


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    monkeypatch.setattr(tracking, "LAST_UPLOAD", 5.0)


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[str]:
    """A server that answers everything with 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def unreachable() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"  # closed by the time it is asked


def test_without_a_key_it_is_offline_and_says_so() -> None:
    mode, line = choose_mode(TrackingConfig())
    assert mode == "offline" and "no key found" in line


def test_a_key_in_netrc_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusing: str) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("WANDB_BASE_URL", refusing)
    assert choose_mode(TrackingConfig())[0] == "online"


def test_the_environment_and_the_configuration_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(TrackingConfig())[0] == "disabled"
    assert choose_mode(TrackingConfig(mode="offline"))[0] == "offline"


def test_unreachable_and_silent_servers_do_not_answer(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for address in (unreachable(), silent, "not an address"):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert not server_answers(0.5)
        mode, line = choose_mode(TrackingConfig())
        assert mode == "offline" and "does not answer" in line


@pytest.mark.parametrize("kind", ["unreachable", "silent", "refusing"])
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_no_server_ends_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, silent: str, refusing: str, kind: str, mode: str
) -> None:
    address = {"unreachable": unreachable(), "silent": silent, "refusing": refusing}[kind]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    tracker = Tracker(TrackingConfig.model_validate({"mode": mode}), name="t", folder=tmp_path / "run", settings={})
    tracker.log({"train/loss": 1.0})
    tracker.table("rank/networks", ["file", "score"], [["a", 1.0]])
    tracker.finish()
    assert tracker.mode == "offline" and "sync" in tracker.line
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_fault_of_wandb_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(TrackingConfig(mode="disabled"), name="t", folder=tmp_path, settings={})

    class Broken:
        def log(self, _: object) -> None:
            raise RuntimeError("wandb is on fire")

    tracker._run = Broken()
    tracker.log({"a": 1})
    tracker.log({"a": 2})
    tracker.finish()
    assert caplog.text.count("wandb is on fire; going on without it") == 1
