"""A Lightning callback that keeps the history of a training you already have, and never ends it.

Dimensions: n checkpoints, P parameters.
"""

import difflib
import re
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from mole.checkpoints.buffer import Buffer
from mole.checkpoints.format import Dtype, Header, column_names
from mole.checkpoints.writer import ZooWriter
from mole.errors import HarvestWarning, MoleError, SymmetryWarning
from mole.files import LockedError
from mole.representations import WeightSpec

FLUSH_SECONDS = 60.0
"""A kill loses at most the checkpoints of this time."""
PATIENCE = 2
"""Whole epochs without the metric before a warning says so."""


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook whose errors are a warning: the training is somebody else's, and goes on without this callback."""

    @wraps(hook)
    def guarded(self: "Harvest", *arguments: Any, **named: Any) -> None:
        if self.quiet:
            return
        try:
            hook(self, *arguments, **named)
        except Exception as error:
            self._go_quiet(error)

    return guarded


class Harvest(L.Callback):
    """Keeps a state of the network every few steps, with the metrics that were last logged, in a zoo.

    It works in `lightning` and `pytorch_lightning`; with several devices the first process writes. A training that is
    resumed from a checkpoint goes on in the same run; steps that it has kept before stay as
    they were. Another training with the same callback, as in cross-validation, is a run of its own. Several trainings
    may write to one zoo at once.

    It never ends a training: whatever goes wrong with what it keeps is one `HarvestWarning`, after which it is quiet.

    Args:
        path: folder of the zoo, which is created if there is none.
        metric: name of a logged metric, smaller is better, that generators shall be conditioned on.
        every_n_steps: optimiser steps between two kept states; states at validations are kept as well.
        submodule: dotted name of the network within the LightningModule; by default all of it.
        dtype: of the weights on disk.
        run: name of this run in the zoo; by default a new one. Where a zoo has a run of this name, a number is added.

    The columns of the index are the logged metrics, the numbers and texts among the module's hyper-parameters, and
    `metric_step`: the step at which `metric` had last changed when the state was kept. A metric that is logged at
    validations only is older than the state in the rows between them.

    Raises:
        MoleError: an argument is not legal. Nothing is raised while a training runs.

    Warns:
        HarvestWarning: `metric` was not logged in two epochs or at all, states are not finite, or nothing can be kept.

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
        if run is not None and not re.fullmatch(NAME, run):
            raise MoleError(f"run {run!r}: legal are up to 100 letters, digits, dots, hyphens and underscores")
        self.path, self.header = Path(path), Header(metric, dtype, {"source": "lightning callback"})
        self.every_n_steps, self.submodule = every_n_steps, submodule
        self.name, self.run = run, run or _new_name()
        self.skipped = 0
        """States left out because they were not finite."""
        self.quiet = False
        """Whether something went wrong, so that nothing more is kept."""
        self._resumed = self._logged = self._warned = False
        self._buffer: Buffer | None = None
        self._trained: Callable[[], nn.Module | None] = lambda: None
        self._last, self._epochs = -1, 0
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
        if isinstance(run := state_dict.get("run"), str) and re.fullmatch(NAME, run):
            self.run, self._resumed = run, True

    @_harmless
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = self._network(pl_module)
        if trainer.is_global_zero:
            self._factors = _plain(dict(getattr(pl_module, "hparams", {})))
            self._buffer = self._open(network, pl_module, trainer.global_step)
            self._keep(trainer, network)

    @_harmless
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._buffer is not None and trainer.global_step % self.every_n_steps == 0:
            self._keep(trainer, self._network(pl_module))

    @_harmless
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._buffer is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._keep(trainer, self._network(pl_module), validated=True)

    @_harmless
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._buffer is not None:
            self._epochs += 1
            self._look_for_metric(trainer, sure=self._epochs > PATIENCE)

    @_harmless
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._buffer is not None:
            self._keep(trainer, self._network(pl_module), validated=True)
            self._look_for_metric(trainer, sure=True)
        self._close()

    @_harmless
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    @_harmless
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    # What it does

    def _go_quiet(self, error: Exception) -> None:
        """Keep nothing more, and say why once."""
        self.quiet = True
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            try:
                buffer.close()
            except Exception:  # most likely for the same reason
                buffer.writer.close()
        reason = str(error) if isinstance(error, MoleError) else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"mole.Harvest keeps nothing more in {self.path}, and the training goes on: {reason}",
            HarvestWarning,
            stacklevel=3,
        )

    def _network(self, module: nn.Module) -> nn.Module:
        try:
            return module.get_submodule(self.submodule)
        except AttributeError:
            names = [name for name, _ in module.named_children()]
            raise MoleError(f"submodule {self.submodule!r}: not there; {type(module).__name__} has {names}") from None

    def _open(self, network: nn.Module, pl_module: L.LightningModule, step: int) -> Buffer:
        """The place of this training's run: where a resumed or continued one left off, or a new one."""
        continued = self._resumed or (self._trained() is pl_module and step >= self._last > -1)
        self._trained = weakref.ref(pl_module)
        spec = self._spec(network, pl_module)
        if not continued and self._last > -1:  # this callback has watched another training before
            self.run = self.name or _new_name()
        self._resumed, self._epochs, self._logged, self._warned = False, 0, False, False
        self._value = self._metric_step = None
        name, number = self.run, 1
        while True:
            try:
                buffer = Buffer(ZooWriter(self.path, self.header, self.run), spec)
            except LockedError:  # of another training that runs now
                if continued:
                    raise
            else:
                last = buffer.last_step(self.run)
                if last is None or continued:
                    break
                buffer.writer.close()
            number += 1
            self.run = f"{name}-{number}"
        if number > 1:
            warnings.warn(f"{self.path}: run {name!r} is there already; this one is {self.run!r}", HarvestWarning,
                          stacklevel=4)  # fmt: skip
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
                    HarvestWarning,
                    stacklevel=3,
                )
            self.skipped += 1
            self._buffer.set_all("diverged", True)
            return
        if self._buffer.is_full or time.monotonic() - self._buffer.since > FLUSH_SECONDS:
            self._buffer.flush()

    def _metrics(self, trainer: L.Trainer, step: int) -> dict[str, float | int | None]:
        logged = trainer.callback_metrics.items()
        columns = column_names({name: float(value) for name, value in logged if value.numel() == 1}, "metrics")
        value = columns.get(self.header.metric)
        if value is not None and value != self._value:
            self._value, self._metric_step = value, step
        return {self.header.metric: None, **columns, "metric_step": self._metric_step}

    def _look_for_metric(self, trainer: L.Trainer, *, sure: bool) -> None:
        """Say once that the metric has not been logged, if that is `sure`."""
        metric, logged = self.header.metric, sorted(trainer.callback_metrics)
        self._logged = self._logged or metric in logged
        if self._logged or self._warned or not sure:
            return
        self._warned = True
        near = difflib.get_close_matches(metric, logged, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        warnings.warn(
            f"{self.path}: metric {metric!r} has not been logged; logged were: {', '.join(logged) or 'nothing'}{hint} "
            "The states are kept without it",
            HarvestWarning,
            stacklevel=4,
        )

    def _close(self) -> None:
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            buffer.close()


NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}"


def _new_name() -> str:
    return uuid.uuid4().hex[:12]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that a column can hold, under names that no other column has."""
    kept = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
    return column_names(kept, "hparams")
