"""The corridor: one file per stage, and the run that walks through them."""

from mole.pipeline.runner import run

__all__ = ["run"]
