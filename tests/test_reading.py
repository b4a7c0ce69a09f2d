"""Files of any origin are read, or refused with their true reason; nothing hangs, nothing runs."""

import struct
import zipfile
from pathlib import Path

import pytest
import torch

from mole.config import load
from mole.errors import ConfigError, CorruptFileError
from mole.reading.guard import available_memory, check_file, check_promise, in_bytes
from mole.reading.tables import read_parquet
from mole.reading.tensors import check_tensors, read_npz, read_safetensors, read_torch
from mole.reading.text import parse_json, read_json
from mole.reading.yaml_text import parse_yaml

from . import hostile

EXPECTED = (CorruptFileError, OSError)


@pytest.mark.parametrize("kind", hostile.NOT_REGULAR)
@pytest.mark.parametrize(
    "read", [read_json, read_safetensors, read_torch, read_parquet], ids=lambda read: read.__name__
)
def test_what_is_no_regular_file_is_refused_before_it_is_opened(kind: str, read: object, tmp_path: Path) -> None:
    hostile.NOT_REGULAR[kind](tmp_path / "x")
    with pytest.raises(EXPECTED, match="x"):
        read(tmp_path / "x")  # type: ignore[operator]


@pytest.mark.parametrize("kind", hostile.TEXTS)
def test_texts_are_json_or_refused(kind: str, tmp_path: Path) -> None:
    hostile.TEXTS[kind](tmp_path / "x.json")
    try:
        read_json(tmp_path / "x.json")
    except CorruptFileError as error:
        assert "x.json: " in str(error) and len(str(error)) < 500
    if kind != "empty":
        with pytest.raises(ConfigError):
            load([tmp_path / "x.json"])


@pytest.mark.parametrize("kind", hostile.YAMLS)
def test_configurations_of_any_origin_are_refused_in_words(kind: str, tmp_path: Path) -> None:
    hostile.YAMLS[kind](tmp_path / "x.yaml")
    with pytest.raises(ConfigError) as caught:
        load([tmp_path / "x.yaml"])
    assert "x.yaml" in str(caught.value)


def test_anchors_and_merges_of_honest_people_work() -> None:
    text = "base: &b {steps: 3, width: 4}\nnew:\n  <<: *b\n  width: 8\n"
    assert parse_yaml(text)["new"] == {"steps": 3, "width": 8} and parse_yaml("a: 1e-3") == {"a": 0.001}
    assert parse_yaml("") is None
    with pytest.raises(ValueError, match="an anchor that holds itself"):
        parse_yaml("a: &a [*a]")
    with pytest.raises(ValueError, match="unfolds to more than 100,000 values"):
        parse_yaml(hostile.ANCHORS)


@pytest.mark.parametrize("kind", [kind for kind in hostile.SAFETENSORS if kind != "a million tensors"])
def test_safetensors_that_are_none_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    hostile.SAFETENSORS[kind](path)
    try:
        assert kind.startswith(("control characters", "shape of 2**60")) or not read_safetensors(path)
    except CorruptFileError as error:
        assert str(error).startswith(f"{path}: ")


REASONS = {
    "runs a command": r"needs code to be run \(posix\.system\), which is never done",
    "runs a command, old format": r"needs code to be run \(posix\.system\)",
    "a bare pickle that runs a command": r"needs code to be run \(posix\.system\)",
    "a whole module": r"needs code to be run \(torch\.nn\.modules\.linear\.Linear\)",
    "TorchScript": r"a TorchScript program, not a state dict: save module\.state_dict\(\)",
    "torch.export": r"a program of torch\.export, not a state dict",
    "Git LFS": "a pointer of Git LFS, not the file itself: run git lfs pull",
    "HTML": "a page of HTML or XML, not a checkpoint",
    "gzip": "a compressed file: unpack it first",
    "zip of nothing": "truncated, or not a checkpoint|a zip archive without",
    "a NumPy archive": "a NumPy archive, not a checkpoint",
    "zeros": "a file of zeros",
    "text": "truncated, or not a checkpoint",
    "deep pickle": "truncated, or not a checkpoint|nested too deeply",
    "flipped at 0.65": "damaged|truncated, or not a checkpoint",
    "cut at 0.5": "truncated, or not a checkpoint",
}


@pytest.mark.parametrize("kind", REASONS)
def test_checkpoints_are_refused_with_their_true_reason(kind: str, tmp_path: Path) -> None:
    hostile.TORCH[kind](tmp_path / "x.pt")
    with pytest.raises(CorruptFileError, match=REASONS[kind]):
        read_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_byte_of_a_checkpoint_is_seen_or_harmless(share: float, tmp_path: Path) -> None:
    hostile.flipped(hostile.STATE, share)(tmp_path / "x.pt")
    try:
        state = read_torch(tmp_path / "x.pt")
    except CorruptFileError:
        return
    assert all(torch.equal(state[name], tensor) for name, tensor in hostile.STATE.items())


def test_an_archive_that_unfolds_is_refused_by_its_promise(tmp_path: Path) -> None:
    hostile.saved({"w": torch.zeros(4)})(tmp_path / "small.pt")
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as small,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for info in small.infolist():
            archive.writestr(info.filename, b"\0" * 2**25 if info.filename.endswith("data/0") else small.read(info))
    with pytest.raises(CorruptFileError, match=r"that unfold to 33\.\d MB, as no checkpoint of PyTorch does"):
        read_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["nested tensors", "sparse tensors", "expanded tensors", "meta tensors"])
def test_tensors_that_are_not_plain_are_named(kind: str, tmp_path: Path) -> None:
    hostile.TORCH[kind](tmp_path / "x.pt")
    with pytest.raises(
        CorruptFileError, match=r"nested, quantised or without data|claim more numbers|not a checkpoint"
    ):
        check_tensors(read_torch(tmp_path / "x.pt"))


@pytest.mark.parametrize("kind", hostile.NPZ)
def test_archives_promise_no_more_than_they_have(kind: str, tmp_path: Path) -> None:
    hostile.NPZ[kind](tmp_path / "x.npz")
    if kind in ("256 TiB", "objects", "no zip", "zip of texts"):
        with pytest.raises(CorruptFileError, match=r"x\.npz: (not an archive of numbers|promises)"):
            read_npz(tmp_path / "x.npz", ("inputs",))
    else:
        read_npz(tmp_path / "x.npz", ("inputs",))


def test_memory_is_asked_for_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_memory() < 2**50
    with pytest.raises(CorruptFileError, match="x: promises 1,000,000 TB"):
        check_promise(Path("x"), 10**18)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert check_file(tmp_path / "x.safetensors") == 10 and read_safetensors(tmp_path / "x.safetensors") == {}
    assert [in_bytes(n) for n in (512, 3_200_000, 160e9)] == ["512 B", "3.2 MB", "160 GB"]
    with pytest.raises(ValueError, match="nested"):
        parse_json("[" * 101 + "]" * 101)
