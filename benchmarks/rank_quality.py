"""Which scorer orders networks best? All of them over three repositories: weighted Kendall tau, regret, cost.

    MOLE_DATA=... python benchmarks/rank_quality.py --paper runs/neuralrank --generators runs/digits ...

Repositories: the paper's zoo (made by `benchmarks/neuralrank.py`; truth: transfer accuracy of a new last layer), a
population of digits and one of MNIST networks of mixed width, depth and training length (truth: test accuracy), and
networks generated for many losses (truth: test accuracy). Scorers read labelled examples that no truth is measured on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from neuralrank_networks import CONFIG, NINE, TINY, Images, Settings, features, trained, transfer_accuracy
from torch import Tensor, nn

import mole
from mole.checkpoints import train_population
from mole.config import TaskConfig
from mole.config.sections import TaskName
from mole.errors import MoleError
from mole.rank import REGISTRY, Evidence, Scorer, mean_rank, regret, see, weighted_tau, with_the_others
from mole.seeding import derived
from mole.tasks import labelled, load_task

EXAMPLES = 300
"""Labelled examples that scorers read."""
ENSEMBLES = {
    "mean_rank": ["neuralrank", "class_mean", "h_score_shrunk", "knn", "logme", "ridge"],
    "mean_rank, no labels": ["mutual_information", "kmeans", "coding_rate"],
}
"""What they are the mean rank of."""

LENGTHS: dict[TaskName, tuple[int, ...]] = {"digits": (20, 60, 200, 600), "mnist": (20, 60, 200, 600)}
"""Optimiser steps of the mixed populations."""

Case = tuple[str, dict[str, nn.Module], tuple[Tensor, Tensor], Tensor]
"""Name of the repository, networks, labelled examples, truth (N,)."""


def paper(folder: Path, seed: int, *, tiny: bool) -> Iterator[Case]:
    """The nine networks and the nine of one convolution, for two targets."""
    data, settings = Images(tiny=tiny), TINY if tiny else Settings.read(CONFIG)
    names = [*NINE, *(f"{name}-lite" for name in NINE)]
    networks: dict[str, nn.Module] = {name: trained(name, data, folder / "networks", settings) for name in names}
    for target in ("M04", "F04"):
        images, labels = data.part(target, "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(derived("examples", seed)))
        count = min(EXAMPLES, len(order) // 2)
        scored, fitted = order[:count], order[count : count + 2000]
        tests = data.part(target, "test")
        truth = []
        for network in networks.values():
            train = features(network, images[fitted]), labels[fitted]
            test = features(network, tests[0][:2000]), tests[1][:2000]
            truth.append(transfer_accuracy(train, test, settings, seed))
        yield f"paper's zoo, {target}", networks, (images[scored], labels[scored]), torch.tensor(truth)


def population(name: TaskName, seed: int, *, tiny: bool) -> Iterator[Case]:
    """Networks of three widths, two depths and several lengths of training, two of each kind."""
    task = labelled(load_task(TaskConfig(name=name)))
    networks: dict[str, nn.Module] = {}
    truth: list[float] = []
    for width in (4, 16, 48):
        for depth in (1, 2):
            for steps in (20,) if tiny else LENGTHS[name]:
                config = TaskConfig(name=name, width=width, depth=depth, steps=steps)
                own = task.with_config(config)
                seeds = [derived(f"population {width} {depth} {steps}", 2 * seed + copy) for copy in (0, 1)]
                weights = train_population(own, seeds, [steps]).weights
                truth += own.measure(weights, "test")["accuracy"].tolist()
                for number, flat in enumerate(weights):
                    network = own.architecture.build(0)
                    network.load_state_dict(own.spec.unflatten(flat))
                    networks[f"{width}x{depth} {steps} {number}"] = network
    data = task.prompt.images[:EXAMPLES], task.prompt.labels[:EXAMPLES]
    yield f"{name}, mixed", networks, data, torch.tensor(truth)


def generated(folder: Path, seed: int) -> Iterator[Case]:
    """Networks from fresh starts: for losses from the zoo's best to three times that, and all for the best."""
    generator = mole.load(folder)
    task = labelled(generator.task)
    best = generator.card.ranges["loss"][0]
    for name, losses in (
        ("generated, many losses", torch.linspace(1, 3, 48) * best),
        ("generated, one loss", [best] * 48),
    ):
        samples = [generator.sample(target_loss=float(loss), seed=48 * seed + i)[0] for i, loss in enumerate(losses)]
        networks = {str(number): sample.module() for number, sample in enumerate(samples)}
        truth = task.measure(torch.stack([sample.flat for sample in samples]), "test")["accuracy"]
        yield name, networks, (task.prompt.images, task.prompt.labels), truth


def value(scorer: Scorer, evidence: Evidence) -> float:
    """The score, or NaN where it cannot be had: of a network whose features do not vary, say."""
    try:
        return scorer(evidence)
    except MoleError:
        return float("nan")


def judge(case: Case, seed: int) -> dict[str, dict[str, float]]:
    """Every scorer on one repository."""
    _, networks, (inputs, labels), truth = case
    seen = [see(network, inputs.split(256)) for network in networks.values()]
    evidences = [Evidence(next(iter(s.features.values())), s.outputs, classes=labels, seed=seed) for s in seen]
    scores, found = {}, {}
    for name, scorer in REGISTRY.items():
        if case[0].startswith("paper") and "own classes" in scorer.needs:
            continue  # most of these networks were trained for other classes
        began = time.perf_counter()
        values = torch.tensor([value(scorer, evidence) for evidence in evidences], dtype=torch.float64)
        values = values.nan_to_num(nan=float(values.nan_to_num(nan=torch.inf).min()) - 1)  # last
        scores[name] = values
        found[name] = {"seconds": (time.perf_counter() - began) / len(evidences)}
    for name, parts in ENSEMBLES.items():
        scores[name] = mean_rank(torch.stack([scores[part] for part in parts]))
        found[name] = {"seconds": sum(found[part]["seconds"] for part in parts)}
    if len({s.outputs.shape[1] for s in seen}) == 1:  # answers of one kind
        scores["agreement"] = with_the_others(torch.stack([s.outputs.argmax(1) for s in seen]))
        found["agreement"] = {"seconds": 0.0}
    for name, values in scores.items():
        found[name] |= {"tau": weighted_tau(values, truth), "regret": regret(values, truth)}
    found["random"] = {"tau": 0.0, "regret": float(truth.max() - truth.mean()), "seconds": 0.0}
    return found


def figure(table: dict[str, dict[str, list[float]]], repositories: list[str], path: Path) -> None:
    drawing = Figure(figsize=(7.6, 6.4), layout="constrained")
    FigureCanvasAgg(drawing)
    axes, colours = drawing.add_subplot(), ["#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7"]
    for repository, colour in zip(repositories, colours, strict=False):
        for place, values in enumerate(table.values()):
            points = values.get(repository, [])
            label = repository if place == 0 else None
            axes.plot(points, [place] * len(points), "o", color=colour, alpha=0.7, markersize=5, label=label)
    axes.set_yticks(range(len(table)), list(table))
    axes.invert_yaxis()
    axes.axvline(0, color="0.6", linestyle=":")
    axes.set(xlabel="weighted Kendall tau with the truth, one point per seed")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    drawing.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=Path, help="folder of benchmarks/neuralrank.py; left out: not judged")
    parser.add_argument("--generators", type=Path, nargs="*", default=[], help="run folders, one per seed")
    parser.add_argument("--out", type=Path, default=Path("runs/rank_quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small repositories, to try the way")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    repositories: list[str] = []
    for seed in range(given.seeds):
        cases = [case for name in LENGTHS for case in population(name, seed, tiny=given.tiny)]
        cases += [*paper(given.paper, seed, tiny=given.tiny)] if given.paper else []
        cases += [*generated(given.generators[seed % len(given.generators)], seed)] if given.generators else []
        repositories = [case[0] for case in cases]
        for case in cases:
            for name, values in judge(case, seed).items():
                results.setdefault(name, {}).setdefault(case[0], []).append(values)
            print(f"seed {seed}: {case[0]}, {len(case[1])} networks", flush=True)

    def mean(name: str, key: str) -> float:
        return statistics.mean(statistics.mean(v[key] for v in values) for values in results[name].values())

    everywhere = [name for name in results if len(results[name]) == len(repositories)]
    order = sorted(results, key=lambda name: (name not in everywhere, -mean(name, "tau")))
    print(f"\n| scorer | {' | '.join(repositories)} | mean tau | mean regret | ms a network |")
    print("|---|" + "---|" * (len(repositories) + 3))
    for name in order:
        cells = []
        for repository in repositories:
            values = [v["tau"] for v in results[name].get(repository, [])]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-")
        last = f"{mean(name, 'tau'):.3f} | {mean(name, 'regret'):.4f} | {1000 * mean(name, 'seconds'):.1f}"
        print(f"| {name} | {' | '.join(cells)} | {last} |")
    taus = {name: {r: [v["tau"] for v in results[name].get(r, [])] for r in repositories} for name in order}
    figure(taus, repositories, given.out / "rank_quality.png")
    print(json.dumps({"benchmark": "rank_quality", "seeds": given.seeds, "examples": EXAMPLES, "results": results}))


if __name__ == "__main__":
    main()
