"""Zoo: random batches against `numpy.memmap` on the same file, and opening a zoo of a million checkpoints.

Both sides read the same random rows of one shard of 100,000 networks of 1,210 parameters (484 MB), in turns, with
the file in the page cache; seconds are per batch of 256. The second line is the zoo of a million checkpoints.

    python benchmarks/zoo.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mole.checkpoints import Header, Zoo, ZooWriter
from mole.representations import WeightSpec

ROWS, PARAMETERS, BATCH, BATCHES, ROUNDS = 100_000, 1_210, 256, 300, 7
HEADER = Header("loss", "float32", {})


def fill(folder: Path, shards: int, rows: int, parameters: int) -> None:
    """Shards of `rows` checkpoints, 30 per run."""
    spec = WeightSpec.of_state({"weight": torch.zeros(parameters)})
    with ZooWriter(folder, HEADER, "bench") as writer:
        for shard in range(shards):
            weights = torch.randn(rows, parameters)
            place = torch.arange(rows) + shard * rows
            columns = {
                "run": [f"{run:07d}" for run in (place // 30).tolist()], "step": place % 30, "seed": place // 30,
                "loss": weights[:, 0].abs(), "accuracy": weights[:, 1],
            }  # fmt: skip
            writer.write(f"bench-{shard:05d}", spec, weights, columns)


def random_batches(folder: Path) -> dict[str, object]:
    fill(folder, 1, ROWS, PARAMETERS)
    zoo, path = Zoo(folder), folder / "shards" / "bench-00000.safetensors"
    offset = path.stat().st_size - ROWS * PARAMETERS * 4
    mapped = np.memmap(path, np.float32, "r", offset, (ROWS, PARAMETERS))
    assert np.array_equal(mapped[7], zoo.read([7])[0].numpy())
    _ = mapped.sum()  # into the page cache
    batches, draw = zoo.batches(BATCH, seed=0), torch.Generator().manual_seed(0)

    def ours() -> None:
        next(batches)

    def theirs() -> None:
        torch.from_numpy(mapped[torch.randint(ROWS, (BATCH,), generator=draw).numpy()])

    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    for _ in range(ROUNDS):
        for side, read in (("ours", ours), ("baseline", theirs)):
            began = time.perf_counter()
            for _ in range(BATCHES):
                read()
            seconds[side].append((time.perf_counter() - began) / BATCHES)
    ours_median, baseline_median = (statistics.median(seconds[side]) for side in ("ours", "baseline"))
    details = {
        "batch": BATCH, "megabytes_per_second": BATCH * PARAMETERS * 4 / ours_median / 1e6,
        "ratios": [b / o for o, b in zip(seconds["ours"], seconds["baseline"], strict=True)],
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    return {
        "name": "zoo-random-batches", "ratio": baseline_median / ours_median, "ours": ours_median,
        "baseline": baseline_median, "unit": "seconds per batch", "details": details,
    }  # fmt: skip


WATCHED = """
import sys, time
from pathlib import Path
import torch
from mole.checkpoints import Zoo
def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
before, began = memory(), time.perf_counter()
zoo = Zoo(sys.argv[1])
seconds, opened = time.perf_counter() - began, memory()
batches = zoo.batches(256, seed=0)
for _ in range(200):
    next(batches)
print(seconds, opened - before, memory() - opened, len(zoo))
"""


def watched(folder: Path) -> dict[str, float]:
    """In a process of its own: seconds to open, bytes that the index takes, bytes that 200 batches add."""
    done = subprocess.run([sys.executable, "-c", WATCHED, str(folder)], capture_output=True, text=True, check=True)
    seconds, index, batches, count = map(float, done.stdout.split())
    return {"seconds": seconds, "index_bytes": index, "bytes_added_by_reading": batches, "checkpoints": count}


def million(folder: Path) -> dict[str, object]:
    fill(folder / "small", 1, 7_680, PARAMETERS)
    fill(folder / "wide", 12, 7_680, PARAMETERS)
    fill(folder / "many", 131, 7_680, 64)
    opened = [watched(folder / "many") for _ in range(5)]
    seconds = statistics.median(one["seconds"] for one in opened)
    details = {"many": opened[-1], "12_times_the_weights": watched(folder / "wide"), "small": watched(folder / "small")}
    return {"name": "zoo-open-1M", "ours": seconds, "unit": "seconds to open", "details": details}


def main() -> None:
    for benchmark in (random_batches, million):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(benchmark(Path(folder))), flush=True)


if __name__ == "__main__":
    main()
