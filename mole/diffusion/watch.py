"""What is done beside the steps of a training: reports, validation on held-out runs, and the state on disk."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mole.checkpoints import Zoo
from mole.checkpoints.layouts import own_part
from mole.config import Config
from mole.diffusion.card import Card
from mole.diffusion.codec import Codec
from mole.diffusion.generator import Generator
from mole.diffusion.models import AnyDenoiser
from mole.diffusion.module import DenoiserTraining
from mole.diffusion.pairs import PairSource
from mole.diffusion.request import Request
from mole.diffusion.speed import operations, peak
from mole.diffusion.state_file import read_state
from mole.errors import CorruptFileError, MoleError
from mole.reporting import Advance
from mole.revision import revision
from mole.seeding import stream
from mole.signals import handling, stop
from mole.tasks import Task, labelled

logger = logging.getLogger("mole")

AGREE_EVERY = 10
"""Steps between two questions whether a signal has reached another process."""

Log = Callable[[int, Mapping[str, float]], None]
"""(step, metrics): told every `train.log_every` steps and at every validation."""


@dataclass(frozen=True)
class Data:
    """What a generator is trained on and validated with."""

    task: Task
    source: Callable[[dict[str, Any]], PairSource]
    """Training pairs, from where an earlier session of the same training left off; {} is the beginning."""
    heldout: Zoo


@dataclass(frozen=True)
class Kept:
    """Where the training state lies, whose it is, and the seconds spent before this session."""

    path: Path
    identity: str
    seconds_before: float
    codec: Codec
    source: PairSource


@dataclass(frozen=True)
class Resumed:
    """Where an earlier session left off."""

    step: int = 0
    seconds: float = 0.0
    codec: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    """Digest of the source of the code that began."""


def resumable(state: Path, identity: str) -> Resumed:
    """What a training state of this identity says; any other state is set aside, as `training.aside.ckpt`."""
    if state.exists():
        try:
            found = read_state(state)
        except CorruptFileError as error:
            logger.warning("%s; training from the beginning", error)
        else:
            if found.get("identity") == identity:
                step, seconds = int(found["global_step"]), float(found["seconds"])
                return Resumed(step, seconds, dict(found["codec"]), dict(found["source"]), str(found.get("code", "")))
        state.replace(state.with_suffix(f".aside{state.suffix}"))
    return Resumed()


class Watch(L.Callback):
    """Reports, validates and saves the state of a training."""

    def __init__(
        self,
        config: Config,
        data: Data,
        card: Callable[[], Card],
        state: Kept,
        device: torch.device,
        progress: Advance,
        log: Log,
    ) -> None:
        self.config, self.data, self.card, self.state = config, data, card, state
        self.device, self.progress, self.report = device, progress, log
        self.started, self.started_step = time.monotonic(), 0
        self.operations = 0
        self.waited, self.ready = 0.0, 0.0
        self.told_to_save = self.told_to_stop = False
        self.signals = ExitStack()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self.state
        checkpoint |= {
            "identity": state.identity,
            "code": revision().source,
            "seconds": self.seconds,
            "codec": {"stds": state.codec.stds, "tensors": state.codec.state_dict()},
            "source": state.source.state(),
        }

    @property
    def seconds(self) -> float:
        """Spent on the training, earlier sessions included."""
        return self.state.seconds_before + time.monotonic() - self.started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.enter_context(handling(self._tell_to_stop, self._tell_to_save))  # after Lightning's own
        self.started, self.started_step = time.monotonic(), trainer.global_step
        self.waited, self.ready = 0.0, 0.0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.signals.close()

    def _tell_to_stop(self) -> None:
        self.told_to_stop = True

    def _tell_to_save(self) -> None:
        self.told_to_save = True

    def _obey(self, trainer: L.Trainer, step: int) -> None:
        """Save, and stop, where a signal asked for it; several processes agree about that every few steps."""
        to_stop, to_save = self.told_to_stop, self.told_to_save
        if trainer.world_size > 1:
            if step % AGREE_EVERY:
                return
            to_stop, to_save = (
                trainer.strategy.reduce_boolean_decision(told, all=False) for told in (to_stop, to_save)
            )
        if to_stop or to_save:
            self._save(trainer)
            self.told_to_save = False
            if trainer.is_global_zero:
                logger.warning("train: saved at step %s, as a signal asked", f"{step:,}")
        if to_stop:
            stop()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.ready:
            self.waited += time.monotonic() - self.ready
        if not self.operations:
            assert isinstance(pl_module, DenoiserTraining)
            noised = [(part, flat) for part in batch for flat in (part.noised, part.again) if flat is not None]
            networks = [pl_module.networks(part, flat, part.level) for part, flat in noised]
            self.operations = operations(pl_module.denoiser, networks)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DenoiserTraining)
        step, train = trainer.global_step, self.config.train
        self.progress(step, self.state.source.note())
        if step % train.log_every == 0 or step == train.steps:
            self._log_training(step, outputs, trainer)
        if step % train.validate_every == 0 or step == train.steps:
            denoiser = pl_module.averaged().to(self.device).eval()
            if trainer.is_global_zero:
                self._validate(step, denoiser)
        if step % train.checkpoint_every == 0 and step < train.steps:
            self._save(trainer)
        self._obey(trainer, step)
        self.ready = time.monotonic()

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.state.path)  # every process takes part, the first one writes: `StateFile`

    def _log_training(self, step: int, outputs: Any, trainer: L.Trainer) -> None:
        values = {name: float(outputs[name]) for name in ("loss", "weight_error", "divergence", "loss_gap")}
        if not math.isfinite(values["loss"]):
            raise MoleError(
                f"training diverged: the loss is {values['loss']} at step {step}; lower train.learning_rate "
                f"(now {self.config.train.learning_rate})"
            )
        rate = (step - self.started_step) / max(1e-9, time.monotonic() - self.started)
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        wait = self.waited / max(1e-9, time.monotonic() - self.started)
        values |= {"learning_rate": learning_rate, "steps_per_second": rate, "data_wait": wait}
        values["tflops"] = rate * self.operations / 1e12
        if (most := peak(self.device)) is not None:
            values["mfu"] = rate * self.operations / most
        self.report(step, {f"train/{name}": value for name, value in values.items()})

    def _validate(self, step: int, denoiser: AnyDenoiser) -> None:
        """One pass from the first states of held-out runs, judged on prompt images."""
        card, task = self.card(), self.state.source.tasks[0]
        generator = Generator(denoiser, self.state.codec, card, self.device, task)
        heldout = own_part(self.data.heldout, task)
        seeds = heldout.column("seed")[heldout.first.numpy()].tolist()
        starts = heldout.read(heldout.first)
        support = None
        if card.denoiser.data:
            support = labelled(task).support(seeds, self.config.train.support_images, stream("support"))
        request = Request(starts, {"target_loss": card.ranges["loss"][0]}, support=support)
        drawn = generator.draw(request).flat
        found = task.measure(drawn.to(self.device), "prompt", seeds)
        self.report(
            step,
            {
                "val/one_pass_loss": float(found["loss"].mean()),
                f"val/one_pass_{task.score}": float(found[task.score].mean()),
            },
        )
