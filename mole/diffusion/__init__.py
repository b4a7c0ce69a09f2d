"""The conditional diffusion transformer: it draws the weights of a network in one evaluation."""

from mole.diffusion.generator import Generator, load
from mole.diffusion.samples import Sample, Samples

__all__ = ["Generator", "Sample", "Samples", "load"]
