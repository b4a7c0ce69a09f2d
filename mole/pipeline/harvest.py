"""Stage 1: train a population and keep its histories."""

import time
from collections.abc import Callable

from mole.checkpoints import Zoo, ZooWriter, kept_steps, train_population
from mole.diffusion.generator import versions
from mole.pipeline.current import Result, Run
from mole.tasks import Metrics

SEEDS_PER_CONFIG = 2**20
"""Run r of a harvest has the seed `config.seed * SEEDS_PER_CONFIG + r`."""


def harvest(current: Run) -> Result:
    """Train a population in groups; each group is a shard that counts once it is whole."""
    config, task = current.config, current.task
    settings, recipe = config.harvest, {"seed": config.seed, "task": config.task.model_dump(mode="json")}
    steps = kept_steps(config.task.steps, settings.checkpoints)
    writer = ZooWriter(current.folder.zoo, task.spec, steps, recipe)
    total = settings.runs + settings.heldout_runs
    seeds = [config.seed * SEEDS_PER_CONFIG + index for index in range(total)]
    groups = [seeds[low : low + settings.group_size] for low in range(0, total, settings.group_size)]
    done, before = 0, writer.seconds()
    with current.reporter.stage("harvest", total * config.task.steps, "steps") as advance:
        for index, group in enumerate(groups):
            base = done

            def progress(steps_done: int, base: int = base) -> None:
                advance(base + steps_done)

            if not writer.has(index, group):
                _write_shard(current, writer, index, group, steps, progress)
            done += len(group) * config.task.steps
            advance(done)
    writer.trim(len(groups))
    zoo = Zoo.open(current.folder.zoo)
    seconds = writer.seconds()
    current.ledger.append(
        [
            {
                "kind": "entity", "type": "zoo", "digest": zoo.digest, "runs": total, "recipe": recipe,
                "steps": steps, "seeds": [seeds[0], seeds[-1]], "spec": task.spec.fingerprint,
                "wasGeneratedBy": {"activity": "harvest", "versions": versions()},
            }
        ]
    )  # fmt: skip
    checkpoints = zoo.weights.shape[0] * zoo.weights.shape[1]
    report = {
        "runs": len(zoo.seeds), "skipped_runs": zoo.skipped, "checkpoints": checkpoints,
        "parameters": task.spec.size, "seconds": seconds, "checkpoints_per_second": checkpoints / max(seconds, 1e-9),
        "prompt_loss_best": float(zoo.loss.min()), "digest": zoo.digest,
    }  # fmt: skip
    split = {
        "train_runs": len(zoo.seeds) - settings.heldout_runs, "heldout_runs": settings.heldout_runs,
        "train_images": len(task.train), "prompt_images": len(task.prompt), "test_images": len(task.test),
    }  # fmt: skip
    outputs = [current.folder.zoo / "zoo.json", *current.folder.zoo.glob("shard-*")]
    return outputs, {"harvest": report, "split": split, "seconds_before": before}


def _write_shard(
    current: Run, writer: ZooWriter, index: int, seeds: list[int], steps: list[int], progress: Callable[[int], None]
) -> None:
    began, task = time.perf_counter(), current.task
    weights = train_population(task, seeds, steps, progress=progress)
    metrics = task.measure(weights.flatten(0, 1), task.prompt)
    shape = weights.shape[:2]
    shaped = Metrics(metrics.loss.unflatten(0, shape), metrics.accuracy.unflatten(0, shape))
    writer.write(index, seeds, weights, shaped, seconds=time.perf_counter() - began)
