"""From a task's configuration to the task."""

from mole.config import TaskConfig
from mole.tasks import digits, openml
from mole.tasks.task import Task


def load_task(config: TaskConfig) -> Task:
    """Load the data of a task.

    Raises:
        MoleError: the data are neither on this machine nor to be had from the network.
    """
    if config.name == "digits":
        return digits.load(config)
    return openml.load(config)
