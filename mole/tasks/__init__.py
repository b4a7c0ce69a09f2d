"""What small networks learn: data in three splits, a network family and a training recipe."""

from mole.tasks.registry import load_task
from mole.tasks.task import Metrics, Split, Task

__all__ = ["Metrics", "Split", "Task", "load_task"]
