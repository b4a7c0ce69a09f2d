"""The silhouette in linear time against scikit-learn, at a million points, and 256 networks ranked: figures as JSON.

python benchmarks/rank.py
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.metrics import silhouette_score

from mole.config import TaskConfig
from mole.rank import leaderboard, silhouette
from mole.tasks import labelled, load_task


def best_of(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest run, and what it gave."""
    found, fastest = None, float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        found = work()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest, found


def points(count: int, features: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    means = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    return means[labels] + torch.randn(count, features, generator=generator, dtype=torch.float64), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    result: dict[str, Any] = {"benchmark": "rank", "seed": seed, "threads": torch.get_num_threads()}
    x, y = points(10_000, 10, 10, seed)
    for metric in ("cosine", "sqeuclidean"):
        ours, mine = best_of(5, lambda metric=metric: silhouette(x, y, metric=metric))
        theirs, expected = best_of(1, lambda metric=metric: silhouette_score(x.numpy(), y.numpy(), metric=metric))
        result[metric] = {
            "points": 10_000, "seconds": ours, "scikit_learn_seconds": theirs, "times_as_fast": theirs / ours,
            "difference": abs(mine - expected),
        }  # fmt: skip
    x, y = points(1_000_000, 10, 10, seed)
    result["million_points_seconds"] = best_of(1, lambda: silhouette(x, y))[0]
    result["million_points_centroid_seconds"] = best_of(1, lambda: silhouette(x, y, variant="centroid"))[0]
    task = labelled(load_task(TaskConfig(name="digits")))
    networks = {str(number): task.architecture.build(number) for number in range(256)}
    data = task.prompt.images, task.prompt.labels
    names = ["neuralrank", "class_mean", "h_score_shrunk", "minus_loss"]
    result["networks_256_seconds"] = best_of(1, lambda: leaderboard(networks, data, scorers=names))[0]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
