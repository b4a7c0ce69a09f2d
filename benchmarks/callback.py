"""Callback: what `mole.Harvest` adds to the time of a small Lightning training.

Both sides train the same 64-16-10 network on the digits for 2,000 steps of 128 images, in turns; ours keeps a state
every 50 steps and at every validation.

    python benchmarks/callback.py
"""

import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import mole
from mole.config import TaskConfig
from mole.tasks import Architecture, Classification, load_task

STEPS, ROUNDS, EVERY = 2_000, 9, 50


class Small(L.LightningModule):
    """A network of the size that populations are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Architecture(kind="mlp", widths=[64, 16, 10]).build(0)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.log("val/loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.001)


def train(task: Classification, callbacks: list[L.Callback]) -> float:
    """Seconds of one training, its set-up included."""
    images, held = (TensorDataset(split.images, split.labels) for split in (task.train, task.prompt))
    training = DataLoader(images, batch_size=128, shuffle=True, drop_last=True)
    validation = DataLoader(held, batch_size=300)
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, check_val_every_n_epoch=20, callbacks=callbacks,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(Small(), training, validation)
    return time.perf_counter() - began


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = load_task(TaskConfig(name="digits"))
    assert isinstance(task, Classification)
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    with tempfile.TemporaryDirectory() as folder:
        train(task, [])
        for number in range(ROUNDS):
            harvest = mole.Harvest(Path(folder) / "zoo", "val/loss", every_n_steps=EVERY, run=f"r{number}")
            sides = [("baseline", []), ("ours", [harvest])]
            for side, callbacks in sides if number % 2 else sides[::-1]:
                seconds[side].append(train(task, callbacks))
        kept = len(mole.Zoo(Path(folder) / "zoo")) // ROUNDS
    ours, baseline = (statistics.median(seconds[side]) for side in ("ours", "baseline"))
    pairs = [o / b - 1 for o, b in zip(seconds["ours"], seconds["baseline"], strict=True)]
    details = {"steps": STEPS, "every_n_steps": EVERY, "checkpoints": kept, "rounds": ROUNDS, "overheads": pairs}
    result = {
        "name": "callback", "ratio": ours / baseline, "overhead": statistics.median(pairs), "ours": ours,
        "baseline": baseline, "unit": "seconds per training", "details": details,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
