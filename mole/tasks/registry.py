"""From a task's configuration to the task."""

from mole.config import TaskConfig
from mole.tasks import archives, cartpole, digits, tabular
from mole.tasks.task import Task

LOADERS = {
    "digits": digits.load, "mnist": archives.load, "fashion_mnist": archives.load, "cifar10": archives.load,
    "cartpole": cartpole.load, "iris": tabular.load, "wine": tabular.load, "breast_cancer": tabular.load,
}  # fmt: skip


def load_task(config: TaskConfig) -> Task:
    """Load a task, its data on the CPU.

    Raises:
        MoleError: the data are neither on this machine nor to be had from the network.
    """
    whole = config.model_copy(update={"labels": None})
    return LOADERS[config.name](whole).with_config(config)
