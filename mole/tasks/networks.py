"""The families of small networks, described by values and built from a seed."""

from itertools import pairwise
from math import sqrt
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mole.seeding import Seeded

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "selu": nn.SELU,
}  # fmt: skip


KINDS = ("mlp", "convnet", "policy")


class Architecture(BaseModel):
    """One network family.

    Example:
        >>> Architecture(kind="mlp", widths=[64, 16, 10]).build(seed=0)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["mlp", "convnet", "policy"]
    widths: Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=2, max_length=64)]
    """From input to output: numbers of an MLP or policy, channels of a convnet."""
    activation: str = "relu"

    def build(self, seed: int) -> nn.Module:
        """A freshly initialised network; the caller's random state is left as it was."""
        with Seeded(seed):
            return {"mlp": mlp, "convnet": convnet, "policy": Policy}[self.kind](self.widths, self.activation)

    @property
    def parameters(self) -> int:
        """Numbers of one network, known without building it."""
        pairs = list(pairwise(self.widths))
        if self.kind == "convnet":
            return sum(9 * inputs * outputs for inputs, outputs in pairs[:-1]) + (self.widths[-2] + 1) * self.widths[-1]
        return sum((inputs + 1) * outputs for inputs, outputs in pairs) + (
            self.widths[-1] if self.kind == "policy" else 0
        )


def mlp(widths: list[int], activation: str) -> nn.Sequential:
    """Linear layers with an activation between, in PyTorch's default initialisation."""
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        parts += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*parts[:-1])


def convnet(widths: list[int], activation: str) -> nn.Sequential:
    """3x3 convolutions without bias, the first with stride 2, mean over the image, one linear layer.

    Source: Peebles et al. 2022, the CIFAR-10 network (widths 3, 16, 32, 10).
    """
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        stride = 1 if parts else 2
        parts += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), ACTIVATIONS[activation]()]
    return nn.Sequential(*parts, ImageMean(), nn.Linear(widths[-2], widths[-1]))


class ImageMean(nn.Module):
    """Mean of every channel over the image."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C)."""
        return images.mean((2, 3))


class Policy(nn.Module):
    """A Gaussian policy: mean actions from an MLP, one log standard deviation per action.

    Orthogonal initialisation, gain sqrt(2), 0.01 for the last layer. Source: Peebles et al. 2022.
    """

    def __init__(self, widths: list[int], activation: str) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(widths[-1]))
        self.actor = orthogonal(mlp(widths, activation), last_gain=0.01)

    def forward(self, observations: Tensor) -> Tensor:
        return self.actor(observations)


def orthogonal(network: nn.Sequential, last_gain: float) -> nn.Sequential:
    """The same network with orthogonal weights of gain sqrt(2), and of `last_gain` in its last layer."""
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=last_gain if layer is layers[-1] else sqrt(2))
    return network
