"""What a network is: its weights as one flat vector, what is interchangeable in it, and views."""

from mole.representations.groups import AxisGroup, Element
from mole.representations.normalise import EntryScale
from mole.representations.spec import Entry, WeightSpec, WeightState, differences, weights_digest
from mole.representations.structure import graph_view, make_view, neuron_view
from mole.representations.views import Tokens, View, ViewName, chunk_view, flat_view

__all__ = [
    "AxisGroup",
    "Element",
    "Entry",
    "EntryScale",
    "Tokens",
    "View",
    "ViewName",
    "WeightSpec",
    "WeightState",
    "chunk_view",
    "differences",
    "flat_view",
    "graph_view",
    "make_view",
    "neuron_view",
    "weights_digest",
]
