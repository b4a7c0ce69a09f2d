"""What small networks learn: data in three splits, a network family, a training recipe and metrics."""

from mole.tasks.networks import Architecture
from mole.tasks.registry import load_task
from mole.tasks.supervised import Classification, Split, labelled
from mole.tasks.task import Comparison, Feed, Metrics, SplitName, Task, energy_score

__all__ = [
    "Architecture", "Classification", "Comparison", "Feed", "Metrics", "Split", "SplitName", "Task",
    "energy_score", "labelled", "load_task",
]  # fmt: skip
