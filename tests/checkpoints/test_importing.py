import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mole
from mole.checkpoints import Zoo, import_checkpoints, verify
from mole.errors import MoleError
from mole.tasks import Architecture

from .test_callback import L, fit, small_module


def network(seed: int, widths: tuple[int, int, int] = (4, 6, 2)) -> dict[str, Tensor]:
    return Architecture(kind="mlp", widths=list(widths)).build(seed).state_dict()


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code in a file was run",))


def test_folders_of_plain_files_in_every_format(tmp_path: Path) -> None:
    source, zoo = tmp_path / "runs", tmp_path / "zoo"
    (source / "a").mkdir(parents=True)
    (source / "b" / "deep").mkdir(parents=True)
    torch.save(network(1), source / "a" / "step_10.pt")
    torch.save({"model_state_dict": network(2), "step": 200, "loss": 0.5, "lr": 0.1}, source / "a" / "last.pth")
    torch.save({"model": {f"module.{k}": v for k, v in network(3).items()}, "metrics": {"loss": 0.25}},
               source / "a" / "epoch=7-val_loss=0.75.ckpt")  # fmt: skip
    save_file(network(4), source / "b" / "deep" / "model-3.safetensors")
    report = import_checkpoints(source, zoo, metric="loss")
    assert (report.checkpoints, sorted(report.runs), report.skipped) == (4, ["a", "b/deep"], {})
    found = Zoo(zoo)
    assert found.column("run").tolist() == ["a", "a", "a", "b/deep"]
    assert found.column("step").tolist() == [7, 10, 200, 3]
    assert torch.equal(found.read(range(4)), torch.stack([flat(network(seed)) for seed in (3, 1, 2, 4)]))
    assert found[2].values["loss"] == 0.5 and found[0].values["loss"] == 0.25 and found[0].values["val_loss"] == 0.75
    assert found[0].values["source"] == "a/epoch=7-val_loss=0.75.ckpt" and verify(zoo) == []


def test_the_same_call_again_takes_in_only_what_is_new(tmp_path: Path) -> None:
    torch.save(network(1), tmp_path / "step1.pt")
    zoo = tmp_path / "zoo"  # inside the folder that is searched, and passed over
    assert import_checkpoints(tmp_path, zoo).checkpoints == 1
    torch.save(network(2), tmp_path / "step2.pt")
    report = import_checkpoints(tmp_path, zoo)
    assert (report.checkpoints, report.known, report.skipped) == (1, 1, {})
    assert Zoo(zoo).column("step").tolist() == [1, 2]
    assert import_checkpoints(tmp_path, zoo).checkpoints == 0
    assert str(report).startswith(f"{zoo}: 1 checkpoints of 1 runs taken in, 1 were there already")


def test_lightning_checkpoints_lose_their_prefix_and_keep_step_and_monitor(tmp_path: Path) -> None:
    class Watch(L.pytorch.callbacks.ModelCheckpoint):
        pass

    module = small_module(L)
    keep = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "ckpts", monitor="val/loss", save_top_k=-1)
    fit(L, keep, module, enable_checkpointing=True)
    report = import_checkpoints(tmp_path / "ckpts", tmp_path / "zoo")
    zoo = Zoo(tmp_path / "zoo")
    assert report.checkpoints == 2 and zoo.column("step").tolist() == [10, 20] and zoo.metric == "val/loss"
    assert [entry.name for entry in zoo.spec.entries] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(zoo.read([1])[0], flat(module.model.state_dict()))
    assert 0 < zoo[1].values["val/loss"] < zoo[0].values["val/loss"]


def test_hugging_face_folders_with_the_metrics_of_the_trainer(tmp_path: Path) -> None:
    source = tmp_path / "my-model"
    for step, loss in ((500, 0.5), (1000, 0.25)):
        folder = source / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(network(step), folder / "model.safetensors")
        torch.save({"state": {}}, folder / "optimizer.pt")
        history = [{"step": 500, "eval_loss": 0.5}, {"step": step, "loss": loss + 1}, {"step": step, "eval_loss": loss}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    report = import_checkpoints(source, tmp_path / "zoo")
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.column("step").tolist() == [500, 1000] and zoo.runs == 1 and zoo.column("run")[0] == "my-model"
    assert zoo.metric == "eval_loss" and zoo.loss.tolist() == [0.5, 0.25] and zoo.column("loss").tolist() == [1.5, 1.25]
    assert list(report.skipped) == ["not a network (state of an optimiser, scheduler or random generator)"]


def test_networks_in_several_files_are_put_together(tmp_path: Path) -> None:
    state = network(1)
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = import_checkpoints(tmp_path, tmp_path / "zoo")
    assert report.checkpoints == 1 and report.skipped == {}
    found = Zoo(tmp_path / "zoo")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def write_lmdb(folder: Path, run: str, checkpoints: dict[str, tuple[Tensor, list[int], dict[str, float]]]) -> None:
    lmdb = pytest.importorskip("lmdb")
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as transaction:
        for key, (weights, sizes, _) in checkpoints.items():
            transaction.put(key.encode(), weights.numpy().tobytes())
            transaction.put(f"{key}_arch".encode(), np.array(sizes, np.float32).tobytes())
    content = {"checkpoints": {key: values for key, (_, _, values) in checkpoints.items()}, "metadata": {}}
    (folder / "runs.json").write_text(json.dumps(content))


def test_runs_of_gpt_with_the_steps_of_their_keys(tmp_path: Path) -> None:
    networks = [flat(network(seed, (784, 10, 10))) for seed in (1, 2)]
    sizes = [7840, 10, 100, 10]
    write_lmdb(tmp_path / "mnist" / "000003", "000003", {
        "000003/ep000_it00000.pt": (networks[0], sizes, {"avg_test_loss": 2.3, "avg_test_err": 90.0}),
        "000003/ep002_it00010.pt": (networks[1], sizes, {"avg_test_loss": 0.3, "avg_test_err": 9.0}),
    })  # fmt: skip
    policy = flat(Architecture(kind="policy", widths=[4, 32, 32, 1], activation="selu").build(0).state_dict())
    critic = torch.ones(1249)
    parts = [1, 128, 32, 1024, 32, 32, 1]
    write_lmdb(tmp_path / "cartpole" / "000000", "000000", {
        "000000/it00007.pt": (torch.cat([policy, critic]), [*parts, *parts[1:]], {"train_ret": 12.0}),
    })  # fmt: skip
    report = import_checkpoints(tmp_path / "mnist", tmp_path / "a")
    zoo = Zoo(tmp_path / "a")
    assert report.checkpoints == 2 and zoo.metric == "avg_test_loss" and zoo.column("step").tolist() == [0, 946]
    assert torch.equal(zoo.read([0, 1]), torch.stack(networks)) and zoo.loss.tolist() == pytest.approx([2.3, 0.3])
    assert zoo.column("run").tolist() == ["000003"] * 2 and zoo.spec.groups["0"].size == 10
    import_checkpoints(tmp_path / "cartpole", tmp_path / "b", metric="train_ret")
    assert torch.equal(Zoo(tmp_path / "b").read([0])[0], policy) and Zoo(tmp_path / "b").column("step").tolist() == [7]


def test_everything_that_cannot_be_taken_in_is_grouped_counted_and_explained(tmp_path: Path) -> None:
    source = tmp_path / "runs"
    source.mkdir()
    torch.save(network(1), source / "0.pt")
    for number in (1, 2):
        torch.save({"model": Trap()}, source / f"code{number}.pt")
    (source / "cut.pt").write_bytes((source / "0.pt").read_bytes()[:300])
    (source / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      " + b"\0" * 7)
    (source / "text.ckpt").write_text("hello")
    torch.save(network(2, (4, 7, 2)), source / "wide.pt")
    state = network(3)
    state["0.bias"][1] = float("nan")
    torch.save(state, source / "nan.pt")
    torch.save([1, 2], source / "list.pt")
    torch.save({"losses": torch.arange(3)}, source / "numbers.pt")
    torch.save({name: tensor.double() for name, tensor in network(1).items()}, source / "double.pt")
    write_lmdb(source / "foreign", "x", {"it00001.pt": (torch.ones(9), [4, 5], {})})
    (source / "broken").mkdir()
    (source / "broken" / "data.mdb").write_bytes(b"x" * 9000)
    (source / "broken" / "runs.json").write_text('{"checkpoints": {"a": {}}}')
    report = import_checkpoints(source, tmp_path / "zoo")
    skipped = {reason: sorted(paths) for reason, paths in report.skipped.items()}
    needs_code = next(reason for reason in skipped if reason.startswith("needs code"))
    assert "which is never done" in needs_code and skipped.pop(needs_code) == ["code1.pt", "code2.pt"]
    assert skipped.pop("truncated, or not a safetensors file") == ["cut.safetensors"]
    assert skipped.pop("truncated, or not a checkpoint") == ["cut.pt", "text.ckpt"]
    assert skipped.pop("another shape than the first: 0.weight is (6, 4) and (7, 4)") == ["wide.pt"]
    assert skipped.pop("weights that are NaN or infinite") == ["nan.pt"]
    assert skipped.pop("no state dict in it") == ["list.pt", "numbers.pt"]
    assert skipped.pop("a damaged LMDB file") == ["broken"]
    (double,) = [reason for reason in skipped if "float64" in reason]
    assert skipped.pop(double) == ["double.pt"]
    (foreign,) = skipped
    assert "tensors with [4, 5] numbers, which is none of G.pt's; give `module`" in foreign
    assert Zoo(tmp_path / "zoo").column("source").tolist() == ["0.pt"]
    lines = str(report).splitlines()
    assert lines[1].startswith("  2 left out: ") and f"  2 left out: {needs_code} (code1.pt, code2.pt)" in lines


def test_a_module_says_what_fits_and_what_is_interchangeable(tmp_path: Path) -> None:
    torch.save(network(1), tmp_path / "1.pt")
    torch.save(network(1, (4, 7, 2)), tmp_path / "0.pt")
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    report = import_checkpoints(tmp_path, tmp_path / "zoo", module=module)
    assert report.checkpoints == 1 and list(report.skipped.values()) == [["0.pt"]]
    assert Zoo(tmp_path / "zoo").spec.groups["0"].size == 6


def test_nothing_there_and_another_zoo(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="no such file or folder"):
        import_checkpoints(tmp_path / "none", tmp_path / "zoo")
    (tmp_path / "empty").mkdir()
    report = import_checkpoints(tmp_path / "empty", tmp_path / "zoo")
    assert report.checkpoints == 0 and "no .bin, .ckpt, .pt, .pth, .safetensors file" in str(report)
    torch.save({"model": network(1), "loss": 1.0}, tmp_path / "empty" / "1.pt")
    assert mole.import_checkpoints(tmp_path / "empty", tmp_path / "zoo").checkpoints == 1
    with pytest.raises(MoleError, match="a zoo of metric 'loss'; legal here is that one"):
        import_checkpoints(tmp_path / "empty", tmp_path / "zoo", metric="acc")


def test_a_single_file_and_batch_norm_counters(tmp_path: Path) -> None:
    module: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module(torch.randn(8, 3))
    torch.save(module.state_dict(), tmp_path / "one.pt")
    assert import_checkpoints(tmp_path / "one.pt", tmp_path / "zoo").checkpoints == 1
    found = Zoo(tmp_path / "zoo")[0].state_dict()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in module.state_dict().items())


@pytest.mark.parametrize(
    ("names", "contents", "steps"),
    [
        (["a", "b", "c"], [{}, {}, {}], [0, 1, 2]),  # the files' order
        (["step_500", "step_1000"], [{"epoch": 0}, {"epoch": 0}], [500, 1000]),
        (["vit16_epoch1", "vit16_epoch2"], [{}, {}], [1, 2]),
        (["x1", "x2"], [{"global_step": 30}, {"iteration": 40}], [30, 40]),
    ],
)
def test_where_steps_come_from(
    tmp_path: Path, names: list[str], contents: list[dict[str, int]], steps: list[int]
) -> None:
    for seed, (name, content) in enumerate(zip(names, contents, strict=True)):
        torch.save({"state_dict": network(seed), **content} if content else network(seed), tmp_path / f"{name}.pt")
    assert import_checkpoints(tmp_path, tmp_path / "zoo").checkpoints == len(names)
    assert Zoo(tmp_path / "zoo").column("step").tolist() == steps


def test_another_network_of_the_same_run_and_step_is_not_called_known(tmp_path: Path) -> None:
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder / "run").mkdir(parents=True)
        torch.save(network(number), tmp_path / folder / "run" / "step_1.pt")
    zoo = tmp_path / "zoo"
    assert import_checkpoints(tmp_path / "one" / "run", zoo).checkpoints == 1
    report = import_checkpoints(tmp_path / "two" / "run", zoo)
    assert (report.checkpoints, report.known) == (0, 0)
    assert "another network is there already as step 1 of run 'run'" in str(report)
    assert import_checkpoints(tmp_path / "one" / "run", zoo).known == 1


def test_tensors_are_no_metrics_and_metrics_no_reserved_columns(tmp_path: Path) -> None:
    torch.save({**network(1), "count": torch.tensor(3.0)}, tmp_path / "step1.pt")
    torch.save(
        {"state_dict": {**network(2), "count": torch.tensor(3.0)}, "run": 7, "digest": 1.0}, tmp_path / "step2.pt"
    )
    assert import_checkpoints(tmp_path, tmp_path / "zoo").checkpoints == 2
    zoo = Zoo(tmp_path / "zoo")
    assert set(zoo.columns) == {"metrics.run", "metrics.digest", "source", "content"} and zoo.runs == 1


def test_tensors_without_numbers_are_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = network(1)
    torch.save(good, tmp_path / "step1.pt")
    torch.save({**good, "0.weight": torch.zeros(1).expand(10**13)}, tmp_path / "step2.pt")
    torch.save({**good, "0.weight": good["0.weight"].to_sparse()}, tmp_path / "step3.pt")
    torch.save({name: tensor.to("meta") for name, tensor in good.items()}, tmp_path / "step4.pt")
    whole = tmp_path / "step5.pt"
    torch.save(good, whole, _use_new_zipfile_serialization=False)
    for length in range(20, whole.stat().st_size, 97):
        (tmp_path / f"step{1000 + length}.pt").write_bytes(whole.read_bytes()[:length])
    report = import_checkpoints(tmp_path, tmp_path / "zoo", dtype="float16")
    assert report.checkpoints == 2
    text = str(report)
    assert "claim more numbers than the file has" in text and text.count("sparse, nested, quantised or without") == 1
    torch.save({name: tensor * 1e6 for name, tensor in good.items()}, tmp_path / "step9.pt")
    assert "weights too large for float16" in str(import_checkpoints(tmp_path, tmp_path / "zoo", dtype="float16"))


def test_a_zoo_without_its_metric_can_be_looked_at(tmp_path: Path) -> None:
    torch.save(network(1), tmp_path / "step1.pt")
    report = import_checkpoints(tmp_path, tmp_path / "zoo", metric="vall_loss")
    assert "none of them has the metric 'vall_loss'" in str(report)
    assert "vall_loss unknown" in repr(Zoo(tmp_path / "zoo"))


def test_values_that_no_column_holds_are_left_out_or_told_as_text(tmp_path: Path) -> None:
    good = network(1)
    torch.save({"state_dict": good, "loss": 10**400, "step": 3}, tmp_path / "a.pt")
    torch.save({"state_dict": network(2), "step": 2**64}, tmp_path / "b7.pt")
    torch.save({"state_dict": network(3), "m\udc80": 0.5}, tmp_path / "c8.pt")
    torch.save({"x\udc80": torch.ones(2)}, tmp_path / "d9.pt")
    torch.save(dict(nn.Linear(4, 6).named_parameters()), tmp_path / "e1.pt")  # another shape, and needs a gradient
    deep = tmp_path / "checkpoint-5"
    deep.mkdir()
    torch.save(network(4), deep / "model.pt")
    (deep / "trainer_state.json").write_text("[" * 100_000)
    report = import_checkpoints(tmp_path, tmp_path / "zoo", module=None)
    text = str(report)
    text.encode("utf-8")
    assert report.checkpoints == 3 and "no Unicode text" in text and "trainer_state.json is damaged" in text
    assert sorted(Zoo(tmp_path / "zoo").column("step").tolist()) == [3, 7, 8]


def test_parameters_are_taken_in_like_tensors(tmp_path: Path) -> None:
    torch.save(dict(nn.Linear(4, 6).named_parameters()), tmp_path / "step9.pt")
    assert import_checkpoints(tmp_path, tmp_path / "zoo").checkpoints == 1


def test_files_known_by_their_order_stay_known_when_one_is_added(tmp_path: Path) -> None:
    for number, name in enumerate(("best", "final", "last")):
        torch.save(network(number), tmp_path / f"{name}.pt")
    zoo = tmp_path / "zoo"
    assert import_checkpoints(tmp_path, zoo).checkpoints == 3
    torch.save(network(9), tmp_path / "average.pt")
    report = import_checkpoints(tmp_path, zoo)
    assert (report.checkpoints, report.known, report.skipped) == (1, 3, {})
    assert Zoo(zoo).column("step").tolist() == [0, 1, 2, 3] and Zoo(zoo)[3].values["source"] == "average.pt"


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    torch.save(network(1), tmp_path / "step1.pt")
    import_checkpoints(tmp_path, tmp_path / "zoo", dtype="bfloat16")
    assert import_checkpoints(tmp_path, tmp_path / "zoo").known == 1
    with pytest.raises(MoleError, match="a zoo of dtype bfloat16; legal here is that one, or another folder"):
        import_checkpoints(tmp_path, tmp_path / "zoo", dtype="float16")
