"""How much sooner MOLE's generator is as accurate as G.pt is at the end of the same time, on the same harvest.

Both read the zoo of configs/digits.yaml, on the same machine, in one run, one after the other, with as many threads.
G.pt (configs/gpt_digits.yaml; at least as many parameters) trains for `--seconds` by its own recipe, its cosine
schedule fitted to that time, and is judged at its end with its moving average and `--evaluations` ancestral steps.
MOLE's generator trains by configs/digits.yaml and is judged on the way with one evaluation. Accuracies are means over
held-out starts on prompt images, on which nothing is trained; test images are measured once, at the end.

    python benchmarks/time_to_accuracy.py --out runs/time_to_accuracy --seconds 300 --seed 0
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mole.checkpoints import Zoo
from mole.config import Config, load
from mole.diffusion.generator import Generator
from mole.diffusion.pairs import ZooPairs
from mole.diffusion.request import Request
from mole.diffusion.training import Data, train_generator
from mole.tasks import Classification, load_task

ROOT = Path(__file__).resolve().parent.parent
TRIAL = 20
"""Steps whose time tells how many fit."""


def train(config: Config, zoo: tuple[Zoo, Zoo], task: Classification, state: Path) -> tuple[Generator, Any]:
    """Train a generator; returns it with its seconds and prompt accuracies on the way, the time of validations left
    out."""
    state.unlink(missing_ok=True)
    training, heldout = zoo
    points: list[tuple[float, float]] = []
    clock = {"began": 0.0, "judged": 0.0, "last": 0.0}

    def progress(done: int, note: str = "") -> None:
        clock["last"] = time.perf_counter()
        if not clock["began"]:
            clock["began"] = clock["last"]

    def log(step: int, values: Mapping[str, float]) -> None:
        if "val/one_pass_accuracy" in values:  # validation comes right after the progress of its step
            seconds = clock["last"] - clock["began"] - clock["judged"]
            clock["judged"] += time.perf_counter() - clock["last"]
            points.append((seconds, values["val/one_pass_accuracy"]))

    data = Data(task, lambda _: ZooPairs(training, task, config.generator), heldout)
    generator, *_ = train_generator(
        config, data, state, identity="", device=torch.device("cpu"), progress=progress, log=log
    )  # fmt: skip
    state.unlink(missing_ok=True)
    seconds = time.perf_counter() - clock["began"] - clock["judged"]
    return generator, {"seconds": seconds, "points": points}


def judged(generator: Generator, heldout: Zoo, task: Classification, evaluations: int) -> dict[str, float]:
    """Mean accuracies of one network per held-out start, prompted for the best loss."""
    best = {"target_loss": generator.card.ranges["loss"][0]}
    drawn = generator.draw(Request(heldout.read(heldout.first), best, evaluations=evaluations)).flat
    return {split: float(task.measure(drawn, split)["accuracy"].mean()) for split in ("prompt", "test")}


def with_steps(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_accuracy"))
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.out / f"seed-{given.seed}"
    harvest = ["train.py", "--only", "harvest", "--seed", str(given.seed), "--out", str(folder)]
    subprocess.run([sys.executable, *harvest, "--tracking.mode", "disabled"], cwd=ROOT, check=True)
    seed = [("seed", str(given.seed))]
    both = [*seed, ("train.objective", "mean")]  # G.pt's
    mine, theirs = (load([ROOT / "configs" / f"{name}.yaml"], both) for name in ("digits", "gpt_digits"))
    zoo = Zoo(folder / "zoo").finished().split_by_run(mine.harvest.heldout_runs)
    task = load_task(mine.task)
    assert isinstance(task, Classification)
    state, never = folder / "state.ckpt", 10**9

    trial = with_steps(theirs, steps=TRIAL, validate_every=never, checkpoint_every=never)
    rate = TRIAL / train(trial, zoo, task, state)[1]["seconds"]
    steps = max(1, round(rate * given.seconds))
    baseline, spent = train(
        with_steps(theirs, steps=steps, validate_every=never, checkpoint_every=never), zoo, task, state
    )
    reached = judged(baseline, zoo[1], task, given.evaluations)
    generator, way = train(with_steps(mine, validate_every=5, checkpoint_every=never), zoo, task, state)
    ended = judged(generator, zoo[1], task, 1)
    when = next((seconds for seconds, accuracy in way["points"] if accuracy >= reached["prompt"]), None)
    sizes = [sum(p.numel() for p in g.denoiser.parameters()) for g in (baseline, generator)]
    print(
        json.dumps(
            {
                "benchmark": "time_to_accuracy", "seed": given.seed, "threads": torch.get_num_threads(),
                "machine": platform.processor() or platform.machine(),
                "gpt": {"parameters": sizes[0], "steps": steps, "batch": theirs.train.batch_size,
                        "seconds": spent["seconds"], "evaluations": given.evaluations, **reached},
                "mole": {"parameters": sizes[1], "steps": mine.train.steps, "seconds": way["seconds"],
                         "evaluations": 1, **ended, "seconds_to_the_accuracy_of_gpt": when},
                "ratio": None if when is None else spent["seconds"] / max(when, 1e-9),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
