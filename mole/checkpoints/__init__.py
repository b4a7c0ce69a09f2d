"""Checkpoint histories: populations trained as one computation, and the zoo that keeps them."""

from mole.checkpoints.population import kept_steps, train_population
from mole.checkpoints.zoo import Zoo, ZooWriter

__all__ = ["Zoo", "ZooWriter", "kept_steps", "train_population"]
