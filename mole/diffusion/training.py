"""Train a generator on a zoo, with its state on disk so that a killed training continues."""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data import DataLoader

from mole.checkpoints import Zoo
from mole.checkpoints.layouts import own_part
from mole.config import Config, GeneratorConfig
from mole.diffusion.card import FORMAT, Card
from mole.diffusion.codec import Codec
from mole.diffusion.generator import Generator, Request
from mole.diffusion.models import AnyDenoiser, make_denoiser
from mole.diffusion.module import DenoiserTraining
from mole.diffusion.pairs import PairBatches, PairSource
from mole.diffusion.speed import operations, peak
from mole.errors import MoleError
from mole.files import remove, replacing
from mole.reporting import Advance
from mole.representations import EntryScale
from mole.representations.handling import Canonical
from mole.representations.structure import word
from mole.seeding import Seeded, stream
from mole.tasks import Classification

logger = logging.getLogger("mole")

Log = Callable[[int, Mapping[str, float]], None]
"""(step, metrics): told every `train.log_every` steps and at every validation."""


@dataclass(frozen=True)
class Data:
    """What a generator is trained on and validated with."""

    task: Classification
    source: Callable[[dict[str, Any]], PairSource]
    """Training pairs, from where an earlier session of the same training left off; {} is the beginning."""
    heldout: Zoo


def train_generator(
    config: Config,
    data: Data,
    state: Path,
    *,
    identity: str,
    device: torch.device,
    progress: Advance,
    log: Log,
    on_resume: Callable[[int], None] = lambda step: None,
) -> tuple[Generator, float, float]:
    """Train the denoiser of `config`; returns it with its averaged weights, the seconds it took
    in all, and those of earlier sessions among them.

    Args:
        config: the sections `generator` and `train`, and the seed.
        data: task and zoo; the data of the task lie on `device`.
        state: file of the training state. If it exists and has this `identity`, training continues
            from it, bit for bit on a CPU; removing it at the end is left to the caller, who knows
            when the result is safe.
        identity: digest of everything that decides the result.
        device: where to train.
        progress: told the steps done so far.
        log: told the metrics.
        on_resume: told the step that training continues from, 0 for a new one.

    Raises:
        MoleError: the loss became NaN or infinite.
    """
    resumed = _resumable(state, identity)
    on_resume(resumed.step)
    source = data.source(resumed.source)
    codec = make_codec(config, source, resumed.codec).to(device)
    codecs = [codec.of(task.spec) for task in source.tasks]
    with Seeded(config.seed):
        numbers = data.task.train.images[0].numel()
        denoiser = make_denoiser([c.view for c in codecs], config.generator, numbers=numbers)
    module = DenoiserTraining(denoiser, codecs, source.tasks, config.train, seed=config.seed)

    def card() -> Card:
        """What is known of the generator now; the losses and the digest of a stream grow."""
        return Card(
            format=FORMAT, denoiser=config.generator, task=source.tasks[0].config,
            architectures=[task.architecture for task in source.tasks], scales=codec.stds, ranges=source.ranges,
            examples=numbers, zoo=source.digest, train_steps=config.train.steps, seed=config.seed,
        )  # fmt: skip

    if config.runtime.compile:
        for block in module.denoiser.blocks:
            block.compile()
    progress(resumed.step)
    batches = PairBatches(source, codecs, config.train, seed=config.seed, first_step=resumed.step)
    kept = _State(state, identity, resumed.seconds, codec, source)
    watch = _Watch(config, data, card, kept, device, progress, log)
    _quiet()
    try:
        resume = str(state) if resumed.step else None
        loader = DataLoader(batches, batch_size=None)
        _trainer(config, device, watch).fit(module, loader, ckpt_path=resume, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise MoleError(
            f"train.batch_size {config.train.batch_size} does not fit into the memory of {device} "
            f"({str(error).splitlines()[0]}); {_fits(module, source, config, device)}"
        ) from None
    except SystemExit:  # Lightning turns Ctrl-C into an exit
        raise KeyboardInterrupt from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # left to the interpreter's exit, its threads abort now and then
    return Generator(_averaged(module, device), codec, card(), device, source.tasks[0]), watch.seconds, resumed.seconds


def _fits(module: DenoiserTraining, source: PairSource, config: Config, device: torch.device) -> str:
    """The largest half, quarter, ... of the batch that fits, in words."""
    size = config.train.batch_size // 2
    while size:
        smaller = config.train.model_copy(update={"batch_size": size})
        module.zero_grad(set_to_none=True)
        try:
            parts = PairBatches(source, module.codecs, smaller, seed=config.seed).batch(0)
            module.training_step(move_data_to_device(parts, device), 0)["loss"].backward()
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return f"{size} would; the training continues from where it was"
    return "not even 1 would: lower generator.width"


def make_codec(config: Config, source: PairSource, known: dict[str, Any] | None = None) -> Codec:
    """The codec of a training: fitted to its source, or as an earlier session had it.

    From here on the source gives runs in canonical form, if that is asked for.
    """
    tensors = known["tensors"] if known else {}
    reference, spec = tensors.get("reference"), source.tasks[0].spec
    if config.generator.symmetry == "canonical":
        if len(source.tasks) > 1:
            raise MoleError("generator.symmetry canonical serves one layout only; legal for several: equivariant")
        reference = source.best() if reference is None else reference
        source.canonicalise(Canonical(spec, reference))
    codec = Codec(spec, config.generator, known["stds"] if known else fit_scales(source, config.generator), reference)
    if known:
        codec.load_state_dict(tensors)
        return codec

    def draw(generator: torch.Generator) -> torch.Tensor:
        ((_, pairs),) = source.pairs(config.train, generator)
        return torch.cat([pairs.start, pairs.clean])

    codec.fit(draw, config.seed)
    return codec


def fit_scales(source: PairSource, config: GeneratorConfig) -> dict[str, float]:
    """Standard deviation of every tensor over the networks, pooled over all that have the same word."""
    found: dict[str, list[tuple[float, int]]] = {}
    for layout, task in enumerate(source.tasks):
        stds = EntryScale.fit(task.spec, source.chunks(layout)).stds(task.spec)
        for entry, std in zip(task.spec.entries, stds, strict=True):
            found.setdefault(word(entry), []).append((std, entry.size))
    if config.scale == "global":
        parts = [part for group in found.values() for part in group]
        found = dict.fromkeys(found, parts)
    return {name: math.sqrt(sum(std**2 * size for std, size in parts) / sum(size for _, size in parts))
            for name, parts in found.items()}  # fmt: skip


def _trainer(config: Config, device: torch.device, watch: L.Callback) -> L.Trainer:
    """Lightning without its own files, bars and summaries: `watch` does what is wanted of them."""
    world, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if config.train.batch_size % world:
        raise MoleError(f"train.batch_size {config.train.batch_size} does not divide among {world} processes")
    return L.Trainer(
        max_steps=config.train.steps,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=here,
        num_nodes=world // here,
        strategy="ddp_find_unused_parameters_true" if world > 1 else "auto",  # not every batch has every layout
        use_distributed_sampler=False,
        precision="bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true",
        gradient_clip_val=config.train.gradient_clip,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _averaged(module: DenoiserTraining, device: torch.device) -> AnyDenoiser:
    denoiser = module.average.module
    assert isinstance(denoiser, AnyDenoiser)
    return denoiser.to(device).eval()


@dataclass(frozen=True)
class _State:
    """Where the training state lies, whose it is, and the seconds spent before this session."""

    path: Path
    identity: str
    seconds_before: float
    codec: Codec
    source: PairSource


@dataclass(frozen=True)
class _Resumed:
    """Where an earlier session left off."""

    step: int = 0
    seconds: float = 0.0
    codec: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)


def _resumable(state: Path, identity: str) -> _Resumed:
    """What a training state of this identity says; any other state is removed."""
    if state.exists():
        try:
            found = torch.load(state, map_location="cpu", weights_only=True)
            if found["identity"] == identity:
                step, seconds = int(found["global_step"]), float(found["seconds"])
                return _Resumed(step, seconds, dict(found["codec"]), dict(found["source"]))
        except Exception:  # truncated, foreign or hostile: whatever is wrong, it is not ours
            logger.warning("%s: not a training state; training from the beginning", state)
        remove(state)
    return _Resumed()


def _quiet() -> None:
    """Lightning announces devices and worker counts; neither is news here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*IterableDataset.*__len__.*")
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint.*")
    warnings.filterwarnings("ignore", message=".*batching rule.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")


class _Watch(L.Callback):
    """Reports, validates and saves the state of a training."""

    def __init__(
        self,
        config: Config,
        data: Data,
        card: Callable[[], Card],
        state: _State,
        device: torch.device,
        progress: Advance,
        log: Log,
    ) -> None:
        self.config, self.data, self.card, self.state = config, data, card, state
        self.device, self.progress, self.report = device, progress, log
        self.started, self.started_step = time.monotonic(), 0
        self.operations = 0
        self.waited, self.ready = 0.0, 0.0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self.state
        checkpoint |= {
            "identity": state.identity,
            "seconds": self.seconds,
            "codec": {"stds": state.codec.stds, "tensors": state.codec.state_dict()},
        }
        checkpoint["source"] = state.source.state()

    @property
    def seconds(self) -> float:
        """Spent on the training, earlier sessions included."""
        return self.state.seconds_before + time.monotonic() - self.started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started, self.started_step = time.monotonic(), trainer.global_step
        self.waited, self.ready = 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.ready:
            self.waited += time.monotonic() - self.ready
        if not self.operations:
            assert isinstance(pl_module, DenoiserTraining)
            networks = [pl_module.networks(part, part.noised, part.level) for part in batch]
            self.operations = operations(pl_module.denoiser, networks)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DenoiserTraining)
        step, train = trainer.global_step, self.config.train
        self.progress(step, self.state.source.note())
        if step % train.log_every == 0 or step == train.steps:
            self._log_training(step, outputs, trainer)
        if (step % train.validate_every == 0 or step == train.steps) and trainer.is_global_zero:
            self._validate(step, pl_module)
        if step % train.checkpoint_every == 0 and step < train.steps:
            self._save(trainer)
        self.ready = time.monotonic()

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            with replacing(self.state.path) as temporary:
                trainer.save_checkpoint(temporary)
        else:  # which only takes part in what processes do together
            trainer.save_checkpoint(self.state.path)

    def _log_training(self, step: int, outputs: Any, trainer: L.Trainer) -> None:
        values = {name: float(outputs[name]) for name in ("loss", "weight_error", "divergence")}
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

    def _validate(self, step: int, module: DenoiserTraining) -> None:
        """One pass from the first states of held-out runs, judged on prompt images."""
        card, task = self.card(), self.state.source.tasks[0]
        generator = Generator(_averaged(module, self.device), self.state.codec, card, self.device, task)
        heldout = own_part(self.data.heldout, task)
        seeds = heldout.column("seed")[heldout.first.numpy()].tolist()
        starts = heldout.read(heldout.first)
        support = None
        if card.denoiser.data:
            support = task.support(seeds, self.config.train.support_images, stream("support"))
        request = Request(starts, {"target_loss": card.ranges["loss"][0]}, support=support)
        drawn = generator.draw(request).flat
        found = task.measure(drawn.to(self.device), "prompt", seeds)
        self.report(
            step,
            {
                "val/one_pass_loss": float(found["loss"].mean()),
                "val/one_pass_accuracy": float(found["accuracy"].mean()),
            },
        )
