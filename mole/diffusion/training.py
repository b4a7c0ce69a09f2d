"""Train a generator on a zoo, with its state on disk so that a killed training continues."""

import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from mole.config import Config, GeneratorConfig
from mole.diffusion.card import FORMAT, Card
from mole.diffusion.codec import Codec
from mole.diffusion.generator import Generator
from mole.diffusion.models import make_denoiser
from mole.diffusion.module import DenoiserTraining
from mole.diffusion.pairs import PairBatches, PairSource
from mole.diffusion.state_file import StateFile
from mole.diffusion.watch import Data, Kept, Log, Watch, resumable
from mole.errors import MoleError
from mole.reporting import Advance
from mole.representations import EntryScale, WeightSpec, differences
from mole.representations.handling import Canonical
from mole.representations.structure import word
from mole.revision import revision
from mole.seeding import Seeded
from mole.tasks import Architecture
from mole.tasks.networks import KINDS

logger = logging.getLogger("mole")


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
        MoleError: the networks are not the task's, the generator could not be loaded again, or the loss became NaN or
            infinite.
    """
    resumed = resumable(state, identity)
    if resumed.step and resumed.code != revision().source:
        logger.warning("the training was begun by other code, and goes on with %s", revision())
    on_resume(resumed.step)
    source = data.source(resumed.source)
    check_trainable(source)
    codec = make_codec(config, source, resumed.codec).to(device)
    codecs = [codec.of(task.spec) for task in source.tasks]
    with Seeded(config.seed):
        numbers = data.task.numbers
        denoiser = make_denoiser([c.view for c in codecs], config.generator, numbers=numbers)
    module = DenoiserTraining(
        denoiser, codecs, source.tasks, config.train, seed=config.seed, sharded=config.runtime.strategy == "fsdp"
    )

    def card() -> Card:
        """What is known of the generator now; the losses and the digest of a stream grow."""
        return Card(
            format=FORMAT, denoiser=config.generator, task=source.tasks[0].config,
            architectures=[task.architecture for task in source.tasks], scales=codec.stds, ranges=source.ranges,
            examples=numbers, zoo=source.digest, train_steps=config.train.steps, seed=config.seed,
        )  # fmt: skip

    if "loss" not in source.ranges:
        raise MoleError(
            f"the zoo has no column loss (its metrics: {', '.join(source.ranges) or 'none'}), which generators are "
            "conditioned on; harvest or import with the metric loss"
        )
    card()  # what is wrong with it is said now, and not after the training
    if config.runtime.compile:
        for block in module.denoiser.blocks:
            block.compile()
    progress(resumed.step)
    batches = PairBatches(source, codecs, config.train, seed=config.seed, first_step=resumed.step)
    kept = Kept(state, identity, resumed.seconds, codec, source)
    watch = Watch(config, data, card, kept, device, progress, log)
    _quiet()
    try:
        resume = str(state) if resumed.step else None
        loader = DataLoader(batches, batch_size=None)
        trainer = _trainer(config, device, watch, state.parent, layouts=len(codecs))
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise MoleError(
            f"train.batch_size {config.train.batch_size} does not fit into the memory of {device} "
            f"({str(error).splitlines()[0]}); {_fits(module, source, config, device)}"
        ) from None
    except SystemExit:  # Lightning turns Ctrl-C into an exit
        raise KeyboardInterrupt from None
    denoiser = module.averaged().to(device).eval()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # left to the interpreter's exit, its threads abort now and then
    if not all(bool(tensor.isfinite().all()) for tensor in denoiser.state_dict().values()):
        raise MoleError(
            "training diverged: the generator has NaN or infinite weights; lower train.learning_rate "
            f"(now {config.train.learning_rate:g})"
        )
    return Generator(denoiser, codec, card(), device, source.tasks[0]), watch.seconds, resumed.seconds


def check_trainable(source: PairSource) -> None:
    """Refuse networks that a generator could not be loaded for again, before it is trained.

    Raises:
        MoleError: naming what does not fit.
    """
    for layout, task in enumerate(source.tasks):
        architecture = task.architecture
        if type(architecture) is not Architecture:
            raise MoleError(
                f"{task.config.name}: its networks are {type(architecture).__name__}, which a generator's card cannot "
                f"name; legal is an Architecture, of kind {', '.join(KINDS)}"
            )
        if difference := differences(WeightSpec.of(architecture.build(seed=0)), task.spec):
            raise MoleError(f"{task.config.name}: its networks are not what their architecture builds ({difference})")
        first = next(iter(source.chunks(layout)), None)
        zoo_spec = source.spec(layout)
        difference = differences(task.spec, zoo_spec) if zoo_spec is not None else None
        if difference or (first is not None and first.shape[1] != task.spec.size):
            raise MoleError(
                f"the zoo's networks are not those of task {task.config.name} ({difference or 'another size'}); choose "
                "the task and the width that the zoo was made with"
            )


def _fits(module: DenoiserTraining, source: PairSource, config: Config, device: torch.device) -> str:
    """The largest half, quarter, ... of the batch that fits, in words."""
    size = config.train.batch_size // 2
    most = {"one_pass_fraction": 1.0} if config.train.objective == "energy" else {}  # every pair drawn twice
    while size:
        smaller = config.train.model_copy(update={"batch_size": size, **most})
        module.zero_grad(set_to_none=True)
        try:
            parts = PairBatches(source, module.codecs, smaller, seed=config.seed).batch(0)
            module.training_step(move_data_to_device(parts, device), 0)["loss"].backward()
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return f"{size} would: set train.batch_size {size}"
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


def _trainer(config: Config, device: torch.device, watch: L.Callback, folder: Path, layouts: int) -> L.Trainer:
    """Lightning without its own files, bars and summaries: `watch` does what is wanted of them.

    Whatever the environment says of SLURM or others, `torchrun` alone decides whether there are several processes, and
    nothing but the training state in `folder` is read or written.
    """
    world, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if config.train.batch_size % world:
        raise MoleError(f"train.batch_size {config.train.batch_size} does not divide among {world} processes")
    return L.Trainer(
        max_steps=config.train.steps,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=here,
        num_nodes=world // here,
        strategy=_strategy(config, world, layouts),
        use_distributed_sampler=False,
        precision="bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true",
        callbacks=[watch],
        plugins=[TorchElasticEnvironment() if world > 1 else LightningEnvironment(), StateFile()],
        default_root_dir=folder / ".lightning",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(config: Config, world: int, layouts: int) -> Any:
    if config.runtime.strategy == "fsdp":
        if layouts > 1:
            raise MoleError(
                f"runtime.strategy fsdp: the zoo has {layouts} layouts of networks, of which each process meets others "
                "in a step; legal is ddp"
            )
        return ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    if world == 1:
        return "auto"
    return "ddp_find_unused_parameters_true" if layouts > 1 else "ddp"  # not every batch has every layout


def _quiet() -> None:
    """Lightning announces devices and worker counts; neither is news here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*IterableDataset.*__len__.*")
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint.*")
    warnings.filterwarnings("ignore", message=".*batching rule.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
