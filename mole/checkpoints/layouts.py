"""A zoo taken apart by what its networks are."""

from mole.checkpoints.zoo import Zoo
from mole.errors import MoleError
from mole.tasks import Task

VARIANTS = ("width", "depth", "activation")
"""Factors that decide what a network is."""


def variants(zoo: Zoo, task: Task) -> list[tuple[Zoo, Task]]:
    """A zoo by what its networks are, each with its task; that of the configuration comes first."""
    varied = [name for name in VARIANTS if name in zoo.columns]
    if not varied:
        return [(zoo, task)]
    rows = list(zip(*(zoo.column(name).tolist() for name in varied), strict=True))
    own = tuple(getattr(task.config, name) for name in varied)
    found = sorted(set(rows), key=lambda row: (row != own, str(row)))
    result = []
    for row in found:
        factors = dict(zip(varied, row, strict=True))
        result.append((zoo.filter(**factors), task.with_config(task.config.model_copy(update=factors))))
    return result


def own_part(zoo: Zoo, task: Task) -> Zoo:
    """The networks of a zoo that are what the task's configuration says.

    Raises:
        MoleError: there are none.
    """
    wanted = {name: getattr(task.config, name) for name in VARIANTS if name in zoo.columns}
    try:
        return zoo.filter(**wanted) if wanted else zoo
    except MoleError:
        what = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise MoleError(
            f"none of {zoo.runs} runs has networks of {what}; raise harvest.runs and heldout_runs"
        ) from None
