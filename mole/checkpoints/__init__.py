"""Checkpoint histories: populations trained as one computation, and the zoo that keeps them."""

from mole.checkpoints.format import Header, verify
from mole.checkpoints.importing import ImportReport, import_checkpoints
from mole.checkpoints.population import History, train_population
from mole.checkpoints.schedules import AtRandom, AtSteps, ByLoss, kept_steps
from mole.checkpoints.writer import ZooWriter
from mole.checkpoints.zoo import Checkpoint, Zoo

__all__ = [
    "AtRandom",
    "AtSteps",
    "ByLoss",
    "Checkpoint",
    "Header",
    "History",
    "ImportReport",
    "Zoo",
    "ZooWriter",
    "import_checkpoints",
    "kept_steps",
    "train_population",
    "verify",
]
