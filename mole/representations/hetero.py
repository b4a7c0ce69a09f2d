"""The parameter graph as `torch_geometric.data.HeteroData`, and back.

Dimensions: P parameters, E edges of a kind, K numbers of an edge.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mole.representations.views import View

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData


def to_hetero(view: View, flat: Tensor) -> "HeteroData":
    """The graph of one network.

    Args:
        view: of `graph_view`.
        flat: (P,).

    Returns:
        Per kind of nodes `num_nodes`, and `ordered`: whether each node is itself. Per kind of edges `edge_index`
        (2, E), `edge_attr` (E, K), and `flat_index` (E, K): where each number lies in the flat vector.
    """
    from torch_geometric.data import HeteroData

    data = HeteroData()
    for kind in view.nodes:
        data[kind.name].num_nodes = len(kind.places)
        data[kind.name].x = torch.ones(len(kind.places), 1)
        data[kind.name].ordered = kind.ordered
    for number, kind in enumerate(view.edges):
        name = view.nodes[kind.source].name, f"{kind.name} {number}", view.nodes[kind.target].name
        data[name].edge_index = kind.ends
        data[name].edge_attr = flat[kind.places]
        data[name].flat_index = kind.places
    return data


def from_hetero(data: "HeteroData", size: int) -> Tensor:
    """The flat vector (P,) of a graph: every number is scattered to where it belongs."""
    kinds = [data[kind] for kind in data.edge_types]
    flat = torch.zeros(size, dtype=next((kind.edge_attr.dtype for kind in kinds), torch.float32))
    for kind in kinds:
        flat[kind.flat_index.flatten()] = kind.edge_attr.flatten()
    return flat
