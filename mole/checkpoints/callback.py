"""A Lightning callback that keeps the history of a training you already have.

Dimensions: n checkpoints, P parameters.
"""

import re
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from mole.checkpoints.buffer import Buffer
from mole.checkpoints.format import Dtype, Header, column_names
from mole.checkpoints.writer import ZooWriter
from mole.errors import MoleError, SymmetryWarning
from mole.representations import WeightSpec

FLUSH_SECONDS = 60.0
"""A kill loses at most the checkpoints of this time."""


class Harvest(L.Callback):
    """Keeps a state of the network every few steps, with the metrics that were last logged, in a zoo.

    It works in `lightning` and `pytorch_lightning`; with several devices the first process writes. A training that is
    resumed from a checkpoint goes on in the same run; steps that it has kept before stay as
    they were. Several trainings may write to one zoo at once.

    Args:
        path: folder of the zoo, which is created if there is none.
        metric: name of a logged metric, smaller is better, that generators shall be conditioned on.
        every_n_steps: optimiser steps between two kept states; states at validations are kept as well.
        submodule: dotted name of the network within the LightningModule; by default all of it.
        dtype: of the weights on disk.
        run: name of this run in the zoo; by default a new one.

    The columns of the index are the logged metrics, the numbers and texts among the module's hyper-parameters, and
    `metric_step`: the step at which `metric` had last changed when the state was kept. A metric that is logged at
    validations only is older than the state in the rows between them.

    Raises:
        MoleError: at the end of the first epoch, if nothing of the name `metric` has been logged.

    Example:
        >>> L.Trainer(callbacks=[mole.Harvest("zoo/mine", metric="val/loss", every_n_steps=50)]).fit(module, data)
    """

    def __init__(
        self,
        path: str | Path,
        metric: str,
        *,
        every_n_steps: int = 50,
        submodule: str = "",
        dtype: Dtype = "float32",
        run: str | None = None,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise MoleError(f"every_n_steps is {every_n_steps!r}; legal is a whole number of at least 1")
        if run is not None and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", run):
            raise MoleError(f"run {run!r}: legal are up to 100 letters, digits, dots, hyphens and underscores")
        self.path, self.header = Path(path), Header(metric, dtype, {"source": "lightning callback"})
        self.every_n_steps, self.submodule = every_n_steps, submodule
        self.run = run or uuid.uuid4().hex[:12]
        self.skipped = 0
        """States left out because they were not finite."""
        self._resumed = False
        self._buffer: Buffer | None = None
        self._logged = self._validated = False
        self._value: float | None = None
        self._metric_step: int | None = None

    # What Lightning calls

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one trainer apart."""
        return f"{type(self).__qualname__}({self.path}, {self.submodule!r})"

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run, self._resumed = str(state_dict["run"]), True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = self._network(pl_module)
        if trainer.is_global_zero:
            self._factors = _plain(dict(getattr(pl_module, "hparams", {})))
            self._buffer = self._open(network, pl_module)
            self._keep(trainer, network)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._buffer is not None and trainer.global_step % self.every_n_steps == 0:
            self._keep(trainer, self._network(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validated = True
        if self._buffer is not None:
            self._keep(trainer, self._network(pl_module), validated=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_metric(trainer, sure=self._validated or not trainer.enable_validation)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._buffer is not None:
            self._keep(trainer, self._network(pl_module))
        self._close()
        self._check_metric(trainer, sure=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    # What it does

    def _network(self, module: nn.Module) -> nn.Module:
        try:
            return module.get_submodule(self.submodule)
        except AttributeError:
            names = [name for name, _ in module.named_children()]
            raise MoleError(f"submodule {self.submodule!r}: not there; {type(module).__name__} has {names}") from None

    def _open(self, network: nn.Module, pl_module: L.LightningModule) -> Buffer:
        spec = self._spec(network, pl_module)
        buffer = Buffer(ZooWriter(self.path, self.header, self.run), spec)
        last = buffer.last_step(self.run)
        if last is not None and not self._resumed:
            buffer.close()
            raise MoleError(
                f"{self.path}: run {self.run!r} is there already; give another name, or resume it with ckpt_path"
            )
        self._last = -1 if last is None else last
        return buffer

    def _spec(self, network: nn.Module, pl_module: L.LightningModule) -> WeightSpec:
        """The network's specification; its symmetry, as far as it can be derived from example inputs."""
        given = getattr(pl_module, "example_input_array", None) if network is pl_module else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SymmetryWarning)
            return WeightSpec.of(network, given)

    def _keep(self, trainer: L.Trainer, network: nn.Module, *, validated: bool = False) -> None:
        assert self._buffer is not None
        step = trainer.global_step
        metrics = self._metrics(trainer, step)
        if step <= self._last:
            if validated and self._buffer.columns.get("step", [None])[-1:] == [step]:
                self._buffer.update_last(metrics)
            return
        self._last = step
        state, spec = network.state_dict(), self._buffer.spec
        flat, table = spec.flatten(state), spec.flatten_table(state)
        if not self._buffer.add({**self._factors, **metrics, "run": self.run, "step": step}, flat, table):
            if not self.skipped:
                warnings.warn(
                    f"step {step}: weights that are no finite {self.header.dtype} numbers are left out of {self.path}",
                    stacklevel=2,
                )
            self.skipped += 1
            self._buffer.set_all("diverged", True)
            return
        if self._buffer.is_full or time.monotonic() - self._buffer.since > FLUSH_SECONDS:
            self._buffer.flush()

    def _metrics(self, trainer: L.Trainer, step: int) -> dict[str, float | int | None]:
        logged = trainer.callback_metrics.items()
        found = column_names({name: float(value) for name, value in logged if value.numel() == 1}, "metrics")
        value = found.get(self.header.metric)
        if value is not None and value != self._value:
            self._value, self._metric_step = value, step
        self._logged = self._logged or value is not None
        return {self.header.metric: None, **found, "metric_step": self._metric_step}

    def _check_metric(self, trainer: L.Trainer, *, sure: bool) -> None:
        self._logged = self._logged or self.header.metric in trainer.callback_metrics
        if not sure:
            return
        self._logged = bool(trainer.strategy.broadcast(self._logged))  # it may be logged by the first process alone
        if not self._logged:
            self._close()
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise MoleError(f"metric {self.header.metric!r} was never logged; logged were: {logged}")

    def _close(self) -> None:
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that a column can hold, under names that no other column has."""
    kept = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
    return column_names(kept, "hparams")
