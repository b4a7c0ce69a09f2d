"""What a network is: its weights as one flat vector, what is interchangeable in it, and views."""

from mole.representations.neurons import NeuronView
from mole.representations.normalise import EntryScale
from mole.representations.spec import Entry, WeightSpec, differences, weights_digest
from mole.representations.symmetry import SymmetryError, check_groups, derive_groups

__all__ = [
    "Entry",
    "EntryScale",
    "NeuronView",
    "SymmetryError",
    "WeightSpec",
    "check_groups",
    "derive_groups",
    "differences",
    "weights_digest",
]
