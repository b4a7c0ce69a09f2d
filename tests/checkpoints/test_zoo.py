from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mole.checkpoints import Zoo, ZooWriter
from mole.errors import CorruptFileError, MoleError
from mole.files import read_json, write_json
from mole.tasks import Metrics, Task


def write(
    folder: Path, task: Task, shards: int = 2, *, weights: torch.Tensor | None = None, seed: int = 0
) -> ZooWriter:
    """A zoo of two runs a shard, three states a run."""
    writer = ZooWriter(folder, task.spec, [0, 5, 12], {"seed": seed})
    for index in range(shards):
        values = torch.randn(2, 3, task.spec.size, generator=torch.Generator().manual_seed(index))
        values = values if weights is None or index else weights
        writer.write(
            index, [2 * index, 2 * index + 1], values, Metrics(values[..., 0].abs(), values[..., 1]), seconds=1
        )
    return writer


def test_what_is_written_is_read(tmp_path: Path, toy: Task) -> None:
    writer = write(tmp_path, toy)
    zoo = Zoo.open(tmp_path)
    assert zoo.weights.shape == (4, 3, toy.spec.size) and zoo.steps == [0, 5, 12]
    assert zoo.seeds.tolist() == [0, 1, 2, 3] and zoo.spec == toy.spec and writer.seconds() == 2
    assert torch.equal(zoo.loss, zoo.weights[..., 0].abs())
    assert repr(zoo).startswith(f"Zoo(4 runs x 3 checkpoints of {toy.spec.size} parameters, 0 runs skipped")


def test_the_split_is_by_run(tmp_path: Path, toy: Task) -> None:
    write(tmp_path, toy)
    training, heldout = Zoo.open(tmp_path).split_by_run(1)
    assert training.seeds.tolist() == [0, 1, 2] and heldout.seeds.tolist() == [3]
    with pytest.raises(MoleError, match="cannot hold out 4 of 4 runs; legal is 1 to 3"):
        Zoo.open(tmp_path).split_by_run(4)


def test_a_flipped_bit_and_a_truncated_shard_are_both_named(tmp_path: Path, toy: Task) -> None:
    writer = write(tmp_path, toy, shards=3)
    flipped, cut = tmp_path / "shard-00000.safetensors", tmp_path / "shard-00002.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(CorruptFileError) as caught:
        Zoo.open(tmp_path)
    assert "shard-00000.safetensors: truncated or altered" in str(caught.value)
    assert "shard-00002.safetensors: truncated or altered" in str(caught.value)
    assert "shard-00001" not in str(caught.value)
    assert [writer.has(i, [2 * i, 2 * i + 1]) for i in range(3)] == [False, True, False]


def test_a_missing_shard_is_named_and_an_unfinished_one_does_not_count(tmp_path: Path, toy: Task) -> None:
    write(tmp_path, toy)
    (tmp_path / "shard-00001.safetensors").rename(tmp_path / "kept")
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors: missing"):
        Zoo.open(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "shard-00001.safetensors")
    (tmp_path / "shard-00001.json").unlink()  # killed between the shard and its digest
    assert Zoo.open(tmp_path).seeds.tolist() == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_runs_that_diverged_are_left_out_and_counted(tmp_path: Path, toy: Task, value: float) -> None:
    weights = torch.randn(2, 3, toy.spec.size)
    weights[1, 2, 7] = value
    write(tmp_path, toy, weights=weights)
    zoo = Zoo.open(tmp_path)
    assert zoo.skipped == 1 and zoo.seeds.tolist() == [0, 2, 3] and bool(zoo.weights.isfinite().all())


def test_a_zoo_of_nothing_but_diverged_runs_says_so(tmp_path: Path, toy: Task) -> None:
    write(tmp_path, toy, shards=1, weights=torch.full((2, 3, toy.spec.size), float("nan")))
    with pytest.raises(MoleError, match=r"every run diverged; lower task\.learning_rate"):
        Zoo.open(tmp_path)


def test_shapes_that_differ_are_named(tmp_path: Path, toy: Task) -> None:
    writer = write(tmp_path, toy, shards=1)
    wrong = torch.zeros(2, 3, 9)
    writer.write(1, [2, 3], wrong, Metrics(wrong[..., 0], wrong[..., 0]), seconds=1)
    with pytest.raises(MoleError, match=r"weights of shape \(2, 3, 9\); this zoo holds \(runs, 3, 39\)"):
        Zoo.open(tmp_path)


def test_another_recipe_empties_the_zoo_and_the_same_one_keeps_it(tmp_path: Path, toy: Task) -> None:
    write(tmp_path, toy)
    assert ZooWriter(tmp_path, toy.spec, [0, 5, 12], {"seed": 0}).has(1, [2, 3])
    assert not ZooWriter(tmp_path, toy.spec, [0, 5, 12], {"seed": 0}).has(1, [2, 4])
    assert not ZooWriter(tmp_path, toy.spec, [0, 5, 12], {"seed": 1}).has(1, [2, 3])


def test_no_zoo_a_foreign_format_and_a_foreign_file(tmp_path: Path, toy: Task) -> None:
    with pytest.raises(MoleError, match="no zoo here"):
        Zoo.open(tmp_path)
    writer = ZooWriter(tmp_path, toy.spec, [0, 5, 12], {})
    with pytest.raises(MoleError, match="no finished shard"):
        Zoo.open(tmp_path)
    write(tmp_path, toy, shards=1)
    state = load_file(tmp_path / "shard-00000.safetensors")
    del state["loss"]
    save_file(state, tmp_path / "shard-00000.safetensors")
    from mole.files import file_digest

    write_json(tmp_path / "shard-00000.json", {"sha256": file_digest(tmp_path / "shard-00000.safetensors")})
    with pytest.raises(CorruptFileError, match="lacks loss"):
        Zoo.open(tmp_path)
    write_json(tmp_path / "zoo.json", {**read_json(tmp_path / "zoo.json"), "format": 99})
    with pytest.raises(MoleError, match="format 99; this version reads 1"):
        Zoo.open(tmp_path)
    del writer
