"""The tables of neuralRank (Desai et al.) again: scores and transfer accuracies beside the paper's.

    MOLE_DATA=... python benchmarks/neuralrank.py --out runs/neuralrank

Networks are trained once and kept in the folder; from there the tables come out in minutes. `--tiny` walks through with
random images in seconds.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mole.errors import MoleError
from mole.files import replacing
from mole.rank import kendall_tau, leaderboard, principal_components, see, silhouette, successive_halving
from mole.seeding import Seeded, derived

ARCHIVES = {"M": "mnist", "F": "fashion_mnist", "C": "cifar10"}
LABELS = {"10": range(10), "04": range(5), "59": range(5, 10)}
NINE = [f"{letter}{part}" for letter in ARCHIVES for part in LABELS]
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


@dataclass(frozen=True)
class Sizes:
    """How much is trained and judged."""

    steps: int = 400
    batch: int = 100
    examples: int = 5000
    fit_steps: int = 300


class Images:
    """The three data sets as 28x28 grey images, by letter and split."""

    def __init__(self, *, tiny: bool) -> None:
        self.tiny = tiny
        self.known: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def whole(self, letter: str, split: str) -> tuple[Tensor, Tensor]:
        """Images (n, 1, 28, 28) in 0..1 and labels."""
        if (letter, split) not in self.known:
            self.known[letter, split] = self._read(letter, split)
        return self.known[letter, split]

    def _read(self, letter: str, split: str) -> tuple[Tensor, Tensor]:
        if self.tiny:
            generator = torch.Generator().manual_seed(derived(f"{letter} {split}", 0))
            labels = torch.arange(200) % 10
            return torch.rand(200, 1, 28, 28, generator=generator) * (1 + labels[:, None, None, None]) / 10, labels
        root = os.environ.get("MOLE_DATA")
        if not root:
            raise MoleError("MOLE_DATA is not set; it names the folder of mnist.npz, fashion_mnist.npz and cifar10.npz")
        with np.load(Path(root) / f"{ARCHIVES[letter]}.npz") as found:
            images = torch.from_numpy(found[f"x_{split}"]).float() / 255
            labels = torch.from_numpy(found[f"y_{split}"].astype(np.int64)).flatten()
        if images.ndim == 4:  # (n, 32, 32, 3), to grey by the weights of ITU-R 601
            grey = (images @ torch.tensor([0.299, 0.587, 0.114]))[:, None]
            return F.interpolate(grey, size=(28, 28), mode="bilinear", antialias=True), labels
        return images[:, None], labels

    def part(self, name: str, split: str) -> tuple[Tensor, Tensor]:
        """`M04`: the images of labels 0 to 4, numbered from 0."""
        images, labels = self.whole(name[0], split)
        wanted = LABELS[name[1:3]]
        there = (labels >= wanted.start) & (labels < wanted.stop)
        return images[there], labels[there] - wanted.start


def build(name: str) -> nn.Sequential:
    """The network of Figure 1, after the TensorFlow tutorial; `-lite` has one convolution, `-512` half of the units."""
    units, classes = 512 if name.endswith("-512") else 1024, len(LABELS[name[1:3]])
    parts: list[nn.Module] = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    width = 32 * 14 * 14
    if not name.endswith("-lite"):
        parts += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        width = 64 * 7 * 7
    dense = [nn.Flatten(), nn.Linear(width, units), nn.ReLU(), nn.Dropout(0.4), nn.Linear(units, classes)]
    return nn.Sequential(*parts, *dense)


def trained(name: str, data: Images, folder: Path, sizes: Sizes, seed: int) -> nn.Sequential:
    """From the folder, or trained by Adam and kept there."""
    path = folder / f"{name}-seed{seed}-{sizes.steps}x{sizes.batch}.safetensors"
    with Seeded(derived(f"neuralrank {name}", seed)):
        network = build(name)
        if path.is_file():
            network.load_state_dict(load_file(path))
            return network.eval()
        images, labels = data.part(name, "train")
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(sizes.steps):
            index = torch.randint(len(images), (sizes.batch,))
            optimizer.zero_grad()
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(network.state_dict(), temporary)
    return network.eval()


def features(network: nn.Module, images: Tensor) -> Tensor:
    return next(iter(see(network, images.split(500)).features.values()))


def transfer_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], sizes: Sizes, seed: int) -> float:
    """Of a new last layer, fitted to features (n, D) by Adam, everything else frozen."""
    with Seeded(derived("new last layer", seed)):
        layer = nn.Linear(train[0].shape[1], int(train[1].max()) + 1)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        for _ in range(sizes.fit_steps):
            index = torch.randint(len(train[0]), (sizes.batch,))
            optimizer.zero_grad()
            F.cross_entropy(layer(train[0][index]), train[1][index]).backward()
            optimizer.step()
        with torch.no_grad():
            return float((layer(test[0]).argmax(1) == test[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/neuralrank"))
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="of Adam, 100 images each, per network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="random images and two steps, to try the way")
    given = parser.parse_args()
    sizes = Sizes(2, 20, 60, 2) if given.tiny else Sizes(steps=given.steps)
    data, folder = Images(tiny=given.tiny), given.out / "networks"
    names = list(dict.fromkeys(name for table in PAPER.values() for name in table["networks"]))
    began = time.perf_counter()
    networks = {}
    for done, name in enumerate(names, 1):
        networks[name] = trained(name, data, folder, sizes, given.seed)
        print(f"{name}: {done} of {len(names)} networks, {time.perf_counter() - began:.0f} s", flush=True)
    training, began = time.perf_counter() - began, time.perf_counter()
    result: dict[str, Any] = {"benchmark": "neuralrank", "seed": given.seed, "steps": sizes.steps, "tables": {}}
    cache: dict[tuple[str, str, str], Tensor] = {}

    def cached(name: str, target: str, split: str) -> tuple[Tensor, Tensor]:
        images, labels = data.part(target, split)
        if split == "train":
            images, labels = images[: sizes.examples], labels[: sizes.examples]
        if (name, target, split) not in cache:
            cache[name, target, split] = features(networks[name], images)
        return cache[name, target, split], labels

    for title, table in PAPER.items():
        target, scores, accuracy = table["target"], [], []
        for name in table["networks"]:
            seen, labels = cached(name, target, "test")
            scores.append(silhouette(principal_components(seen, 10), labels))
            if "accuracy" in table:
                pair = cached(name, target, "train"), (seen, labels)
                accuracy.append(transfer_accuracy(*pair, sizes, given.seed))
        result["tables"][title] = summary(title, table, scores, accuracy)
    result["input"] = input_scores(data)
    result["dimensions"] = by_dimension(cached)
    result["halving"] = {target: halving(networks, data.part(target, "test"), given.seed) for target in ("M04", "F04")}
    result |= {"training_seconds": training, "tables_seconds": time.perf_counter() - began}
    figure(result["dimensions"], given.out / "dimensions.png")
    (given.out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key != "tables"}))


def summary(title: str, table: dict[str, Any], scores: list[float], accuracy: list[float]) -> dict[str, Any]:
    """Ours beside the paper's, printed as Markdown."""
    ours, theirs = torch.tensor(scores), torch.tensor(table["scores"])
    top = [{table["networks"][i] for i in part.argsort(descending=True)[:3].tolist()} for part in (ours, theirs)]
    found: dict[str, Any] = {
        "networks": table["networks"], "scores": scores, "paper": table["scores"],
        "tau_with_paper": kendall_tau(ours, theirs), "same_top_3": top[0] == top[1],
        "rms_difference": float((ours - theirs).square().mean().sqrt()),
    }  # fmt: skip
    rows = {"score": scores, "paper": table["scores"]}
    if accuracy:
        found["accuracy"] = accuracy
        found["tau_with_accuracy"] = kendall_tau(ours, torch.tensor(accuracy))
        found["papers_tau_with_accuracy"] = kendall_tau(theirs, torch.tensor(table["accuracy"]))
        rows |= {"transfer accuracy": accuracy, "paper's": table["accuracy"]}
    print(f"\n{title}, target {table['target']}\n\n| | {' | '.join(table['networks'])} |")
    print("|---|" + "---|" * len(table["networks"]))
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    print(
        "\n" + ", ".join(f"{key} {value:.3f}" for key, value in found.items() if isinstance(value, float)), flush=True
    )
    return found


def input_scores(data: Images) -> dict[str, float]:
    """L0: the raw images of the MNIST target, by formula."""
    images, labels = data.part("M04", "test")
    pixels = images.flatten(1).double()
    reduced = principal_components(pixels, 10)
    return {
        "standard": silhouette(reduced, labels), "centroid": silhouette(reduced, labels, variant="centroid"),
        "standard without PCA": silhouette(pixels, labels),
    }  # fmt: skip


def halving(networks: dict[str, nn.Module], data: tuple[Tensor, Tensor], seed: int) -> dict[str, Any]:
    """Does successive halving find the best of all networks, and at what share of the evaluations?"""
    found, whole = successive_halving(networks, data, seed=seed), leaderboard(networks, data, scorers=["neuralrank"])
    names = [row.name for row in whole.rows]
    return {
        "share": found.share,
        "best": found.order[0],
        "best_of_all": names[0],
        "place": names.index(found.order[0]) + 1,
    }


def by_dimension(cached: Any) -> dict[str, dict[str, float]]:
    """Figure 2: the scores of table 2's networks by the number of components."""
    found: dict[str, dict[str, float]] = {}
    for name in NINE:
        seen, labels = cached(name, "M04", "test")
        reduced = principal_components(seen, max(DIMENSIONS))
        found[name] = {str(count): silhouette(reduced[:, :count], labels) for count in DIMENSIONS}
    return found


def figure(scores: dict[str, dict[str, float]], path: Path) -> None:
    drawing = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    for number, (name, values) in enumerate(scores.items()):
        style = ("-", "--", ":")[number % 3]
        colour = ("#0072B2", "#D55E00", "#009E73")[number // 3]
        axes.plot([int(count) for count in values], list(values.values()), style, color=colour, label=name)
    axes.set(xlabel="principal components", ylabel="neuralRank score, MNIST 0-4")
    axes.legend(frameon=False, ncols=3, fontsize=8)
    drawing.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
