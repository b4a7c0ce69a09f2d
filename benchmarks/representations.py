"""Which representation of networks a generator learns best from: every view times every handling of symmetry.

Each generator gets the same zoo, the same number of steps, the same batches of runs, and the same transformer; only
what its tokens are and what is done about symmetry differ. A learned code is trained before, and its time counts. Each
one is trained and judged in a process of its own on one thread, so that memory is its own. A generator that is finished
is not trained again. Diversity is the mean distance between generated networks, modulo the order of neurons, over that
between trained ones: 1 is right, 0 is one network for all.

    python benchmarks/representations.py --out runs/representations --steps 400 --seeds 0 1 2 --workers 2
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from mole.config import EvaluateConfig, GeneratorConfig, load
from mole.evaluation.novelty import PermutationDistance
from mole.representations import WeightSpec

ROOT = Path(__file__).resolve().parent.parent

CASES = [
    (view, symmetry)
    for view in ("chunks", "latent", "neurons", "graph")
    for symmetry in ("none", "augment", "canonical", "equivariant")
    if symmetry != "equivariant" or view in ("neurons", "graph")
]
"""`equivariant` is not defined for chunks and for a learned code."""

COLUMNS = {
    "prompt_accuracy": "one pass, prompt images", "test_accuracy": "one pass, test images", "r2": "alignment R²",
    "diversity": "diversity", "parameters": "parameters", "seconds": "seconds", "memory_gb": "peak GB",
}  # fmt: skip


def train_one(view: str, symmetry: str, seed: int, steps: int, zoo_folder: Path) -> dict[str, Any]:
    """Train one generator and judge it."""
    from mole.checkpoints import Zoo
    from mole.diffusion.pairs import ZooPairs
    from mole.diffusion.request import Request
    from mole.diffusion.training import Data, train_generator
    from mole.evaluation.alignment import alignment, prompts
    from mole.tasks import Classification, load_task

    torch.set_num_threads(1)
    config = load(
        [ROOT / "configs" / "digits.yaml"],
        [("seed", str(seed)), ("train.steps", str(steps)), ("train.objective", "mean")],
    )
    chosen = GeneratorConfig.model_validate({**config.generator.model_dump(), "view": view, "symmetry": symmetry})
    config = config.model_copy(update={"generator": chosen})
    training, heldout = Zoo(zoo_folder).finished().split_by_run(config.harvest.heldout_runs)
    task = load_task(config.task)
    assert isinstance(task, Classification)
    began = time.perf_counter()
    state = zoo_folder.parent / f"{view}-{symmetry}.ckpt"
    data = Data(task, lambda state: ZooPairs(training, task, chosen), heldout)
    generator, *_ = train_generator(
        config, data, state, identity="", device=torch.device("cpu"),
        progress=lambda done, note="": None, log=lambda step, values: None,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    state.unlink(missing_ok=True)
    starts, best = heldout.read(heldout.first), float(training.loss.min())
    drawn = generator.draw(Request(starts, {"target_loss": best}), seed=seed).flat
    count = EvaluateConfig().prompts
    prompted = prompts(best, heldout.loss[heldout.first], count)
    wanted = Request(starts.repeat_interleave(count, 0), {"target_loss": prompted.flatten()})
    asked = generator.draw(wanted, seed=seed).flat
    achieved = task.measure(asked, "test")["loss"].reshape(prompted.shape)
    result = {
        "view": view, "symmetry": symmetry, "seed": seed, "steps": steps,
        "prompt_accuracy": float(task.measure(drawn, "prompt")["accuracy"].mean()),
        "test_accuracy": float(task.measure(drawn, "test")["accuracy"].mean()),
        "r2": alignment(prompted, achieved, task.measure(starts, "test")["loss"])["r2_mean"],
        "diversity": diversity(drawn, heldout.read(heldout.last), training.spec),
        "parameters": sum(p.numel() for p in generator.denoiser.parameters()),
        "codec_parameters": sum(p.numel() for p in generator.codec.parameters()),
        "seconds": seconds, "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    if generator.codec.autoencoder is not None:  # what the learned code itself loses
        last = heldout.read(heldout.last)
        elements = generator.codec.elements(last)
        last = last if elements is None else elements.act(last)
        again = generator.codec.restore(generator.codec.normalise(last))
        result["code_error"] = float((again - last).square().sum() / (last - last.mean(0)).square().sum())
        result["code_accuracy"] = float(task.measure(again, "test")["accuracy"].mean())
        result["trained_accuracy"] = float(task.measure(last, "test")["accuracy"].mean())
    return result


def diversity(drawn: Tensor, trained: Tensor, spec: WeightSpec) -> float:
    """Mean distance between generated networks over that between trained ones, modulo the order of neurons."""
    distance = PermutationDistance(spec)
    means = [float(distance.pairwise(flat[:24], flat[24:48]).mean()) for flat in (drawn, trained)]
    return means[0] / means[1]


def run_all(out: Path, seeds: list[int], steps: int, workers: int) -> list[dict[str, Any]]:
    """Every case and seed that is not there yet."""
    for seed in seeds:
        command = ["train.py", "--only", "harvest", "--seed", str(seed), "--out", str(out / f"seed-{seed}")]
        subprocess.run([sys.executable, *command, "--tracking.mode", "disabled"], cwd=ROOT, check=True)
    results = out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(r["view"], r["symmetry"], r["seed"], r["steps"]) for r in done}
    waiting = [(*case, seed) for seed in seeds for case in CASES if (*case, seed, steps) not in known]

    def one(job: tuple[str, str, int]) -> None:
        view, symmetry, seed = job
        command = [
            sys.executable,
            __file__,
            "--one",
            view,
            symmetry,
            str(seed),
            "--steps",
            str(steps),
            "--out",
            str(out),
        ]
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[-1]
        with results.open("a") as file:
            file.write(found + "\n")
        row = json.loads(found)
        print(f"{view} {symmetry} seed {seed}: {row['prompt_accuracy']:.4f} in {row['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, waiting))
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return [row for row in rows if row["seed"] in seeds and row["steps"] == steps]


def null_results(out: Path, seeds: list[int]) -> dict[str, tuple[float, float]]:
    """Diversity and test accuracy of null models and of trained networks, means over seeds."""
    from mole.checkpoints import Zoo
    from mole.evaluation.nulls import null_models
    from mole.tasks import load_task

    task, found = load_task(load([ROOT / "configs" / "digits.yaml"], []).task), dict[str, list[tuple[float, float]]]()
    for seed in seeds:
        training, heldout = Zoo(out / f"seed-{seed}" / "zoo").finished().split_by_run(64)
        starts, final, last = heldout.read(heldout.first), training.read(training.last), heldout.read(heldout.last)
        retrieved = training.read(training.loss.argsort()[: len(starts)])
        distance = PermutationDistance(training.spec)
        models = null_models(distance, starts, final, retrieved, noise_distance=10.0, seed=seed)
        chosen = {"trained networks": last, "mean of 16 aligned": models["mean_of_16_aligned"], "retrieval": retrieved}
        for name, flat in chosen.items():
            accuracy = float(task.measure(flat, "test")["accuracy"].mean())
            found.setdefault(name, []).append((diversity(flat, last, training.spec), accuracy))
    return {name: (mean(d for d, _ in pairs), mean(a for _, a in pairs)) for name, pairs in found.items()}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case: means over seeds, and the spread of the accuracies."""
    found = []
    for view, symmetry in CASES:
        mine = [row for row in rows if (row["view"], row["symmetry"]) == (view, symmetry)]
        if mine:
            means = {name: mean(row[name] for row in mine) for name in COLUMNS}
            spread = stdev(row["test_accuracy"] for row in mine) if len(mine) > 1 else 0.0
            found.append({"view": view, "symmetry": symmetry, "seeds": len(mine), "spread": spread, **means})
    return found


def table(cases: list[dict[str, Any]]) -> str:
    """The table of the docs."""
    best = max(case["prompt_accuracy"] for case in cases)
    lines = [f"| view | symmetry | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for case in cases:
        bold = "**" if case["prompt_accuracy"] == best else ""
        cells = [
            case["view"], case["symmetry"], f"{bold}{case['prompt_accuracy']:.3f}{bold}",
            f"{case['test_accuracy']:.3f} ± {case['spread']:.3f}", f"{case['r2']:.3f}", f"{case['diversity']:.2f}",
            f"{case['parameters'] / 1e6:.2f} M", f"{case['seconds']:.0f}", f"{case['memory_gb']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(cases: list[dict[str, Any]], nulls: dict[str, tuple[float, float]], path: Path) -> None:
    """Accuracy against diversity: a generator that gives one network to everybody stands far to the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"none": "#999999", "augment": "#E69F00", "canonical": "#009E73", "equivariant": "#0072B2"}
    markers = {"chunks": "s", "latent": "^", "neurons": "o", "graph": "D"}
    figure = Figure(figsize=(6.8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for case in cases:
        axes.errorbar(
            case["diversity"], case["test_accuracy"], yerr=case["spread"], color=colours[case["symmetry"]],
            marker=markers[case["view"]], markersize=8, markeredgecolor="black", markeredgewidth=0.5, capsize=2,
        )  # fmt: skip
    for name, (wide, accuracy) in nulls.items():
        axes.plot(wide, accuracy, marker="x", markersize=8, color="black", linestyle="")
        axes.annotate(name, (wide, accuracy), ha="right", va="center", fontsize=8, xytext=(-7, 0),
                      textcoords="offset points")  # fmt: skip
    keys = [axes.plot([], [], marker=m, linestyle="", color="0.7", markeredgecolor="black", label=v)[0]
            for v, m in markers.items()]  # fmt: skip
    keys += [axes.plot([], [], marker="o", linestyle="", color=c, label=s)[0] for s, c in colours.items()]
    axes.legend(handles=keys, frameon=False, ncols=2, loc="lower left", fontsize=8, title="view, symmetry")
    axes.set(xlabel="diversity of generated networks (1: as trained ones)", ylabel="test accuracy of one pass")
    axes.set_xlim(0, max(1.05, *(1.05 * wide for wide, _ in nulls.values())))
    seeds = max(case["seeds"] for case in cases)
    axes.set_title(f"Representations at the same steps and batches, mean and deviation of {seeds} seeds", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/representations"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("VIEW", "SYMMETRY", "SEED"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.one:
        view, symmetry, seed = options.one
        print(json.dumps(train_one(view, symmetry, int(seed), options.steps, out / f"seed-{seed}" / "zoo")))
        return
    cases = summary(run_all(out, options.seeds, options.steps, options.workers))
    (out / "table.md").write_text(table(cases) + "\n")
    nulls = null_results(out, options.seeds)
    draw(cases, nulls, out / "representations.png")
    print(table(cases))
    print(json.dumps({"steps": options.steps, "cases": cases, "nulls": nulls}))


if __name__ == "__main__":
    main()
