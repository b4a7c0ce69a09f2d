import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mole.checkpoints import Header, Zoo, ZooWriter, verify
from mole.checkpoints.format import ShardFiles, shards
from mole.errors import CorruptFileError, MoleError
from mole.files import write_json
from mole.reading.text import read_json
from mole.representations import WeightSpec
from mole.tasks import Classification

HEADER = Header("loss", "float32", {"seed": 0})


def rows(task: Classification, shard: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Weights and columns of two runs of three states."""
    weights = torch.randn(6, task.spec.size, generator=torch.Generator().manual_seed(shard))
    runs = [f"{2 * shard + run:03d}" for run in (0, 1) for _ in range(3)]
    columns = {"run": runs, "step": [0, 5, 12] * 2, "loss": weights[:, 0].abs(), "width": [shard] * 6}
    return weights, columns


def write(folder: Path, task: Classification, count: int = 2, header: Header = HEADER, name: str = "me") -> None:
    with ZooWriter(folder, header, name) as writer:
        for shard in range(count):
            writer.write(f"{name}-{shard}", task.spec, *rows(task, shard), seconds=1.5)


def test_what_is_written_is_read(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    zoo = Zoo(tmp_path)
    assert len(zoo) == 12 and zoo.runs == 4 and zoo.spec == toy.spec and zoo.columns == ["loss", "width"]
    expected = torch.cat([rows(toy, 0)[0], rows(toy, 1)[0]])
    assert torch.equal(zoo.read(range(12)), expected)
    assert torch.equal(zoo.read([7, 0, 7]), expected[[7, 0, 7]])
    torch.testing.assert_close(zoo.loss, expected[:, 0].abs())
    assert zoo.column("step").tolist() == [0, 5, 12] * 4
    assert zoo.first.tolist() == [0, 3, 6, 9] and zoo.last.tolist() == [2, 5, 8, 11]
    last = zoo[-1]
    assert (last.run, last.step, last.values["width"]) == ("003", 12, 1) and torch.equal(last.weights, expected[-1])
    network = toy.architecture.build(0)
    network.load_state_dict(last.state_dict())
    assert [checkpoint.step for checkpoint in zoo] == [0, 5, 12] * 4
    assert torch.equal(torch.cat(list(zoo.chunks(5))), expected)
    with ZooWriter(tmp_path, HEADER, "me") as writer:
        assert writer.seconds() == 3 and writer.has("me-1", ["002", "003"]) and not writer.has("me-1", ["002"])


def test_the_representation_is_true(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    zoo = Zoo(tmp_path)
    low, high = float(zoo.loss.min()), float(zoo.loss.max())
    assert repr(zoo) == (
        f"Zoo({tmp_path}: 4 runs, 12 checkpoints of 39 parameters, float32, loss {low:.4g} to {high:.4g}; "
        "columns loss, width)"
    )


def test_the_order_is_by_run_and_step_whatever_the_order_of_writing(tmp_path: Path, toy: Classification) -> None:
    weights, columns = rows(toy, 0)
    order = [4, 0, 5, 2, 1, 3]
    with ZooWriter(tmp_path, HEADER, "b") as writer:
        shuffled = {name: [values[i] for i in order] for name, values in columns.items()}
        shuffled["loss"] = columns["loss"][order]
        writer.write("b-0", toy.spec, weights[order], shuffled)
    write(tmp_path, toy, 1, name="c")
    with ZooWriter(tmp_path, HEADER, "a") as writer:
        writer.write("a-0", toy.spec, weights[:1] + 1, {"run": ["000"], "step": [3], "loss": [0.5]})
    zoo = Zoo(tmp_path).filter(run="000")
    assert zoo.column("step").tolist() == [0, 0, 3, 5, 5, 12, 12]
    assert torch.equal(zoo.read([0, 3, 5]), weights[:3]) and torch.equal(zoo.read([2])[0], weights[0] + 1)


def test_filters_take_values_lists_and_functions(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    zoo = Zoo(tmp_path)
    assert zoo.filter(width=1).runs == 2 and zoo.filter(run=["000", "003"]).runs == 2
    good = zoo.filter(loss=lambda loss: loss < 0.5, step=12)
    assert bool((good.loss < 0.5).all()) and set(good.column("step")) == {12}
    assert torch.equal(good.read(range(len(good)))[:, 0].abs(), good.loss)
    with pytest.raises(MoleError, match=r"no column 'widht'; it has .*width"):
        zoo.filter(widht=1)
    with pytest.raises(MoleError, match=r"no checkpoint is left \(width\)"):
        zoo.filter(width=7)
    assert good.digest == zoo.digest == Zoo(tmp_path).digest


def test_the_split_is_by_run(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    training, heldout = Zoo(tmp_path).split_by_run(1)
    assert training.runs == 3 and set(heldout.column("run")) == {"003"}
    assert torch.equal(heldout.read(heldout.last), rows(toy, 1)[0][5:])
    with pytest.raises(MoleError, match="cannot hold out 4 of 4 runs; legal is 1 to 3"):
        Zoo(tmp_path).split_by_run(4)


def test_random_batches_cover_the_zoo_and_depend_on_the_seed(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    zoo, seen = Zoo(tmp_path), set()
    everything = zoo.read(range(12))
    batches, again = zoo.batches(8, seed=1), zoo.batches(8, seed=1)
    for _ in range(20):
        (which, weights), (same, _) = next(batches), next(again)
        assert torch.equal(weights, everything[which]) and torch.equal(which, same)
        seen |= set(which.tolist())
    assert seen == set(range(12))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_weights_may_be_stored_in_half_precision(tmp_path: Path, toy: Classification, dtype: Any, size: int) -> None:
    write(tmp_path, toy, 1, Header("loss", dtype, {}))
    zoo, exact = Zoo(tmp_path), rows(toy, 0)[0]
    stored = load_file(tmp_path / "shards" / "me-0.safetensors")["weights"]
    assert stored.element_size() == size and zoo.read([0]).dtype == torch.float32
    torch.testing.assert_close(zoo.read(range(6)), exact.to(stored.dtype).float(), rtol=0, atol=0)


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path: Path, toy: Classification) -> None:
    weights, columns = rows(toy, 0)
    for value, dtype in ((1e6, "float16"), (float("nan"), "float32"), (float("inf"), "bfloat16")):
        weights[2, 3] = value
        with (
            ZooWriter(tmp_path / f"{value}", Header("loss", dtype, {}), "me") as writer,  # type: ignore[arg-type]
            pytest.raises(MoleError, match=f"NaN, infinite or too large for {dtype}; leave them out"),
        ):
            writer.write("me-0", toy.spec, weights, columns)
        assert not shards(tmp_path / f"{value}")


def test_the_index_is_read_by_pandas_polars_and_duckdb(tmp_path: Path, toy: Classification) -> None:
    duckdb, pandas, polars = (pytest.importorskip(name) for name in ("duckdb", "pandas", "polars"))
    write(tmp_path, toy)
    pattern = str(tmp_path / "shards" / "*.parquet")
    assert duckdb.sql(f"select count(*), max(step) from '{pattern}'").fetchall() == [(12, 12)]
    assert polars.read_parquet(pattern).filter(polars.col("width") == 1).height == 6
    frame = pandas.read_parquet(tmp_path / "shards" / "me-0.parquet")
    assert list(frame["run"].astype(str)) == rows(toy, 0)[1]["run"] and frame["digest"].nunique() == 1


def every_file(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def test_verify_finds_any_flipped_bit_and_says_which_file(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    assert verify(tmp_path) == []
    files = every_file(tmp_path)
    assert len(files) == 8  # header, layout, and three per shard
    for path in files:
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 2):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            faults = verify(tmp_path)
            assert faults and all(path.name in fault for fault in faults), (path, place, faults)
        path.write_bytes(data)
    assert verify(tmp_path) == []


def test_opening_names_every_shard_that_is_cut_off_or_missing(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy, 4)
    folder = tmp_path / "shards"
    cut, gone, index = folder / "me-0.safetensors", folder / "me-1.safetensors", folder / "me-2.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    gone.unlink()
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(CorruptFileError) as caught:
        Zoo(tmp_path)
    text = str(caught.value)
    assert f"{cut}: truncated" in text and f"{gone}: missing" in text and f"{index}: truncated" in text
    assert "me-3" not in text


def test_a_shard_cut_off_after_opening_is_said(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    zoo, path = Zoo(tmp_path), tmp_path / "shards" / "me-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match=r"me-0\.safetensors: truncated"):
        zoo.read([0])


def test_no_zoo_another_format_and_a_foreign_file(tmp_path: Path, toy: Classification) -> None:
    with pytest.raises(MoleError, match="no zoo here"):
        Zoo(tmp_path)
    ZooWriter(tmp_path, HEADER, "me").close()
    with pytest.raises(MoleError, match="no finished shard"):
        Zoo(tmp_path)
    write(tmp_path, toy, 1)
    save_file({"other": torch.zeros(2)}, tmp_path / "shards" / "me-0.safetensors")
    with pytest.raises(CorruptFileError, match=r"me-0\.safetensors: truncated or altered"):
        Zoo(tmp_path)
    write_json(tmp_path / "zoo.json", {**read_json(tmp_path / "zoo.json"), "format": 1})
    with pytest.raises(MoleError, match="format 1; this version reads 3"):
        Zoo(tmp_path)


def test_another_header_is_refused_and_nothing_is_lost(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    for other in (Header("loss", "float16", {"seed": 0}), Header("loss", "float32", {"seed": 1})):
        with pytest.raises(MoleError, match="a zoo of another recipe, metric or dtype"):
            ZooWriter(tmp_path, other, "me")
    assert len(Zoo(tmp_path)) == 12


def test_layouts_are_stored_once_and_a_zoo_of_two_asks_for_a_choice(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    wide = toy.with_config(toy.config.model_copy(update={"width": 6}))
    with ZooWriter(tmp_path, HEADER, "wide") as writer:
        columns = {"run": ["9", "9"], "step": [0, 1], "loss": [1.0, 2.0], "width": [6, 6]}
        writer.write("wide-0", wide.spec, torch.ones(2, wide.spec.size), columns)
        with pytest.raises(MoleError, match=r"weights of shape \(2, 39\) for 2 checkpoints of 57 numbers"):
            writer.write("wide-1", wide.spec, torch.ones(2, 39), columns)
    assert len(list((tmp_path / "layouts").iterdir())) == 2
    zoo = Zoo(tmp_path)
    with pytest.raises(MoleError, match=r"2 layouts \(0\.weight is \(., 5\) and \(., 5\)\); filter by a factor"):
        zoo.read([0])
    assert torch.equal(zoo.filter(width=6).read([1]), torch.ones(1, 57)) and zoo[0].weights.shape == (39,)
    assert "39 or 57 parameters" in repr(zoo)


def test_columns_of_different_writers_are_joined(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy, 1)
    with ZooWriter(tmp_path, HEADER, "other") as writer:
        columns = {"run": ["z"], "step": [0], "loss": [None], "return": [3.5], "diverged": [True]}
        writer.write("other-0", toy.spec, torch.ones(1, 39), columns)
    zoo = Zoo(tmp_path)
    assert zoo.columns == ["loss", "width", "return"] and zoo[-1].values == {"loss": None, "width": None, "return": 3.5}
    assert zoo.finished().runs == 2 and len(zoo.finished()) == 6


def test_two_processes_of_one_name_are_kept_apart(tmp_path: Path, toy: Classification) -> None:
    with ZooWriter(tmp_path, HEADER, "me") as writer:
        with pytest.raises(MoleError, match="another process writes there as 'me'"):
            ZooWriter(tmp_path, HEADER, "me")
        with ZooWriter(tmp_path, HEADER, "you") as other:
            other.write("you-0", toy.spec, *rows(toy, 0))
        writer.write("me-1", toy.spec, *rows(toy, 1))
    assert Zoo(tmp_path).runs == 4
    ZooWriter(tmp_path, HEADER, "me").close()
    with pytest.raises(MoleError, match="legal are up to 100 letters"):
        ZooWriter(tmp_path, HEADER, "../me")


def _write_many(folder: Path, task: Classification, name: str) -> None:
    with ZooWriter(folder, HEADER, name) as writer:
        for shard in range(10):
            weights, columns = rows(task, shard)
            writer.write(f"{name}-{shard}", task.spec, weights, {**columns, "run": [name + r for r in columns["run"]]})


def test_several_writers_at_once(tmp_path: Path, toy: Classification) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, toy, name)) for name in "abcd"]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0] * 4
    zoo = Zoo(tmp_path)
    assert zoo.runs == 80 and len(zoo) == 240 and verify(tmp_path) == []


def _killed_at(folder: Path, task: Classification, moment: int) -> None:
    """Write three shards, and be killed at the `moment`-th write to the disk; 0 is never."""
    calls = 0

    def hook(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapped

    os.fsync, Path.replace = hook(os.fsync), hook(Path.replace)
    with ZooWriter(folder, HEADER, "me") as writer:
        for shard in range(3):
            if not writer.has(f"me-{shard}"):
                writer.write(f"me-{shard}", task.spec, *rows(task, shard))
    (folder / "calls").write_text(str(calls))


def test_killed_at_any_moment_at_most_one_shard_is_lost_and_the_same_command_resumes(
    tmp_path: Path, toy: Classification
) -> None:
    context = multiprocessing.get_context("fork")

    def run(folder: Path, moment: int) -> int | None:
        process = context.Process(target=_killed_at, args=(folder, toy, moment))
        process.start()
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole", 0) == 0
    moments = int((tmp_path / "whole" / "calls").read_text())
    assert moments > 20
    finished: list[int] = []
    for moment in range(1, moments + 1):
        folder = tmp_path / str(moment)
        assert run(folder, moment) == -signal.SIGKILL
        visible = [files.name for files in shards(folder)]
        assert visible == [f"me-{i}" for i in range(len(visible))] and (not visible or verify(folder) == [])
        finished.append(len(visible))
        assert run(folder, 0) == 0
        assert torch.equal(Zoo(folder).read(range(18)), torch.cat([rows(toy, i)[0] for i in range(3)]))
        assert verify(folder) == []
    assert finished == sorted(finished) and set(finished) == {0, 1, 2, 3}


def test_a_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, toy: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, toy, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with ZooWriter(tmp_path, HEADER, "me") as writer:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr("mole.checkpoints.writer.save", full)
            writer.write("me-1", toy.spec, *rows(toy, 1))
        assert Zoo(tmp_path).runs == 2 and verify(tmp_path) == []
        assert not list(tmp_path.rglob(".tmp-*"))
        writer.write("me-1", toy.spec, *rows(toy, 1))
    assert Zoo(tmp_path).runs == 4


def test_hostile_headers_are_refused_before_they_are_believed(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy, 1)
    path = tmp_path / "shards" / "me-0.safetensors"
    for start in (b"\xff" * 8, b"", b"\x02" + b"\0" * 7 + b"[]", b"\x10" + b"\0" * 7 + b'{"weights": {}}  '):
        path.write_bytes(start + b"\0" * 936)
        with pytest.raises(CorruptFileError, match=r"me-0\.safetensors: truncated or altered"):
            Zoo(tmp_path)
    layout = next((tmp_path / "layouts").iterdir())
    layout.write_text('[{"name": 3}]')
    with pytest.raises(CorruptFileError, match="not a layout"):
        Zoo(tmp_path)


def test_a_zoo_without_a_metric_and_columns_that_contradict(tmp_path: Path, toy: Classification) -> None:
    with ZooWriter(tmp_path, HEADER, "a") as writer:
        writer.write("a-0", toy.spec, torch.ones(1, 39), {"run": ["x"], "step": [0], "loss": [None], "tag": ["b"]})
    assert "loss unknown" in repr(Zoo(tmp_path))
    with pytest.raises(MoleError, match="no checkpoint has a number for the metric 'loss'"):
        Zoo(tmp_path).finished()
    with ZooWriter(tmp_path, HEADER, "b") as writer:
        writer.write("b-0", toy.spec, torch.ones(1, 39), {"run": ["y"], "step": [0], "loss": [1.0], "tag": [7]})
    assert Zoo(tmp_path).column("tag").tolist() == ["b", "7"]
    with ZooWriter(tmp_path, HEADER, "c") as writer:
        writer.write("c-0", toy.spec, torch.ones(1, 39), {"run": ["z"], "step": [0], "loss": [1.0], "tag": [[7]]})
    with pytest.raises(MoleError, match="the shards disagree on what a column holds"):
        Zoo(tmp_path)


def test_truths_and_numbers_of_several_shards_become_numbers(tmp_path: Path, toy: Classification) -> None:
    for name, value in (("a", True), ("b", 7), ("c", 0.5)):
        with ZooWriter(tmp_path, HEADER, name) as writer:
            row = {"run": [name], "step": [0], "loss": [1.0], "tag": [value]}
            writer.write(f"{name}-0", toy.spec, torch.ones(1, 39), row)
    assert Zoo(tmp_path).column("tag").tolist() == [1.0, 7.0, 0.5]


def test_a_layout_that_is_gone_is_a_fault(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    (layout,) = (tmp_path / "layouts").iterdir()
    layout.unlink()
    assert verify(tmp_path) == [f"{layout}: missing"]


def test_whole_numbers_are_exact_and_weights_beyond_float16_are_told(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2), "num_batches_tracked": torch.tensor(2**40 + 1)}
    spec = WeightSpec.of_state(state)
    with ZooWriter(tmp_path, replace(HEADER, dtype="float16"), "a") as writer:
        flat, table = spec.flatten(state)[None], spec.flatten_table(state)[None]
        columns = {"run": ["x"], "step": [0], "loss": [1.0]}
        writer.write("a-0", spec, flat, columns, table=table)
        assert writer.fits(spec, torch.cat([flat, flat * 1e6])).tolist() == [True, False]
        with pytest.raises(MoleError, match=r"a table of shape \(1, 2\) for 1 checkpoints"):
            writer.write("a-1", spec, flat, columns, table=torch.zeros(1, 2, dtype=torch.int64))
    zoo = Zoo(tmp_path)
    assert zoo.read([0]).tolist() == [[1, 1]]
    found = zoo[0].state_dict()
    assert found["num_batches_tracked"].item() == 2**40 + 1 and found["num_batches_tracked"].dtype == torch.int64
    assert verify(tmp_path) == []


def test_a_metric_cannot_have_the_name_of_a_column_with_a_meaning() -> None:
    with pytest.raises(MoleError, match=r"metric 'step': this column has another meaning"):
        Header("step", "float32", {})
    with pytest.raises(MoleError, match=r"dtype 'int8'; legal is float32, float16, bfloat16"):
        Header("loss", "int8", {})  # type: ignore[arg-type]


def test_an_unfinished_shard_is_invisible_also_to_others(tmp_path: Path, toy: Classification) -> None:
    write(tmp_path, toy)
    ShardFiles(tmp_path, "me-1").index.unlink()  # killed before the last of the three files
    assert Zoo(tmp_path).runs == 2 and verify(tmp_path) == []


def test_lists_are_filtered_by_one_or_among_several(tmp_path: Path, toy: Classification) -> None:
    with ZooWriter(tmp_path, HEADER, "a") as writer:
        columns = {"run": ["x", "y"], "step": [0, 0], "loss": [1.0, 2.0], "labels": [[0, 1], [0, 1, 2]]}
        writer.write("a-0", toy.spec, torch.ones(2, 39), columns)
    zoo = Zoo(tmp_path)
    assert len(zoo.filter(labels=[0, 1])) == 1 and len(zoo.filter(labels=[[0, 1]])) == 1
    assert len(zoo.filter(labels=[[0, 1], [0, 1, 2]])) == 2
