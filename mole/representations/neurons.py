"""One token per interchangeable neuron: its incoming weights, bias and outgoing weights together.

Everything that belongs to no such neuron (the bias of the output layer) forms one further token.
Tokens of one group carry no position, so a transformer over them is equivariant by construction.

Dimensions: N networks, P parameters, H neurons of a group, W numbers in a token.
"""

import torch
from torch import Tensor

from mole.errors import MoleError
from mole.representations.spec import WeightSpec


class NeuronView:
    """Integer index maps between the flat vector and neuron tokens; every scalar stands in one token.

    Raises:
        MoleError: a tensor runs over two groups (more than one hidden layer), or there is no group.

    Example:
        >>> view = NeuronView(WeightSpec.of(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))))
        >>> [tuple(index.shape) for index in view.indices]
        [(16, 75), (1, 10)]
    """

    def __init__(self, spec: WeightSpec) -> None:
        crossing = [e.name for e in spec.entries if len({g for g in e.axes if g is not None}) > 1]
        if crossing:
            raise MoleError(
                f"{', '.join(crossing)} joins two hidden layers; the neurons view serves networks of one hidden layer"
            )
        if not spec.groups:
            raise MoleError("the network has no interchangeable neurons; the neurons view needs a hidden layer")
        self.spec = spec
        self.indices = [self._tokens(group, size) for group, size in spec.groups.items()]
        rest = [torch.arange(e.offset, e.stop) for e in spec.entries if not any(e.axes)]
        if rest:
            self.indices.append(torch.cat(rest)[None])
        """Per kind of token the positions in the flat vector, (H, W) int64."""
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _tokens(self, group: str, size: int) -> Tensor:
        columns = []
        for entry in self.spec.entries:
            if group in entry.axes:
                positions = torch.arange(entry.offset, entry.stop).reshape(entry.shape)
                columns.append(positions.movedim(entry.axes.index(group), 0).reshape(size, -1))
        return torch.cat(columns, 1)

    def _maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Flat position of every token number, and the inverse; kept per device."""
        if device not in self._moved:
            order = torch.cat([index.flatten() for index in self.indices])
            self._moved[device] = (order.to(device), order.argsort().to(device))
        return self._moved[device]

    def encode(self, flat: Tensor) -> list[Tensor]:
        """Flat weights (N, P) as one tensor (N, H, W) per kind of token."""
        parts = flat.index_select(1, self._maps(flat.device)[0]).split([i.numel() for i in self.indices], 1)
        return [part.unflatten(1, index.shape) for part, index in zip(parts, self.indices, strict=True)]

    def decode(self, tokens: list[Tensor]) -> Tensor:
        """The exact inverse of `encode`."""
        joined = torch.cat([t.flatten(1) for t in tokens], 1)
        return joined.index_select(1, self._maps(joined.device)[1])
