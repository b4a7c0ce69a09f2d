"""What several tests share: a small task, and one finished run of the tiny configuration."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from mole.checkpoints import train_population
from mole.checkpoints.zoo import Zoo
from mole.config import TaskConfig
from mole.tasks import Classification, Split, load_task

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "neuralrank.yaml"})
"""Of jobs; that one is a benchmark's."""
COMMANDS = ("zoo", "import", "rank")
"""Of `mole`, beside the main job."""

torch.set_num_threads(1)  # networks here are tiny: on a machine with other work, threads wait for each other


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws what it would draw alone."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> Classification:
    task = load_task(TaskConfig(name="digits", width=16, steps=20))
    assert isinstance(task, Classification)
    return task


@pytest.fixture(scope="session")
def toy() -> Classification:
    """Five numbers in, four hidden neurons, three classes; made-up data, for speed."""
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        labels = torch.arange(size) % 3
        images = torch.randn(size, 5, generator=generator) + labels[:, None].float()
        return Split(images, labels)

    return Classification(TaskConfig(width=4, batch_size=8, steps=12), split(33), split(18), split(15), classes=3)


@pytest.fixture(scope="session")
def toy_zoo(toy: Classification) -> Zoo:
    """Ten runs of the toy, states after 0, 4, 8 and 12 steps, in memory."""
    history = train_population(toy, range(10), [0, 4, 8, 12])
    columns = {
        "run": [f"{run:03d}" for run in history.runs.tolist()],
        "step": history.steps,
        "seed": history.runs,
        **toy.measure(history.weights, "prompt"),
    }
    return Zoo.of(toy.spec, columns, history.weights)


def run_command(
    *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `train.py`, another command of `mole`, or `code`, with these arguments in a process of its own."""
    others = arguments and arguments[0] in COMMANDS
    program: Sequence[str] = (
        ["-c", code] if code is not None else ["-m", "mole"] if others else [str(ROOT / "train.py")]
    )
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd, env={**os.environ, **(env or {})}, text=True, capture_output=True, timeout=600,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of configs/tiny.yaml."""
    folder = tmp_path_factory.mktemp("tiny")
    done = run_command("configs/tiny.yaml", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
