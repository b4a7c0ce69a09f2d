"""What further processes of `torchrun` do: nothing but their part of the training.

The first process does everything else; it alone writes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mole.config import Config
from mole.pipeline.current import Run
from mole.pipeline.runner import choose_device
from mole.pipeline.train import learn
from mole.reporting import Advance
from mole.stages import RunFolder, StageName, decide, unmet
from mole.tracking import Tracker

WAIT = 0.5
"""Seconds between two looks whether the harvest is done."""


class Silence:
    """Reports nothing."""

    def say(self, line: str) -> None:
        return

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        yield lambda done, note="": None


def assist(config: Config, root: Path, stages: tuple[StageName, ...], *, redo: bool = False) -> None:
    """Wait for the harvest, then take part in the training, if there is one."""
    folder = RunFolder(root)
    if "train" not in stages:
        return
    while unmet(config, folder, ("train",)):
        time.sleep(WAIT)
    if not decide(config, folder, "train", redo=redo).run:
        return
    tracking = config.tracking.model_copy(update={"mode": "disabled"})
    tracker = Tracker(tracking, name=config.name, folder=root, settings={})
    learn(Run(config, folder, Silence(), tracker, choose_device(config)), first=False)
