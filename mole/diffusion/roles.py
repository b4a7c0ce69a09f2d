"""Different parts to play for tokens that nothing tells apart.

Which neuron of a start becomes which feature of the trained network is nearly arbitrary, but no two may become the same
one. Tokens without a position would have to agree on that by attention alone; here they are assigned.

Dimensions: B networks, T tokens, R roles, D width.
"""

from math import log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDS = 20
SHARPNESS = 10.0
"""How decided the assignment is before training."""


class Roles(nn.Module):
    """Adds to every token the role that it is given, by optimal transport from what it has read.

    Every token has one role, in shares where it is not clear which; no role is given to more than max(1, T / R)
    tokens, nearly: after `ROUNDS` of scaling in turns (Sinkhorn; Cuturi 2013, for upper bounds Benamou et al. 2015).
    Permuting tokens permutes their roles.
    """

    def __init__(self, roles: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(roles, width))
        self.values = nn.Parameter(torch.randn(roles, width))
        self.ask = nn.Linear(width, width, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(log(SHARPNESS)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) of tokens (B, T, D)."""
        return x + self.assigned(x) @ self.values

    def assigned(self, x: Tensor) -> Tensor:
        """Shares (B, T, R) of every role in every token; sums over R are 1, and over T nearly at most max(1, T / R)."""
        width = x.shape[-1]
        scores = self.ask(F.layer_norm(x, (width,))) @ self.keys.T * (self.sharpness.exp() / sqrt(width))
        most = log(max(1.0, x.shape[1] / len(self.keys)))
        price = scores.new_zeros(())  # (B, 1, R): of roles that too many want
        for _ in range(ROUNDS):
            shares = scores + price - (scores + price).logsumexp(-1, keepdim=True)
            price = (most + price - shares.logsumexp(1, keepdim=True)).clamp_max(0)
        return (scores + price).softmax(-1)
