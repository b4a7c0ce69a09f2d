"""Different parts to play for tokens that nothing tells apart.

Which neuron of a start becomes which feature of the trained network is nearly arbitrary, but no two may become the same
one. Tokens without a position would have to agree on that by attention alone; here each has the role of its rank.

Dimensions: B networks, T tokens, R roles, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Roles(nn.Module):
    """Tells every token its rank among the tokens of its kind.

    Permuting tokens permutes their ranks: they have no position but the one that their weights give them. Where there
    are fewer tokens than roles, they spread over them; where there are more, neighbours share one.
    """

    def __init__(self, roles: int, width: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(roles, width))

    def forward(self, ranks: Tensor) -> Tensor:
        """(B, T, D) for ranks (B, T)."""
        index = (2 * ranks + 1) * len(self.values) // (2 * ranks.shape[-1])
        return F.embedding(index, self.values)  # whose gradient is summed in one order, whatever the threads


def ranks(numbers: Tensor, others: Tensor) -> Tensor:
    """Of each number (..., T) among its T, from 0; equal numbers are ranked by others (..., T)."""
    order = others.argsort(-1)
    order = order.gather(-1, numbers.gather(-1, order).argsort(dim=-1, stable=True))
    return order.argsort(-1)
