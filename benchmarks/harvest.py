"""Harvest: one batched population against a sequential loop of plain `nn.Module` trainings.

Both sides do the same trainings with the same seeds, keep the same checkpoints and measure them on the
prompt images. They take turns; the loop trains fewer networks, and seconds are per network.

    python benchmarks/harvest.py digits
    MOLE_DATA=/path/to/data python benchmarks/harvest.py mnist

On a GPU, `mnist` also extrapolates G.pt's whole set (10,728 runs x 200 checkpoints, 11,700 steps each) from
a population that trains for at least three minutes.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.checkpoints import AtRandom, kept_steps, train_population
from mole.config import TaskConfig
from mole.tasks import Classification, load_task
from mole.tasks.supervised import DataOrder

GPT_RUNS, GPT_STEPS, GPT_CHECKPOINTS = 10_728, 11_700, 200
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Setting:
    """How much of a task is measured."""

    config: TaskConfig
    checkpoints: int
    population: int
    loop: int
    rounds: int = 5


SETTINGS = {
    "digits": Setting(TaskConfig(name="digits"), 30, population=512, loop=8),
    "mnist": Setting(TaskConfig(name="mnist", steps=600), 12, population=4096 if DEVICE.type == "cuda" else 68, loop=4),
}


def population(task: Classification, count: int, keep: list[int]) -> Tensor:
    weights = train_population(task, range(count), keep).weights
    task.measure(weights.to(DEVICE), "prompt")
    return weights.unflatten(0, (count, -1))


def loop(task: Classification, count: int, keep: list[int]) -> Tensor:
    """What one writes without MOLE, at its best: fused optimiser, data in memory."""
    histories = []
    for seed in range(count):
        network, config = task.architecture.build(seed).to(DEVICE), task.config
        options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
        if config.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), **options)
        else:
            optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **options)
        order, epoch = DataOrder(task, seed), torch.empty(0)
        kept = [task.spec.flatten(network.state_dict())]
        for step in range(1, keep[-1] + 1):
            at = (step - 1) % task.steps_per_epoch
            if at == 0:
                epoch = order.epoch().to(DEVICE)
            if config.schedule == "epoch_cosine":
                optimizer.param_groups[0]["lr"] = rate_of_epoch(task, step - 1)
            index = epoch[at]
            optimizer.zero_grad()
            F.cross_entropy(network(task.train.images[index]), task.train.labels[index]).backward()
            optimizer.step()
            if step in keep:
                kept.append(task.spec.flatten(network.state_dict()))
                with torch.no_grad():
                    logits = network(task.prompt.images)
                    F.cross_entropy(logits, task.prompt.labels).item()
                    (logits.argmax(-1) == task.prompt.labels).float().mean().item()
        histories.append(torch.stack(kept).cpu())
    return torch.stack(histories)


def rate_of_epoch(task: Classification, step: int) -> float:
    epoch = step // task.steps_per_epoch * task.steps_per_epoch
    return task.config.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / task.config.steps)).item())


def whole_set(task: Classification) -> dict[str, float | int]:
    """G.pt's MNIST set, extrapolated from at least three minutes of it."""
    task = task.with_config(task.config.model_copy(update={"steps": GPT_STEPS}))
    count, spent = 1024, 0.0
    while spent < 180:
        count *= 2
        began = time.perf_counter()
        history = train_population(task, range(count), AtRandom(range(count), GPT_STEPS, GPT_CHECKPOINTS))
        task.measure(history.weights.to(DEVICE), "prompt")
        spent = time.perf_counter() - began
    minutes = spent / count * GPT_RUNS / 60
    return {"measured_runs": count, "measured_seconds": spent, "extrapolated_minutes": minutes}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "digits"
    setting = SETTINGS[name]
    task = load_task(setting.config).to(DEVICE)
    assert isinstance(task, Classification)
    keep = kept_steps(setting.config.steps, setting.checkpoints)
    short = [step for step in keep if step <= 15]
    ours, theirs = population(task, setting.loop, short), loop(task, setting.loop, short)
    difference = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    for _ in range(setting.rounds):
        for side, run, count in (("ours", population, setting.population), ("baseline", loop, setting.loop)):
            began = time.perf_counter()
            run(task, count, keep)
            seconds[side].append((time.perf_counter() - began) / count)
    ours_median, baseline_median = (statistics.median(seconds[side]) for side in ("ours", "baseline"))
    widths = "-".join(map(str, task.architecture.widths))
    details = {
        "task": f"{name} {widths}", "steps": setting.config.steps, "checkpoints": len(keep),
        "population": setting.population, "loop": setting.loop, "rounds": setting.rounds,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "ratios": [b / o for o, b in zip(seconds["ours"], seconds["baseline"], strict=True)],
        f"largest_relative_difference_after_{short[-1]}_steps": difference,
    }  # fmt: skip
    if name == "mnist" and DEVICE.type == "cuda":
        details["whole_set_of_gpt"] = whole_set(task)
    result = {
        "name": f"harvest-{name}", "ratio": baseline_median / ours_median, "ours": ours_median,
        "baseline": baseline_median, "unit": "seconds per network", "details": details,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
