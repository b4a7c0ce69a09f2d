import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mole.errors import CorruptFileError
from mole.files import (
    LockedError,
    file_digest,
    locked,
    read_sealed,
    replacing,
    sealed,
    sweep,
    value_digest,
    write_json,
    write_json_once,
    write_text,
)
from mole.reading.text import read_json


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.txt"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_digests() -> None:
    # sha256 of '{"a":1,"b":[2]}', worked out with the sha256sum command
    assert value_digest({"b": [2], "a": 1}) == "0855bfc20eb6cfaa4be7d6b510c63dd22997718bddadcb1a4915cec3a16145b9"
    assert value_digest({"b": [2], "a": 1}) == value_digest({"a": 1, "b": [2]}) != value_digest({"a": 1, "b": [3]})


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    write_text(tmp_path / "abc", "abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_nan_is_refused_and_broken_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    write_text(tmp_path / "x.json", '{"a": ')
    with pytest.raises(CorruptFileError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom mole.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "deep" / "x.txt")], check=False)
    (left,) = tmp_path.rglob(".tmp-*")
    with replacing(tmp_path / "mine.txt") as temporary:
        temporary.write_text("whole")
        (tmp_path / "deep" / ".tmp-my-notes.txt").write_text("somebody else's")
        assert sweep(tmp_path) == 0 and sweep(tmp_path, [tmp_path / "deep"]) == 1
        assert not left.exists() and temporary.exists() and (tmp_path / "deep" / ".tmp-my-notes.txt").exists()
    assert (tmp_path / "mine.txt").read_text() == "whole" and sweep(tmp_path) == 0
    (tmp_path / ".lock").symlink_to("mine.txt")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock", "busy"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "whole"


def test_a_lock_that_is_held_is_told_from_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")
    with locked(tmp_path / ".lock", "busy"), pytest.raises(LockedError, match="busy; wait for it"):
        locked(tmp_path / ".lock", "busy").__enter__()

    def lockless(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", lockless)
    with locked(tmp_path / ".lock", "busy"):
        assert "this file system has no locks; let one process alone work there" in caplog.text
    write_text(tmp_path / "x.txt", "written all the same")


def test_of_several_writers_one_writes_and_seals_are_compared(tmp_path: Path) -> None:
    assert write_json_once(tmp_path / "a.json", sealed({"a": 1}))
    assert not write_json_once(tmp_path / "a.json", sealed({"a": 2}))
    assert read_sealed(tmp_path / "a.json", {"a"})["a"] == 1
    write_text(tmp_path / "a.json", (tmp_path / "a.json").read_text().replace("1,", "2,"))
    with pytest.raises(CorruptFileError, match="its seal differs"):
        read_sealed(tmp_path / "a.json", {"a"})
    assert not list(tmp_path.glob(".tmp-*"))
