"""What a network makes of its inputs, before its last linear layer.

Dimensions: n images, D features.
"""

import torch
from torch import Tensor, nn

from mole.errors import MoleError


@torch.no_grad()
def hidden_features(network: nn.Module, images: Tensor) -> Tensor:
    """Inputs of the last linear layer, (n, D): the last hidden layer's outputs.

    Raises:
        MoleError: the network has no linear layer.
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise MoleError(f"{type(network).__name__} has no linear layer to take features from")
    caught: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].flatten(1)))
    try:
        network.eval()(images)
    finally:
        hook.remove()
    return caught[-1]


def principal_components(features: Tensor, count: int) -> Tensor:
    """Projections (n, count) on the first principal components, centred; `count` 0 returns the features."""
    if count == 0:
        return features
    centred = features.double() - features.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :count] * s[:count]
