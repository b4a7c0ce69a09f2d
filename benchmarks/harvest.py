"""Harvest: one batched population against a sequential loop of plain `nn.Module` trainings.

Both sides do the same trainings with the same seeds, keep the same checkpoints and measure them on the
prompt images. They take turns; the loop trains fewer networks, and seconds are per network.

    python benchmarks/harvest.py
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.checkpoints import kept_steps, train_population
from mole.checkpoints.population import data_order
from mole.config import TaskConfig
from mole.tasks import Task, load_task
from mole.tasks.task import build_network

ROUNDS, POPULATION, LOOP, CHECKPOINTS = 5, 512, 8, 30


def population(task: Task, keep: list[int]) -> Tensor:
    groups = [range(low, low + 256) for low in range(0, POPULATION, 256)]
    weights = torch.cat([train_population(task, seeds, keep) for seeds in groups])
    task.measure(weights.flatten(0, 1), task.prompt)
    return weights


def loop(task: Task, keep: list[int]) -> Tensor:
    histories = []
    for seed in range(LOOP):
        network, config = build_network(task.layers, seed), task.config
        optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
        epochs = -(-config.steps // (len(task.train) // config.batch_size))
        kept = [task.spec.flatten(network.state_dict())]
        for step, index in enumerate(data_order(seed, len(task.train), config.batch_size, epochs)[: keep[-1]], 1):
            optimizer.zero_grad()
            F.cross_entropy(network(task.train.images[index]), task.train.labels[index]).backward()
            optimizer.step()
            if step in keep:
                kept.append(task.spec.flatten(network.state_dict()))
                with torch.no_grad():
                    logits = network(task.prompt.images)
                    F.cross_entropy(logits, task.prompt.labels).item()
                    (logits.argmax(-1) == task.prompt.labels).float().mean().item()
        histories.append(torch.stack(kept))
    return torch.stack(histories)


def main() -> None:
    task = load_task(TaskConfig(name="digits", hidden=16, steps=300))
    keep = kept_steps(task.config.steps, CHECKPOINTS)
    short = keep[: CHECKPOINTS // 2]
    ours, theirs = train_population(task, range(LOOP), short), loop(task, short)
    difference = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    for _ in range(ROUNDS):
        for name, side, count in (("ours", population, POPULATION), ("baseline", loop, LOOP)):
            began = time.perf_counter()
            side(task, keep)
            seconds[name].append((time.perf_counter() - began) / count)
    ours_median, baseline_median = (statistics.median(seconds[name]) for name in ("ours", "baseline"))
    details = {
        "task": "digits 64-16-10", "steps": task.config.steps, "checkpoints": len(keep), "population": POPULATION,
        "loop": LOOP, "rounds": ROUNDS, "threads": torch.get_num_threads(),
        "ratios": [b / o for o, b in zip(seconds["ours"], seconds["baseline"], strict=True)],
        f"largest_relative_difference_after_{short[-1]}_steps": difference,
    }  # fmt: skip
    result = {
        "name": "harvest", "ratio": baseline_median / ours_median, "ours": ours_median, "baseline": baseline_median,
        "unit": "seconds per network", "details": details,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
