"""How obedience grows with the size of the generator and of the zoo: one table, one figure.

Every generator trains for the same number of steps by configs/digits.yaml on the first runs of one zoo, and is judged
from held-out starts. G.pt's published scaling (CIFAR-10) has an alignment R2 of 0.44 at best, with 858 M parameters.

    python benchmarks/scaling.py --out runs/scaling --steps 600 --seed 0
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mole.checkpoints import Zoo
from mole.config import Config, load
from mole.diffusion.pairs import ZooPairs
from mole.diffusion.request import Request
from mole.diffusion.training import Data, train_generator
from mole.evaluation.alignment import alignment, prompts
from mole.tasks import Classification, load_task

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = [30_000, 100_000, 400_000, 1_600_000]
RUNS = [32, 256, 2048]


def one(config: Config, training: Zoo, heldout: Zoo, task: Classification, state: Path) -> dict[str, Any]:
    """Train one generator and judge it on test images."""
    state.unlink(missing_ok=True)
    began = time.perf_counter()
    data = Data(task, lambda _: ZooPairs(training, task, config.generator), heldout)
    generator, *_ = train_generator(
        config, data, state, identity="", device=torch.device("cpu"),
        progress=lambda done, note="": None, log=lambda step, values: None,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    starts, best = heldout.read(heldout.first), float(training.loss.min())
    prompted = prompts(best, heldout.loss[heldout.first], 20)
    wanted = Request(starts.repeat_interleave(20, 0), {"target_loss": prompted.flatten()})
    achieved = task.measure(generator.draw(wanted).flat, "test")["loss"].reshape(prompted.shape)
    lowest = generator.draw(Request(starts, {"target_loss": best})).flat
    return {
        "parameters": sum(p.numel() for p in generator.denoiser.parameters()), "runs": training.runs,
        "r2": alignment(prompted, achieved, task.measure(starts, "test")["loss"])["r2_mean"],
        "accuracy": float(task.measure(lowest, "test")["accuracy"].mean()), "seconds": seconds,
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path, steps: int) -> None:
    """The figure: size of the generator against alignment and error, a line per size of the zoo."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for runs, colour in zip(RUNS, ("#E69F00", "#56B4E9", "#0072B2"), strict=True):
        part = sorted((row for row in rows if row["runs"] == runs), key=lambda row: row["parameters"])
        sizes = [row["parameters"] for row in part]
        left.plot(sizes, [row["r2"] for row in part], "o-", color=colour, label=f"{runs:,} runs")
        right.plot(sizes, [1 - row["accuracy"] for row in part], "o-", color=colour, label=f"{runs:,} runs")
    left.axhline(0, color="0.5", linestyle=":", label="no better than one prompt for all")
    left.set(xscale="log", xlabel="parameters of the generator", ylabel="prompt alignment R²", ylim=(-0.5, 1.02))
    right.set(xscale="log", yscale="log", xlabel="parameters of the generator", ylabel="one pass, test error")
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Digits, {steps} training steps, one evaluation, 64 held-out starts", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    harvest = ["train.py", "--only", "harvest", "--seed", str(given.seed), "--out", str(given.out)]
    subprocess.run([sys.executable, *harvest, "--tracking.mode", "disabled"], cwd=ROOT, check=True)
    base = load(
        [ROOT / "configs" / "digits.yaml"],
        [("seed", str(given.seed)), ("train.steps", str(given.steps)), ("train.objective", "mean")],
    )
    training, heldout = Zoo(given.out / "zoo").finished().split_by_run(base.harvest.heldout_runs)
    task = load_task(base.task)
    assert isinstance(task, Classification)
    quiet = base.train.model_copy(update={"validate_every": 10**9, "checkpoint_every": 10**9})
    rows: list[dict[str, Any]] = []
    for parameters in PARAMETERS:
        generator = base.generator.model_copy(update={"parameters": parameters, "heads": 2})
        config = base.model_copy(update={"generator": generator, "train": quiet})
        for runs in RUNS:
            rows.append(one(config, training.of_runs(slice(0, runs)), heldout, task, given.out / "state.ckpt"))
            print(json.dumps(rows[-1]), flush=True)
    (given.out / "state.ckpt").unlink(missing_ok=True)
    draw(rows, given.out / "scaling.png", given.steps)
    print(json.dumps({"benchmark": "scaling", "seed": given.seed, "steps": given.steps, "rows": rows}))


if __name__ == "__main__":
    main()
