import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mole
from mole.checkpoints import Header, Zoo, ZooWriter, verify
from mole.errors import HarvestWarning, MoleError

from ..conftest import ROOT

LIBRARIES = pytest.mark.parametrize("library", [L, pl], ids=["lightning", "pytorch_lightning"])


def small_module(library: Any, learning_rate: float = 0.1, tag: str = "a") -> Any:
    class Small(library.LightningModule):
        def __init__(self, learning_rate: float, tag: str) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", F.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.hparams["learning_rate"])

    torch.manual_seed(0)
    return Small(learning_rate, tag)


def data(size: int = 80) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=8)


def fit(
    library: Any, harvest: Any, module: Any = None, *, resume: str | None = None, quietly: bool = True, **options: Any
) -> Any:
    module = module or small_module(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if quietly else "default")
        settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = library.Trainer(
            **{
                **settings,
                "enable_model_summary": False,
                "accelerator": "cpu",
                "devices": 1,
                "callbacks": [harvest],
                **options,
            }
        )
        trainer.fit(module, data(), data(16), ckpt_path=resume)
    return trainer


@LIBRARIES
def test_a_training_leaves_its_history_with_metrics_and_hyper_parameters(library: Any, tmp_path: Path) -> None:
    module = small_module(library)
    first = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    harvest = mole.Harvest(tmp_path, "val/loss", every_n_steps=4, submodule="model", run="one")
    fit(library, harvest, module)
    zoo = Zoo(tmp_path)
    assert zoo.runs == 1 and set(zoo.column("run")) == {"one"} and zoo.metric == "val/loss"
    assert zoo.column("step").tolist() == [0, 4, 8, 10, 12, 16, 20]  # every fourth, and at validations
    start, end = zoo[0].state_dict(), zoo[-1].state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in first.items())
    assert all(torch.equal(end[name], tensor) for name, tensor in module.model.state_dict().items())
    assert zoo.spec.groups["0"].size == 6
    assert zoo.column("learning_rate").tolist() == [0.1] * 7 and set(zoo.column("tag")) == {"a"}
    fresh = zoo.filter(step=[10, 20])
    assert fresh.column("metric_step").tolist() == [10, 20]
    inputs, labels = next(iter(data(16)))[0], next(iter(data(16)))[1]
    assert len(inputs) == 8 and len(labels) == 8
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    network.load_state_dict(end)
    everything = data(16).dataset
    images, wanted = everything.tensors  # type: ignore[attr-defined]
    assert fresh[1].values["val/loss"] == pytest.approx(F.cross_entropy(network(images), wanted).item(), rel=1e-5)
    stale = zoo.filter(step=16)[0].values
    assert stale["metric_step"] == 10 and stale["val/loss"] == fresh[0].values["val/loss"]
    assert zoo[0].values["val/loss"] is None and zoo.finished().column("step").tolist() == [10, 12, 16, 20]


@LIBRARIES
def test_a_metric_that_is_never_logged_is_one_warning_that_lists_what_was(library: Any, tmp_path: Path) -> None:
    missing = r"metric 'val/los' has not been logged; logged were: train/loss, val/loss; did you mean 'val/loss'\?"
    with pytest.warns(HarvestWarning, match=missing) as caught:
        trainer = fit(library, mole.Harvest(tmp_path, "val/los", every_n_steps=4), quietly=False)
    assert trainer.global_step == 20 and len([w for w in caught if w.category is HarvestWarning]) == 1
    assert Zoo(tmp_path).column("step").tolist()[0] == 0  # and what was kept is there


@LIBRARIES
def test_a_resumed_training_goes_on_in_the_same_run(library: Any, tmp_path: Path) -> None:
    whole = small_module(library)
    fit(library, mole.Harvest(tmp_path / "whole", "train/loss", every_n_steps=3, run="x"), whole, max_epochs=3)
    path = str(tmp_path / "state.ckpt")
    first = fit(library, mole.Harvest(tmp_path / "zoo", "train/loss", every_n_steps=3, run="x"), max_epochs=2)
    first.save_checkpoint(path)
    fit(library, mole.Harvest(tmp_path / "zoo", "train/loss", every_n_steps=3), resume=path, max_epochs=3)
    parts, together = Zoo(tmp_path / "zoo"), Zoo(tmp_path / "whole")
    assert parts.column("run").tolist() == ["x"] * len(parts)
    steps = parts.column("step").tolist()
    assert steps == sorted(set(steps)) and steps == together.column("step").tolist()
    assert torch.equal(parts.read([-1 % len(parts)]), together.read([-1 % len(together)]))
    with pytest.warns(HarvestWarning, match="run 'x' is there already; this one is 'x-2'"):
        fit(library, mole.Harvest(tmp_path / "zoo", "train/loss", run="x"), quietly=False)
    assert Zoo(tmp_path / "zoo").runs == 2


def test_several_trainings_share_a_zoo(tmp_path: Path) -> None:
    for rate, tag in ((0.1, "a"), (0.3, "b")):
        fit(L, mole.Harvest(tmp_path, "val/loss", every_n_steps=5), small_module(L, rate, tag))
    zoo = Zoo(tmp_path)
    assert zoo.runs == 2 and sorted(set(zoo.column("learning_rate"))) == [0.1, 0.3]
    assert zoo.filter(tag="b").runs == 1
    with pytest.warns(HarvestWarning, match="another recipe, metric or dtype"):
        assert fit(L, mole.Harvest(tmp_path, "train/loss"), quietly=False).global_step == 20


DDP = """
import sys
import lightning as L, mole, torch
from tests.checkpoints.test_callback import Module, data
if __name__ == "__main__":
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[mole.Harvest(sys.argv[1], "val/loss", every_n_steps=2, run="ddp")])
    trainer.fit(Module(), data(), data(16))
    torch.distributed.destroy_process_group()  # left to the interpreter's exit, gloo's threads abort now and then
"""

KILL = """
import os, signal, sys
import lightning as L, mole
from mole.checkpoints import callback
from tests.checkpoints.test_callback import data, small_module
class Die(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 17:
            os.kill(os.getpid(), signal.SIGKILL)
callback.FLUSH_SECONDS = 0.0
harvest = mole.Harvest(sys.argv[1], "train/loss", every_n_steps=2, run="k")
L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
    enable_model_summary=False, callbacks=[harvest, Die()]).fit(small_module(L), data())
"""


def run_script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with its folder's zoo as the argument."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder / "zoo")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_data_parallel_training_is_written_by_the_first_process(tmp_path: Path) -> None:
    done = run_script(DDP, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    zoo = Zoo(tmp_path / "zoo")
    assert set(zoo.column("run")) == {"ddp"} and zoo.column("step").tolist() == [0, 2, 4, 5]
    assert "model.0.weight" in zoo[0].state_dict()


def test_a_killed_training_leaves_what_was_written(tmp_path: Path) -> None:
    assert run_script(KILL, tmp_path).returncode == -signal.SIGKILL
    assert Zoo(tmp_path / "zoo").column("step").tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert verify(tmp_path / "zoo") == []


class Module(L.LightningModule):
    """At the top of the file, where a spawned process finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.model(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_weights_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    harvest = mole.Harvest(tmp_path, "train/loss", every_n_steps=2)
    fit(L, harvest, small_module(L, 1e30), max_epochs=1)
    assert harvest.skipped >= 4 and Zoo(tmp_path).column("step").tolist() == [0]


def test_an_exception_in_the_training_writes_what_was_kept(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("stop here")

    harvest = mole.Harvest(tmp_path, "train/loss", every_n_steps=2)
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        accelerator="cpu", enable_model_summary=False, callbacks=[harvest, Stop()])  # fmt: skip
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(small_module(L), data())
    assert Zoo(tmp_path).column("step").tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0; legal is a whole number of at least 1"),
        ({"every_n_steps": True}, "every_n_steps is True"),
        ({"run": "a/b"}, "run 'a/b': legal are up to 100 letters"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(MoleError, match=text):
        mole.Harvest(tmp_path, "val/loss", **options)


def test_a_submodule_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.warns(HarvestWarning, match=r"submodule 'modle': not there; Small has \['model'\]"):
        assert fit(L, mole.Harvest(tmp_path, "val/loss", submodule="modle"), quietly=False).global_step == 20


def test_logged_names_of_columns_with_a_meaning_get_a_prefix(tmp_path: Path) -> None:
    module = small_module(L)
    plain = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        module.log("step", 3.0)
        module.log("run", 4.0)
        return plain(batch, batch_idx)

    module.training_step = training_step
    two = [mole.Harvest(tmp_path / name, metric="train/loss", every_n_steps=5) for name in ("a", "b")]
    fit(L, two[0], module, callbacks=two)  # two callbacks in one trainer
    for name in ("a", "b"):
        zoo = Zoo(tmp_path / name)
        assert zoo.column("step").tolist() == [0, 5, 10, 15, 20]
        assert zoo.column("metrics.step").tolist()[1:] == [3.0] * 4 and zoo.column("metrics.run")[-1] == 4.0


def test_what_is_too_large_for_the_dtype_is_left_out_with_one_warning(tmp_path: Path) -> None:
    module = small_module(L)
    with torch.no_grad():
        module.model[0].weight[0, 0] = 1e6
    harvest = mole.Harvest(tmp_path, metric="train/loss", every_n_steps=5, dtype="float16")
    fit(L, harvest, module)
    assert harvest.skipped == 5 and not list((tmp_path / "shards").glob("*.parquet"))


def test_a_training_that_diverges_is_marked(tmp_path: Path) -> None:
    module = small_module(L, learning_rate=1e30)
    with pytest.warns(UserWarning, match="no finite float32 numbers"):
        fit_loudly(module, mole.Harvest(tmp_path, metric="train/loss", every_n_steps=1))
    zoo = Zoo(tmp_path)
    assert bool(zoo.column("diverged")[-1])
    with pytest.raises(MoleError, match="every run diverged"):
        zoo.finished()


def fit_loudly(module: Any, harvest: Any) -> None:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(**settings, enable_model_summary=False, accelerator="cpu", devices=1, callbacks=[harvest])
    trainer.fit(module, data(), data(16))


def test_odd_hyper_parameters_and_extra_state_do_not_stop_a_training(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    module = small_module(L)
    module.model = Extra()
    module.save_hyperparameters({"seed": 12432728813196513193, "text": "a\udc80"})
    fit(L, mole.Harvest(tmp_path, metric="train/loss", every_n_steps=10), module)
    zoo = Zoo(tmp_path)
    assert zoo.column("seed")[0] == "12432728813196513193" and zoo.column("text")[0] == "a\\udc80"
    assert set(zoo[0].state_dict()) == {"model.layer.weight", "model.layer.bias"}


class Logs(L.Callback):
    """Logs a metric where Lightning lets callbacks do it last, every so many epochs."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch % self.every == self.every - 1:
            pl_module.log("late", float(trainer.current_epoch))


@pytest.mark.parametrize("every", [1, 2])
def test_a_metric_that_a_later_callback_logs_is_waited_for(every: int, tmp_path: Path) -> None:
    harvest = mole.Harvest(tmp_path, "late", every_n_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HarvestWarning)
        trainer = fit(L, harvest, max_epochs=4, callbacks=[harvest, Logs(every)])
    assert trainer.current_epoch == 4 and Zoo(tmp_path).column("late").tolist()[-1] == 3


def test_one_callback_watches_several_trainings_each_in_a_run_of_its_own(tmp_path: Path) -> None:
    harvest = mole.Harvest(tmp_path, "train/loss", every_n_steps=5, run="fold")
    for rate in (0.1, 0.2, 0.3):
        fit(L, harvest, small_module(L, rate), max_epochs=1)
    zoo = Zoo(tmp_path)
    assert sorted(set(zoo.column("run"))) == ["fold", "fold-2", "fold-3"]
    assert zoo.filter(run="fold-3").column("learning_rate").tolist() == [0.3] * 3


def test_a_trainer_that_fits_twice_goes_on_in_the_same_run(tmp_path: Path) -> None:
    harvest, module = mole.Harvest(tmp_path, "train/loss", every_n_steps=5), small_module(L)
    trainer = fit(L, harvest, module, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    zoo = Zoo(tmp_path)
    assert zoo.runs == 1 and zoo.column("step").tolist() == [0, 5, 10, 15, 20]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(small_module(L), data())  # another network
    assert Zoo(tmp_path).runs == 2


def test_pruning_and_a_full_disk_make_the_callback_quiet_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.utils import prune

    class Prune(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                prune.l1_unstructured(pl_module.model[0], "weight", amount=0.5)

    harvest = mole.Harvest(tmp_path / "a", "train/loss", every_n_steps=2)
    with pytest.warns(HarvestWarning, match=r"the training goes on: .*weight_orig is unexpected") as caught:
        trainer = fit(L, harvest, quietly=False, callbacks=[harvest, Prune()])
    assert trainer.global_step == 20 and len([w for w in caught if w.category is HarvestWarning]) == 1
    assert Zoo(tmp_path / "a").column("step").tolist() == [0, 2, 4, 6]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mole.checkpoints.writer.ZooWriter.write", full)
    with pytest.warns(HarvestWarning, match="No space left on device"):
        assert fit(L, mole.Harvest(tmp_path / "b", "train/loss"), quietly=False).global_step == 20


def test_one_state_that_overflows_leaves_the_zoo_readable(tmp_path: Path) -> None:
    class Spike(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            self.kept = pl_module.model[0].weight.detach().clone()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                pl_module.model[0].weight.data[0, 0] = float("inf")
            elif trainer.global_step == 5:
                pl_module.model[0].weight.data.zero_()

    harvest = mole.Harvest(tmp_path, "train/loss", every_n_steps=2)
    fit(L, harvest, max_epochs=1, callbacks=[Spike(), harvest])
    assert harvest.skipped >= 1 and Zoo(tmp_path).runs == 1 and verify(tmp_path) == []


def test_two_trainings_at_once_under_one_name_are_two_runs(tmp_path: Path) -> None:
    with ZooWriter(tmp_path, Header("train/loss", "float32", {"source": "lightning callback"}), "mine"):
        fit(L, mole.Harvest(tmp_path, "train/loss", every_n_steps=5, run="mine"))
    assert set(Zoo(tmp_path).column("run")) == {"mine-2"}
