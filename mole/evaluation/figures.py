"""The figures of a run, drawn from what the report holds and from nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mole.files import replacing

# Okabe-Ito: told apart by colour-blind readers; one colour means one thing in every figure
COLOURS = {
    "generated": "#0072B2", "training": "#000000", "adam": "#D55E00", "sgd": "#E69F00",
    "mean_of_16_aligned": "#009E73", "noise": "#CC79A7", "nearest_prompt_retrieval": "#56B4E9", "start": "#999999",
    "gaussian": "#F0E442", "pca_gaussian": "#8C564B",
}  # fmt: skip
MARKERS = {"mean_of_16_aligned": "s", "noise": "^", "nearest_prompt_retrieval": "D", "start": "v", "training": "x",
           "gaussian": "P", "pca_gaussian": "X"}  # fmt: skip
OPTIMISERS = {"adam": "Adam", "sgd": "SGD, Nesterov momentum"}
LABELS = {
    "generated": "generated, one pass", "training": "training networks", "mean_of_16_aligned": "mean of 16 aligned",
    "noise": "training + noise", "nearest_prompt_retrieval": "nearest-prompt retrieval", "start": "start networks",
    "gaussian": "Gaussian per weight", "pca_gaussian": "Gaussian, principal components",
}  # fmt: skip


def draw_figures(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write `alignment.png`, `optimisers.png`, `novelty.png` and `fine_tuning.png`; returns their paths."""
    figures = {"alignment": _alignment, "optimisers": _optimisers, "novelty": _novelty, "fine_tuning": _fine_tuning}
    paths = []
    for name, draw in figures.items():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot(), report)
        with replacing(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
        paths.append(folder / f"{name}.png")
    return paths


def _alignment(axes: Axes, report: dict[str, Any]) -> None:
    curve, scores = report["figures"]["alignment"], report["alignment"]
    prompted, mean = np.array(curve["prompted"]), np.array(curve["achieved_mean"], dtype=float)
    std = np.array(curve["achieved_std"], dtype=float)
    axes.axvspan(*curve["zoo_range"], facecolor="0.92", edgecolor="0.6", linewidth=0.8, label="losses in the zoo")
    low, high = prompted.min(), prompted.max()
    axes.plot([low, high], [low, high], "--", color="0.4", label="identity")
    axes.axhline(
        curve["noop"] if curve["noop"] is not None else np.nan,
        color=COLOURS["start"],
        linestyle=":",
        label=f"start (R² {_number(scores['noop_r2'], '.2f')})",
    )
    axes.plot(
        prompted, mean, "o-", color=COLOURS["generated"], label=f"one pass (R² {_number(scores['r2_mean'], '.3f')})"
    )
    axes.fill_between(prompted, mean - std, mean + std, color=COLOURS["generated"], alpha=0.2, linewidth=0)
    axes.set(xlabel="prompted loss, prompt images (nats)", ylabel="achieved loss, test images (nats)")
    axes.set_title(f"Prompt alignment: {scores['starts']} held-out starts, mean ± standard deviation", fontsize=10)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.legend(frameon=False)


def _number(value: float | None, form: str) -> str:
    """A number in words; of what no sound network is left, it is not known."""
    return "unknown" if value is None else f"{value:{form}}"


def _optimisers(axes: Axes, report: dict[str, Any]) -> None:
    one_pass, score = report["one_pass"], report["score"]
    for curve in report["figures"]["optimisers"]:
        name = curve["optimizer"]
        label = f"{OPTIMISERS[name]}, learning rate {curve['learning_rate']:g}"
        axes.plot(curve["steps"], np.array(curve["score"], dtype=float), color=COLOURS[name], label=label)
    mean, trained = one_pass[f"{score}_mean"], one_pass[f"trained_{score}_mean"]
    for value, whose, what, line in (
        (mean, "generated", "one pass", "-"),
        (trained, "training", "training networks", ":"),
    ):
        height = np.nan if value is None else value
        axes.axhline(height, color=COLOURS[whose], linestyle=line, label=f"{what}, {_number(value, '.4g')}")
    axes.set(xlabel="optimiser steps from the same starts", ylabel=f"mean test {score}")
    axes.set_title(f"One pass against optimisers: {one_pass['starts']} held-out starts", fontsize=10)
    axes.legend(frameon=False, loc="lower right")


def _novelty(axes: Axes, report: dict[str, Any]) -> None:
    for name, points in report["figures"]["novelty"].items():
        distance, score = (np.array(points[key], dtype=float) for key in ("distance", "score"))
        marker = MARKERS.get(name, "o")
        axes.scatter(distance, score, s=14, alpha=0.7, color=COLOURS[name], marker=marker, label=LABELS[name])
    axes.set(xlabel="distance to the nearest training network, modulo permutation", ylabel=f"test {report['score']}")
    axes.set_title(f"{report['score'].capitalize()} against novelty", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _fine_tuning(axes: Axes, report: dict[str, Any]) -> None:
    for curve in report["fine_tuning"]:
        name = curve["origin"]
        label = f"{LABELS[name]}, learning rate {curve['learning_rate']:g}"
        axes.plot(curve["steps"], np.array(curve["score"], dtype=float), color=COLOURS[name], label=label)
    axes.set(xlabel="Adam steps", ylabel=f"mean test {report['score']}")
    axes.set_title("Fine-tuning from generated networks, starts and the best null model", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
