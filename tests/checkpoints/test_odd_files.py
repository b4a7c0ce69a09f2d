"""Imports that meet odd files, and that meet each other."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import mole
from mole.checkpoints import Zoo, import_checkpoints, verify
from mole.checkpoints.importing import ImportReport
from mole.errors import MoleError

from .. import hostile
from ..conftest import ROOT
from .test_callback import fit, small_module


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(4, 6).state_dict()


@pytest.mark.parametrize("kind", [*hostile.NOT_REGULAR, *hostile.TEXTS, *hostile.TORCH])
def test_one_odd_file_never_ends_an_import(kind: str, tmp_path: Path) -> None:
    if kind == "unfolds to 3 GB":
        pytest.skip("making it takes a quarter of a minute; tests/test_reading.py has a small one")
    source = tmp_path / "in"
    source.mkdir()
    torch.save(state(0), source / "step_1.pt")
    {**hostile.NOT_REGULAR, **hostile.TEXTS, **hostile.TORCH}[kind](source / "step_2.pt")
    torch.save(state(1), source / "step_3.pt")
    report = import_checkpoints(source, tmp_path / "zoo")
    assert {1, 3} <= set(Zoo(tmp_path / "zoo").column("step").tolist()), report
    reasons = " ".join(report.skipped)
    if "command" in kind or "module" in kind:
        assert "needs code to be run" in reasons
    elif kind not in ("folder",) and not kind.startswith("flipped"):
        assert report.skipped, kind
    if "command" not in kind and "module" not in kind:
        assert "needs code" not in reasons
    assert not Path("hacked").exists()


@pytest.mark.parametrize("kind", hostile.INDEXES)
def test_an_index_without_sense_is_refused(kind: str, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "zoo", tmp_path / "zoo")
    path = tmp_path / "zoo" / "shards" / "group-00001.parquet"
    path.unlink()
    hostile.INDEXES[kind](path)
    with pytest.raises(MoleError, match=r"group-00001\.parquet"):
        Zoo(tmp_path / "zoo")
    assert verify(tmp_path / "zoo")


IMPORT = "import sys, mole; print(mole.import_checkpoints(sys.argv[1], sys.argv[2]))"


def test_several_imports_fill_one_zoo_at_once_and_nothing_is_lost_or_twice(tmp_path: Path) -> None:
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        for step in range(12):
            torch.save(state(step), tmp_path / folder / f"step_{step}.pt")
    shutil.copytree(tmp_path / "one", tmp_path / "again" / "one")  # the same run, by another import
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", IMPORT, str(tmp_path / name), str(tmp_path / "zoo")], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two", "three", "again/one")
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), told
    zoo = Zoo(tmp_path / "zoo")
    assert len(zoo) == 36 and set(zoo.column("run")) == {"one", "two", "three"} and verify(tmp_path / "zoo") == []
    assert zoo.faults() == [] and not list((tmp_path / "zoo").rglob(".tmp-*"))


def test_an_import_and_a_callback_share_a_zoo(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).state_dict()
    torch.save({"state_dict": network, "train/loss": 1.0}, tmp_path / "step_1.pt")
    fit(L, mole.Harvest(tmp_path / "zoo", "train/loss", every_n_steps=5, submodule="model"), small_module(L))
    report: ImportReport = import_checkpoints(tmp_path / "step_1.pt", tmp_path / "zoo")
    assert report.checkpoints == 1, report
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Zoo(tmp_path / "zoo").runs == 2


def test_a_zoo_is_read_where_there_is_no_room_for_another_mapping(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mole.checkpoints import sources

    zoo, real, calls = Zoo(tiny_run / "zoo"), sources.safe_open, []
    first = zoo.read([0])

    def full(path: Path, **options: str) -> object:
        calls.append(path)
        if len(calls) == 1:
            raise MemoryError
        return real(path, **options)

    monkeypatch.setattr(sources, "safe_open", full)
    assert torch.equal(zoo.read([0, -1 % len(zoo)])[:1], first) and len(calls) == 2

    def never(path: Path, **options: str) -> object:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(sources, "safe_open", never)
    with pytest.raises(MoleError, match="no memory to read it"):
        Zoo(tiny_run / "zoo").read([0])


def test_a_truncated_lmdb_file_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("lmdb", reason="lmdb is not installed")
    from .test_importing import write_lmdb

    write_lmdb(tmp_path / "in", "run", {"it00001.pt": (torch.ones(3000), [3000], {})})
    (path,) = (tmp_path / "in").rglob("data.mdb")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "a truncated LMDB file" in str(import_checkpoints(tmp_path / "in", tmp_path / "zoo"))


def test_two_imports_of_different_networks_under_one_run_and_step_lose_nothing_in_silence(tmp_path: Path) -> None:
    from mole.checkpoints.importing import _Intake

    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder / "run").mkdir(parents=True)
        torch.save(state(number), tmp_path / folder / "run" / "step_1.pt")
    report = ImportReport(tmp_path / "zoo")
    first = _Intake(tmp_path / "zoo", report, None, None, None)
    from mole.checkpoints.foreign import candidates

    (file,) = candidates(tmp_path / "one" / "run", tmp_path / "zoo")
    first.take(file)  # gathered, and not written yet
    assert import_checkpoints(tmp_path / "two" / "run", tmp_path / "zoo").checkpoints == 1
    first.close()
    assert (report.checkpoints, report.known) == (0, 0) and "another network is there already" in str(report)


def test_odd_entries_of_a_folder_do_not_end_an_import(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    torch.save(state(0), tmp_path / "in" / "step_1.pt")
    (tmp_path / "in" / "model.safetensors.index.json").symlink_to("gone")
    assert import_checkpoints(tmp_path / "in", tmp_path / "zoo").checkpoints == 1
    shard = next((tmp_path / "zoo" / "shards").glob("*.parquet"))
    hostile.INDEXES["no columns"](shard)
    with pytest.raises(MoleError, match="no column run, step"):
        import_checkpoints(tmp_path / "in", tmp_path / "zoo")


def test_pipes_and_shapes_that_are_none_in_a_zoo_are_faults(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "zoo", tmp_path / "zoo")
    path = tmp_path / "zoo" / "shards" / "group-00000.safetensors"
    size = path.stat().st_size
    for shape, layout in (([1, 2], ["x"]), (["a", 50_000_000], "x"), ([2**60, 2**60], "x")):
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
        hostile.safetensors({"__metadata__": {"layout": layout}, "weights": tensor}, b"\0" * 64)(path)
        assert any("group-00000" in fault for fault in verify(tmp_path / "zoo"))
    path.unlink()
    os.mkfifo(path)
    assert any("a named pipe" in fault for fault in verify(tmp_path / "zoo"))
