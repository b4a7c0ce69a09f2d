"""What generated networks have in common, learned weight by weight.

Layers that write weights from tokens share what they know between all neurons. A network with several layers of
interchangeable neurons has no mean that is one (each was trained into an order of its own), so that such layers would
have to learn one through everything they share, slowly. Here it has a place of its own.

Dimensions: B networks, T, S tokens of two kinds, W numbers of a token, E edges, K numbers of an edge, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.errors import MoleError
from mole.representations.views import Tokens, View

PACE = 30.0
"""How many times as fast its weights are learned as those of the transformer; normalised weights are of size 1."""


class CommonNetwork(nn.Module):
    """One network in the order of ranks, given to every start in the order of its own neurons.

    Permuting the neurons of a start permutes their ranks, and this with them. The conditions (noise level, losses)
    say how much of it there is, for every kind of nodes and edges; untrained it is nothing.

    Raises:
        MoleError: a rank does not say which of its tokens may take whose place.
    """

    def __init__(self, view: View, width: int) -> None:
        super().__init__()
        wrong = [kind.name for kind in view.nodes if not kind.ordered and (kind.nested or not kind.places.shape[1])]
        if wrong:
            raise MoleError(
                f"generator.common: {', '.join(wrong)} of these networks have no weights of their own, or lie within "
                "heads, so that their ranks do not order them; legal here is false"
            )
        self.values = nn.Parameter(torch.zeros(view.spec.size))
        self.share = nn.Linear(width, len(view.nodes) + len(view.edges))
        nn.init.zeros_(self.share.weight)
        nn.init.ones_(self.share.bias)

    def forward(self, view: View, ranks: Sequence[Tensor], c: Tensor) -> Tensor:
        """(B, P) for the ranks (B, T) of all kinds of nodes and conditions (B, D)."""
        own = view.encode(PACE * self.values[None])
        tables = [F.embedding(rank, nodes[0]) for rank, nodes in zip(ranks, own.nodes, strict=True)]
        for kind, edges in zip(view.edges, own.edges, strict=True):
            there, here = ranks[kind.source], ranks[kind.target]
            place = here[:, :, None] * there.shape[1] + there[:, None]  # (B, T, S)
            tables.append(F.embedding(place.flatten(1), edges[0]))
        shares = self.share(c)[:, :, None, None].unbind(1)
        tables = [share * table for share, table in zip(shares, tables, strict=True)]
        return view.decode(Tokens(tables[: len(view.nodes)], tables[len(view.nodes) :]))
