"""The tables of neuralRank (Desai et al.) again: scores and transfer accuracies beside the paper's.

    MOLE_DATA=... python benchmarks/neuralrank.py configs/neuralrank.yaml --out runs/neuralrank

Networks are trained once and kept in the folder; from there the tables come out in minutes. `--tiny` walks through with
random images in seconds.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from neuralrank_networks import CONFIG, NINE, TINY, Images, Settings, features, trained, transfer_accuracy
from torch import Tensor, nn

from mole.rank import kendall_tau, principal_components, see, silhouette, successive_halving

PAPER: dict[str, dict[str, Any]] = {
    "table 2": {
        "target": "M04", "networks": NINE, "input": 0.346,
        "scores": [0.784, 0.821, 0.463, 0.248, 0.276, 0.210, 0.293, 0.315, 0.303],
    },
    "tables 3 and 4": {
        "target": "F04", "networks": NINE,
        "scores": [0.099, 0.081, 0.061, 0.499, 0.540, 0.082, 0.212, 0.182, 0.180],
        "accuracy": [0.862, 0.871, 0.859, 0.942, 0.943, 0.875, 0.892, 0.886, 0.883],
    },
    "table 5, MNIST": {
        "target": "M04", "networks": [f"{name}-lite" for name in NINE],
        "scores": [0.671, 0.723, 0.419, 0.226, 0.231, 0.189, 0.301, 0.305, 0.304],
        "accuracy": [0.998, 0.998, 0.992, 0.987, 0.975, 0.977, 0.986, 0.982, 0.986],
    },
    "table 5, Fashion": {
        "target": "F04", "networks": [f"{name}-lite" for name in NINE],
        "scores": [0.174, 0.134, 0.107, 0.418, 0.436, 0.170, 0.235, 0.195, 0.212],
        "accuracy": [0.881, 0.864, 0.868, 0.939, 0.939, 0.878, 0.883, 0.855, 0.876],
    },
    "table 6": {
        "target": "F04",
        "networks": ["F10", "F04", "C10", "C04", "C59", "F10-512", "F04-512", "C10-512", "C04-512", "C59-512"],
        "scores": [0.499, 0.540, 0.212, 0.182, 0.180, 0.476, 0.561, 0.191, 0.185, 0.160],
        "accuracy": [0.940, 0.940, 0.893, 0.881, 0.879, 0.946, 0.946, 0.851, 0.863, 0.868],
    },
}  # fmt: skip
DIMENSIONS = [3, 5, 10, 20, 30, 50]
TARGETS = ["M04", "F04"]
LAYERS = ["1", "2", "4", "5", "8"]
"""L1 to L5: after each of two convolutions and its pooling, and the dense layer."""
COLOURS = ["#0072B2", "#D55E00", "#009E73"]
LABEL_COLOURS = [*COLOURS, "#CC79A7", "#E69F00"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=CONFIG)
    parser.add_argument("--out", type=Path, default=Path("runs/neuralrank"))
    parser.add_argument("--tables", nargs="*", help="some of the tables, by their titles, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="random images and two steps, to try the way")
    given = parser.parse_args()
    settings = TINY if given.tiny else Settings.read(given.config)
    data, began = Images(tiny=given.tiny), time.perf_counter()
    networks = dict[str, nn.Module]()
    wanted = {title: table for title, table in PAPER.items() if not given.tables or title in given.tables}
    if len(wanted) < len(given.tables or ()):
        parser.error(f"--tables {' '.join(given.tables)}: legal are {', '.join(map(repr, PAPER))}")
    names = list(dict.fromkeys(name for table in wanted.values() for name in table["networks"]))
    for done, name in enumerate(names, 1):
        networks[name] = trained(name, data, given.out / "networks", settings)
        passed = time.perf_counter() - began
        left = passed / done * (len(names) - done)
        print(f"{name}: {done} of {len(names)} networks, {passed:.0f} s, {left:.0f} s left", flush=True)
    zoo, training, began = Zoo(networks, data, settings), time.perf_counter() - began, time.perf_counter()
    tables = {title: compared(title, table, zoo) for title, table in wanted.items()}
    if given.tables:
        print(json.dumps({"benchmark": "neuralrank", "settings": settings.model_dump(), "tables": tables}))
        return
    layers = {target: by_layer(target, zoo) for target in TARGETS}
    dimensions = {target: by_dimension(target, zoo) for target in TARGETS}
    result = {
        "benchmark": "neuralrank", "settings": settings.model_dump(), "tables": tables, "input": input_scores(zoo),
        "layers": layers, "dimensions": dimensions, "halving": {target: halving(target, zoo) for target in TARGETS},
        "training_seconds": training, "tables_seconds": time.perf_counter() - began,
    }  # fmt: skip
    dimensions_figure(dimensions, given.out / "neuralrank_dimensions.png")
    latent_figure(zoo, tables["table 2"], given.out / "neuralrank_latent.png")
    (given.out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key not in ("tables", "layers", "dimensions")}))


@dataclass(frozen=True)
class Zoo:
    """The trained networks and what they make of targets, each computed once."""

    networks: dict[str, nn.Module]
    data: Images
    settings: Settings
    known: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    components: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    accuracies: dict[tuple[str, str], float] = field(default_factory=dict)

    def seen(self, name: str, target: str, split: str = "test") -> tuple[Tensor, Tensor]:
        """Features (n, D) of the last hidden layer, and labels (n,)."""
        images, labels = self.data.part(target, split)
        if split == "train":
            images, labels = images[: self.settings.examples], labels[: self.settings.examples]
        if (name, target, split) not in self.known:
            self.known[name, target, split] = features(self.networks[name], images)
        return self.known[name, target, split], labels

    def score(self, name: str, target: str, count: int | None = None) -> float:
        """neuralRank of so many components."""
        seen, labels = self.seen(name, target)
        if (name, target) not in self.components:
            self.components[name, target] = principal_components(seen, max(*DIMENSIONS, self.settings.components))
        return silhouette(self.components[name, target][:, : count or self.settings.components], labels)

    def accuracy(self, name: str, target: str) -> float:
        """Of a new last layer."""
        if (name, target) not in self.accuracies:
            train, test = self.seen(name, target, "train"), self.seen(name, target)
            self.accuracies[name, target] = transfer_accuracy(train, test, self.settings, self.settings.seed)
        return self.accuracies[name, target]


def compared(title: str, table: dict[str, Any], zoo: Zoo) -> dict[str, Any]:
    """Ours beside the paper's, printed as Markdown."""
    names, target = table["networks"], table["target"]
    scores = [zoo.score(name, target) for name in names]
    accuracy = [zoo.accuracy(name, target) for name in names]
    ours, theirs, truth = torch.tensor(scores), torch.tensor(table["scores"]), torch.tensor(accuracy)
    top = [{names[i] for i in part.argsort(descending=True)[:3].tolist()} for part in (ours, theirs)]
    found: dict[str, Any] = {
        "networks": names, "scores": scores, "paper": table["scores"], "accuracy": accuracy,
        "tau_with_paper": kendall_tau(ours, theirs), "tau_with_accuracy": kendall_tau(ours, truth),
        "rms_difference": float((ours - theirs).square().mean().sqrt()), "same_top_3": top[0] == top[1],
    }  # fmt: skip
    rows = {"score": scores, "paper's": table["scores"], "transfer accuracy": accuracy}
    if "accuracy" in table:
        found["papers_tau_with_accuracy"] = kendall_tau(theirs, torch.tensor(table["accuracy"]))
        rows["paper's accuracy"] = table["accuracy"]
    markdown(f"{title}, target {target}", names, rows)
    print("\n" + ", ".join(f"{key} {value:.3f}" for key, value in found.items() if isinstance(value, float)))
    print(f"same top 3: {top[0] == top[1]}", flush=True)
    return found


def markdown(title: str, columns: Sequence[str], rows: dict[str, list[float]]) -> None:
    print(f"\n{title}\n\n| | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")


def by_layer(target: str, zoo: Zoo) -> dict[str, list[float]]:
    """The scores of L0 (the images) to L5 for the nine networks: where do classes come apart?"""
    images, labels = zoo.data.part(target, "test")
    images, labels = images[: zoo.settings.layer_examples], labels[: zoo.settings.layer_examples]
    found = {}
    for name in NINE:
        seen = see(zoo.networks[name], images.split(500), LAYERS, widest=2**15).features
        layers = [images.flatten(1), *seen.values()]
        found[name] = [silhouette(principal_components(x, zoo.settings.components), labels) for x in layers]
    markdown(f"all layers, target {target}", [f"L{layer}" for layer in range(6)], found)
    return found


def input_scores(zoo: Zoo) -> dict[str, float]:
    """L0: the raw images of the MNIST target, by formula."""
    images, labels = zoo.data.part("M04", "test")
    pixels = images.flatten(1).double()
    reduced = principal_components(pixels, zoo.settings.components)
    return {
        "standard": silhouette(reduced, labels), "centroid": silhouette(reduced, labels, variant="centroid"),
        "standard without PCA": silhouette(pixels, labels),
        "centroid without PCA": silhouette(pixels, labels, variant="centroid"),
    }  # fmt: skip


def halving(target: str, zoo: Zoo) -> dict[str, Any]:
    """Does successive halving find the best of all networks, and at what share of the evaluations?"""
    data, seed = zoo.data.part(target, "test"), zoo.settings.seed
    found = successive_halving(zoo.networks, data, seed=seed)
    names = sorted(zoo.networks, key=lambda name: -zoo.score(name, target))
    place = names.index(found.order[0]) + 1
    return {"share": found.share, "best": found.order[0], "best_of_all": names[0], "place": place}


def by_dimension(target: str, zoo: Zoo) -> dict[str, list[float]]:
    """Figure 2: the scores of the nine networks by the number of components."""
    return {name: [zoo.score(name, target, count) for count in DIMENSIONS] for name in NINE}


def dimensions_figure(scores: dict[str, dict[str, list[float]]], path: Path) -> None:
    drawing = Figure(figsize=(9.6, 4.0), layout="constrained")
    FigureCanvasAgg(drawing)
    for number, (target, networks) in enumerate(scores.items()):
        axes = drawing.add_subplot(1, len(scores), number + 1)
        for place, (name, values) in enumerate(networks.items()):
            axes.plot(DIMENSIONS, values, ("-", "--", ":")[place % 3], color=COLOURS[place // 3], label=name)
        axes.axvline(10, color="0.8", zorder=0)
        axes.set(xlabel="principal components", ylabel="neuralRank score", title=f"target {target}")
    drawing.axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    drawing.savefig(path, dpi=150)


def latent_figure(zoo: Zoo, table: dict[str, Any], path: Path) -> None:
    """Figure 3: the images themselves, and what the best, a middling and the worst network make of them, in 3-D."""
    order = sorted(zip(table["scores"], table["networks"], strict=True), reverse=True)
    drawing = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(drawing)
    images, labels = zoo.data.part("M04", "test")
    views = [("the images", images.flatten(1))]
    views += [(name, zoo.seen(name, "M04")[0]) for _, name in (order[0], order[len(order) // 2], order[-1])]
    for number, (name, seen) in enumerate(views):
        axes: Any = drawing.add_subplot(1, len(views), number + 1, projection="3d")
        reduced = principal_components(seen, zoo.settings.components)
        x, y, z = reduced[:500, :3].T.tolist()
        axes.scatter(x, y, z, c=[LABEL_COLOURS[label] for label in labels[:500].tolist()], s=4, depthshade=False)
        axes.set_title(f"{name}: {silhouette(reduced, labels):.3f}", fontsize=10)
        axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
    marks = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in LABEL_COLOURS]
    drawing.legend(marks, "01234", frameon=False, loc="outside right center")
    drawing.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
