import errno
import os
from pathlib import Path

import pytest

from mole.errors import CorruptFileError
from mole.files import file_digest, replacing, value_digest, write_json, write_text
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
