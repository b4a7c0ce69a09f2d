"""MOLE: Model Optimization from Learning Examples. Generative meta-learning on checkpoint histories.

Importing this package imports no torch; the names below load what they need when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mole.checkpoints import Zoo, import_checkpoints, train_population
    from mole.checkpoints.callback import Harvest
    from mole.diffusion import Generator, Sample, Samples, load
    from mole.errors import ConfigError, CorruptFileError, MoleError, PromptWarning, VectorisationWarning
    from mole.rank import leaderboard, silhouette
    from mole.representations import WeightSpec
    from mole.tasks import Task, load_task

__version__ = "0.1.0"

_HOMES = {
    "load": "mole.diffusion",
    "Generator": "mole.diffusion",
    "Sample": "mole.diffusion",
    "Samples": "mole.diffusion",
    "Zoo": "mole.checkpoints",
    "Harvest": "mole.checkpoints.callback",
    "import_checkpoints": "mole.checkpoints",
    "train_population": "mole.checkpoints",
    "WeightSpec": "mole.representations",
    "Task": "mole.tasks",
    "load_task": "mole.tasks",
    "leaderboard": "mole.rank",
    "silhouette": "mole.rank",
    "MoleError": "mole.errors",
    "ConfigError": "mole.errors",
    "CorruptFileError": "mole.errors",
    "PromptWarning": "mole.errors",
    "VectorisationWarning": "mole.errors",
}

__all__ = [
    "ConfigError",
    "CorruptFileError",
    "Generator",
    "Harvest",
    "MoleError",
    "PromptWarning",
    "Sample",
    "Samples",
    "Task",
    "VectorisationWarning",
    "WeightSpec",
    "Zoo",
    "import_checkpoints",
    "leaderboard",
    "load",
    "load_task",
    "silhouette",
    "train_population",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mole' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
