"""How much memory and time a configuration will take, about, before anything is computed. Imports no torch.

The times are for one core of a current server processor and were fitted to the runs in README.md; they are right within
a factor of about three. Memory is that of the largest moment of a stage, for float32.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from mole.config import Config
from mole.reading.guard import SHARE, available_memory, in_bytes

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": ((64,), 10), "mnist": ((784,), 10), "fashion_mnist": ((784,), 10), "cifar10": ((3, 32, 32), 10),
    "cartpole": ((4,), 1), "iris": ((4,), 3), "wine": ((13,), 3), "breast_cancer": ((30,), 2),
}  # fmt: skip
"""Of every data set: one input, and the classes or actions."""
IMAGES = {"digits": 64 * 1797, "mnist": 784 * 70_000, "fashion_mnist": 784 * 70_000, "cifar10": 3072 * 60_000}
"""Numbers of a data set, where they are many."""

SMALL_NETWORKS = 1e10
"""Floating-point operations of small networks in a second, trained together."""
GENERATOR = 3e10
"""Of the generator."""
STARTING = 10.0
"""Seconds until the first stage begins, and for what every stage does once."""


@dataclass(frozen=True)
class Estimate:
    """What a configuration will take, about."""

    seconds: float
    disk: int
    """Bytes of the run folder."""
    zoo: int
    """Bytes of its zoo among them."""
    memory: dict[str, int]
    """Bytes that a part of the work takes, by the key that decides it most."""

    def __str__(self) -> str:
        peak = max(self.memory.values())
        return f"about {_duration(self.seconds)} on one core, {in_bytes(peak)} of memory, {in_bytes(self.disk)} on disk"


@dataclass(frozen=True)
class Network:
    """The small network of a task, in numbers."""

    parameters: int
    operations: int
    """Of one input, forwards."""
    units: int
    """Outputs of all layers for one input."""
    tokens: int
    """Interchangeable neurons, and one for the rest."""


def network_of(config: Config, width: int | None = None) -> Network:
    """The small network that a configuration's task trains."""
    shape, outputs = SHAPES[config.task.name]
    width = config.task.width if width is None else width
    if len(shape) == 3:
        widths = [shape[0], *(width * 2**layer for layer in range(config.task.depth))]
        area = shape[1] * shape[2] // 4
        weights = [9 * a * b for a, b in pairwise(widths)]
        parameters = sum(weights) + (widths[-1] + 1) * outputs
        return Network(parameters, 2 * area * sum(weights), area * sum(widths[1:]), sum(widths[1:]) + 1)
    widths = [prod(shape), *[width] * config.task.depth, outputs]
    parameters = sum((a + 1) * b for a, b in pairwise(widths))
    return Network(parameters, 2 * parameters, sum(widths[1:]), sum(widths[1:-1]) + 1)


def generator_parameters(config: Config) -> int:
    """Parameters of the generator, about."""
    generator = config.generator
    if generator.parameters is not None:
        return generator.parameters
    network = network_of(config)
    per_token = generator.chunk if generator.view == "chunks" else max(1, network.parameters // network.tokens)
    blocks = (12 + 2 * generator.mlp_ratio) * generator.layers * generator.width**2
    return blocks + 3 * per_token * generator.width


def tokens(config: Config, network: Network) -> int:
    """Tokens of one network as the generator sees it."""
    generator = config.generator
    return {
        "chunks": -(-network.parameters // generator.chunk), "graph": 2 * network.tokens, "flat": 1, "latent": 16,
    }.get(generator.view, network.tokens)  # fmt: skip


def estimate(config: Config) -> Estimate:
    """Memory and time of the whole job, about."""
    task, harvest, train, judge = config.task, config.harvest, config.train, config.evaluate
    widest = network_of(config, max(harvest.vary.width or [task.width]))
    runs, generator = harvest.runs + harvest.heldout_runs, generator_parameters(config)
    seen, inputs = tokens(config, widest), prod(SHAPES[task.name][0])
    step, per_image = 3 * widest.operations * task.batch_size, inputs + 2 * widest.units
    draws = 2 if train.objective == "energy" else 1
    pairs, width = train.batch_size * draws, config.generator.width
    group = min(harvest.group_size, runs)
    kept = group * harvest.checkpoints * widest.parameters
    at_once = max(1, min(group, 3_500_000 // max(1, task.batch_size * inputs)))
    attention = pairs * config.generator.heads * seen**2 * config.generator.layers
    prompts = judge.starts * judge.prompts
    final = min(harvest.runs, 2**14)
    memory = {
        "task.width": 4 * 24 * widest.parameters + 4 * IMAGES.get(task.name, 0),
        "harvest.group_size": 4 * (3 * kept + at_once * (5 * widest.parameters + task.batch_size * per_image)),
        "harvest.runs": 4 * final * widest.parameters * 3,
        ("generator.width" if config.generator.parameters is None else "generator.parameters"): 4 * 6 * generator,
        "train.batch_size": 4 * (pairs * seen * width * config.generator.layers * 16 + 2 * attention)
        + 4 * train.batch_size * (draws + 1) * train.function_images * per_image * bool(train.function_weight),
        "evaluate.prompts": 4 * prompts * widest.parameters * 4,
        "evaluate.starts": 4 * judge.starts * widest.parameters * (judge.optimizer_steps // 10 + 40),
    }  # fmt: skip
    base = 700_000_000  # of PyTorch and Lightning themselves
    rates = len(judge.adam_learning_rates) * 3 + len(judge.sgd_learning_rates)
    function = train.batch_size * (draws + 1) * train.function_images * widest.operations * 3
    work = {
        "harvest": runs * task.steps * step / SMALL_NETWORKS,
        "train": train.steps * (6 * generator * pairs * seen / 2 + 8 * attention * width + function) / GENERATOR,
        "evaluate": judge.starts * judge.optimizer_steps * rates * step / SMALL_NETWORKS
        + 2 * generator * seen * (prompts + 40 * judge.starts) / GENERATOR
        + judge.starts * final * widest.tokens**2 * 40e-9,
    }
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    zoo = 0 if harvest.mode == "stream" else runs * harvest.checkpoints * widest.parameters * sizes[harvest.dtype]
    return Estimate(
        STARTING + sum(work.values()), zoo + 24 * generator, zoo, {key: base + bytes_ for key, bytes_ in memory.items()}
    )


WHEN = {
    "task.width": {"harvest", "train", "evaluate"}, "harvest.group_size": {"harvest"}, "harvest.runs": {"evaluate"},
    "generator.width": {"train"}, "generator.parameters": {"train"}, "train.batch_size": {"train"},
    "evaluate.prompts": {"evaluate"}, "evaluate.starts": {"evaluate"},
}  # fmt: skip
"""In which stages the memory is taken that a key decides."""


def _written(zoo: Path) -> int:
    """Bytes of a zoo that are on the disk already."""
    return sum(path.stat().st_size for path in (zoo / "shards").glob("[!.]*") if path.is_file())


def free_disk(folder: Path) -> int:
    """Bytes that can be written where a folder is or will be."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    return shutil.disk_usage(there).free


def unaffordable(
    config: Config,
    folder: Path,
    stages: Iterable[str] = ("harvest", "train", "sample", "evaluate", "rank"),
    free: Callable[[], int] = available_memory,
    disk: Callable[[Path], int] = free_disk,
) -> list[str]:
    """What of a configuration does not fit into the memory and the disk that are free now, with the key to lower."""
    usable, stages = int(SHARE * free()), set(stages)
    on_gpu = config.runtime.device != "cpu" and any(Path("/dev").glob("nvidia[0-9]*"))  # which says so by itself
    elsewhere = ("generator.width", "generator.parameters", "train.batch_size") if on_gpu else ()
    plan = estimate(config)
    size = "generator.width" if config.generator.parameters is None else "generator.parameters"
    keys = "harvest.runs or harvest.checkpoints" if 2 * plan.zoo > plan.disk else size
    room = disk(folder)
    return [
        f"{folder}: this configuration writes about {in_bytes(plan.disk)}, and {in_bytes(room)} are free there; lower "
        f"{keys}, or choose another --out"
    ] * ("harvest" in stages and plan.disk - _written(folder / "zoo") > room) + [
        f"{key}: this configuration needs about {in_bytes(needed)} of memory here, and {in_bytes(usable)} can be used; "
        f"lower {key}, or run on a larger machine"
        for key, needed in plan.memory.items()
        if needed > usable and key not in elsewhere and stages & WHEN[key]
    ]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
