"""What a network makes of its inputs: the outputs of any of its layers, and its own.

Dimensions: n examples, D features, C outputs.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole.errors import MoleError

LAST_HIDDEN = "last hidden"
"""What the last linear or convolutional layer reads."""

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Seen:
    """What one network made of the data."""

    features: dict[str, Tensor]
    """(n, D) float32 on the CPU, by layer."""
    outputs: Tensor
    """(n, C) float32 on the CPU."""


@torch.no_grad()
def see(
    network: nn.Module,
    batches: Iterable[Tensor],
    layers: Sequence[str | int] = (LAST_HIDDEN,),
    *,
    device: torch.device | str = "cpu",
    widest: int = 2**14,
) -> Seen:
    """Run a network over the data and keep the outputs of some layers, flattened.

    Args:
        network: any module; it is left on `device`, in evaluation mode.
        batches: inputs (b, ...) in parts.
        layers: names as in `named_modules`, places among the layers that compute (negative ones from the end), or
            `"last hidden"`.
        device: where to run.
        widest: layers with more features per example are averaged over their positions, and beyond that refused.

    Raises:
        MoleError: a layer is not there (the nearest names are given), gives no tensor, or gives NaN; or the network
            does not take the data (both shapes are given).
    """
    places = {layer: find_layer(network, layer) for layer in layers}
    caught: dict[str, list[Tensor]] = {str(layer): [] for layer in layers}
    outputs: list[Tensor] = []
    hooks = [_hook(network, name, caught[str(layer)], before, widest) for layer, (name, before) in places.items()]
    was = network.training
    network.eval().to(device)
    try:
        for batch in batches:
            before = {layer: len(parts) for layer, parts in caught.items()}
            try:
                found = network(batch.to(device))
            except (RuntimeError, ValueError, IndexError) as error:
                raise MoleError(
                    f"{type(network).__name__} does not take {tuple(batch.shape)}: {str(error).splitlines()[0]}"
                ) from None
            for layer, parts in caught.items():
                if len(parts) == before[layer]:
                    raise MoleError(f"layer {layer} was not run")
                del parts[before[layer] + 1 :]  # a layer that runs twice counts once
            outputs.append(tensor_of(found).flatten(1).float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
        network.train(was)
    seen = Seen({layer: torch.cat(parts) for layer, parts in caught.items()}, torch.cat(outputs))
    for layer, features in seen.features.items():
        if not features.isfinite().all():
            raise MoleError(f"layer {layer} is NaN or infinite for {int((~features.isfinite().all(1)).sum())} examples")
    return seen


def tensor_of(found: Any) -> Tensor:
    """The tensor in what a module returned: itself, `logits` or the first tensor of several.

    Raises:
        MoleError: there is none.
    """
    if isinstance(found, Tensor):
        return found
    if isinstance(logits := getattr(found, "logits", None), Tensor):
        return logits
    values = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list | tuple) else []
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise MoleError(f"a network returned {type(found).__name__}; legal is a tensor, or several of which one is first")


def layer_names(network: nn.Module) -> list[str]:
    """Every layer that computes by itself, in order of definition."""
    return [name for name, module in network.named_modules() if name and not list(module.children())]


def find_layer(network: nn.Module, layer: str | int) -> tuple[str, bool]:
    """Name of a module, and whether its input is meant.

    Raises:
        MoleError: there is none of that name; the nearest names are given.
    """
    leaves, everything = layer_names(network), dict(network.named_modules())
    kind = type(network).__name__
    if layer == LAST_HIDDEN:
        weighted = [
            name for name in leaves if isinstance(everything[name], nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ]
        if not weighted and not isinstance(network, nn.Linear):
            raise MoleError(f"{kind} has no linear layer to take features from; name a layer: {', '.join(leaves[-5:])}")
        return weighted[-1] if weighted else "", True
    if isinstance(layer, int):
        if not -len(leaves) <= layer < len(leaves):
            raise MoleError(
                f"layer {layer}: {kind} has {len(leaves)} layers; legal is {-len(leaves)} to {len(leaves) - 1}"
            )
        return leaves[layer], False
    if layer not in everything:
        near = difflib.get_close_matches(layer, everything, n=3, cutoff=0.3) or leaves[-3:]
        raise MoleError(f"layer {layer!r} is not in {kind}; nearest: {', '.join(near)}; or 'last hidden', or a place")
    return layer, False


def _hook(network: nn.Module, name: str, parts: list[Tensor], before: bool, widest: int) -> Any:
    def keep(found: Any) -> None:
        features = tensor_of(found)
        if features[0].numel() > widest and features.ndim > 2:  # channels first, or tokens by channels
            features = features.flatten(2).mean(2) if features.ndim > 3 else features.mean(1)
        if features[0].numel() > widest:
            raise MoleError(f"layer {name} has {features[0].numel():,} features; legal is at most {widest:,}")
        parts.append(features.flatten(1).float().cpu())

    module = network.get_submodule(name)
    if before:
        return module.register_forward_pre_hook(lambda _, inputs: keep(inputs))
    return module.register_forward_hook(lambda _, __, found: keep(found))


def hidden_features(network: nn.Module, images: Tensor) -> Tensor:
    """Inputs of the last linear or convolutional layer, (n, D): the last hidden layer's outputs.

    Raises:
        MoleError: the network has no such layer.
    """
    return see(network, [images]).features[LAST_HIDDEN]


def principal_components(features: Tensor, count: int) -> Tensor:
    """Projections (n, count) on the first principal components, centred; float64.

    `count` 0 returns the features as they are; fewer come back where there are no more. They come from the eigenvectors
    of whichever is smaller, the features' covariance or the examples' products.
    """
    if count == 0:
        return features
    centred = features.double() - features.double().mean(0)
    n, width = centred.shape
    if width <= n:
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        return centred @ vectors.flip(1)[:, :count]
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    return vectors.flip(1)[:, :count] * values.flip(0)[:count].clamp_min(0).sqrt()
