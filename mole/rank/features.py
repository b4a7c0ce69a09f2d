"""What a network makes of its inputs: the outputs of any of its layers, and its own.

Dimensions: n examples, D features, C outputs.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mole.errors import MoleError

LAST_HIDDEN = "last hidden"
"""What the linear or convolutional layer reads that runs last."""

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Seen:
    """What one network made of the data."""

    features: dict[str, Tensor]
    """(n, D) float32 on the CPU, by layer."""
    outputs: Tensor
    """(n, C) float32 on the CPU; no columns where a network returns several tensors, none of them named logits."""


@dataclass
class _Catch:
    """Outputs of one layer, in parts."""

    last: bool = False
    """Whether a later call within one batch takes the place of an earlier one."""
    now: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def see(
    network: nn.Module,
    batches: Iterable[Tensor],
    layers: Sequence[str | int] = (LAST_HIDDEN,),
    *,
    device: torch.device | str = "cpu",
    widest: int = 2**14,
    skip: bool = False,
) -> Seen:
    """Run a network over the data and keep the outputs of some layers, flattened.

    Args:
        network: any module; every part of it is left in the mode and on the device that it came with.
        batches: inputs (b, ...) in parts.
        layers: names as in `named_modules`, places among the layers that compute (negative ones from the end), or
            `"last hidden"`.
        device: where to run.
        widest: layers with more features per example are averaged over their positions, and beyond that refused.
        skip: leave out layers that are not run or give no row per example, instead of refusing.

    Raises:
        MoleError: a layer is not there (the nearest names are given), is not run, gives no tensor, no row per
            example, or NaN; or the network does not take the data (both shapes are given).
    """
    caught: dict[str, _Catch] = {}
    outputs: list[Tensor] = []
    modes, home = {module: module.training for module in network.modules()}, _device(network)
    final = _Final(network)
    hooks: list[Any] = [*final.hooks]
    try:
        for layer in layers:
            caught[str(layer)] = catch = _Catch(last=layer == LAST_HIDDEN)
            hooks += _hooks(network, layer, catch, widest)
        network.eval().to(device)
        for batch in batches:
            outputs.append(_run(network, batch.to(device), final))
            for layer, catch in caught.items():
                if catch.now is not None and len(catch.now) == len(batch):
                    catch.parts.append(catch.now)
                elif not skip:
                    rows = (
                        "was not run" if catch.now is None else f"gives {len(catch.now)} rows for {len(batch)} inputs"
                    )
                    raise MoleError(f"layer {layer} {rows}")
                catch.now = None
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in modes.items():
            module.training = was
        if home is not None:
            network.to(home)
    found = torch.cat(outputs)
    whole = {layer: torch.cat(catch.parts) for layer, catch in caught.items() if catch.parts}
    seen = Seen({layer: x for layer, x in whole.items() if len(x) == len(found)}, found)
    for what, values in {**{f"layer {layer}": x for layer, x in seen.features.items()}, "output": found}.items():
        if not values.isfinite().all():
            raise MoleError(f"{what} is NaN or infinite for {int((~values.isfinite().all(1)).sum())} examples")
    return seen


def _device(network: nn.Module) -> torch.device | None:
    """Where a network lies; None if it has no tensors, or several places."""
    places = {tensor.device for tensor in (*network.parameters(), *network.buffers())}
    return places.pop() if len(places) == 1 else None


class _Final:
    """What the layer with weights gave that ran last: among several outputs of a network, these are its answers."""

    def __init__(self, network: nn.Module) -> None:
        self.output: Any = None
        weighted = [module for module in network.modules() if isinstance(module, WEIGHTED)]
        self.hooks = [module.register_forward_hook(self._see) for module in weighted]
        floats = [tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()]
        self.dtype = floats[0] if floats else None
        """Of the network's weights."""

    def logits(self, outputs: Tensor) -> Tensor:
        """The outputs; what the last layer gave where they are its sigmoid or its softmax."""
        given = self.output
        if not isinstance(given, Tensor) or given.numel() != outputs.numel() or not given.numel() or given is outputs:
            return outputs
        given = given.reshape(outputs.shape)
        ends = [given.sigmoid()] if outputs.ndim < 2 or outputs.shape[1] == 1 else [given.softmax(1)]
        return given if any(torch.allclose(end, outputs, atol=1e-6) for end in ends) else outputs

    def _see(self, _: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output


def _run(network: nn.Module, batch: Tensor, final: _Final) -> Tensor:
    """Outputs (b, C) on the CPU."""
    if final.dtype is not None and batch.is_floating_point():
        batch = batch.to(final.dtype)
    try:
        found = final.logits(tensor_of(network(batch), final.output))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        kind, shape = type(network).__name__, tuple(batch.shape)
        raise MoleError(f"{kind} does not take {shape}: {str(error).splitlines()[0]}") from None
    if found.ndim == 0 or len(found) != len(batch):
        raise MoleError(f"the output {tuple(found.shape)} has no row for each of {len(batch)} inputs")
    return found.flatten(1).float().cpu() if found.ndim > 1 else found[:, None].float().cpu()


def tensor_of(found: Any, final: Any = None) -> Tensor:
    """The tensor in what a module returned: itself, `logits`, or of several the one that its last layer gave.

    Args:
        found: what was returned.
        final: what the layer with weights gave that ran last, where it is a network's answer that is wanted.

    Returns:
        The tensor; of several among which the answer is not to be told, one without columns.

    Raises:
        MoleError: there is none.
    """
    if isinstance(found, Tensor):
        return found
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else ()
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim > 0]
    if len(tensors) > 1 and isinstance(final, Tensor):
        tensors = [value for value in tensors if value is final] or tensors
    if len(tensors) > 1 and final is not None:
        return tensors[0].new_empty(len(tensors[0]), 0)
    if tensors:
        return tensors[0]
    raise MoleError(f"a network returned {type(found).__name__}; legal is a tensor, or several with one named logits")


def layer_names(network: nn.Module) -> list[str]:
    """Every layer that computes by itself, in order of definition."""
    return [name for name, module in network.named_modules() if name and not list(module.children())]


def find_layer(network: nn.Module, layer: str | int) -> str:
    """Name of a module.

    Raises:
        MoleError: there is none of that name; the nearest names are given.
    """
    leaves, everything, kind = layer_names(network), dict(network.named_modules()), type(network).__name__
    if isinstance(layer, int):
        if not -len(leaves) <= layer < len(leaves):
            raise MoleError(
                f"no layer {layer} in {kind}, which has {len(leaves)}; legal is {-len(leaves)} to {len(leaves) - 1}"
            )
        return leaves[layer]
    if layer not in everything:
        near = difflib.get_close_matches(layer, everything, n=3, cutoff=0.3) or leaves[-3:]
        raise MoleError(f"no layer {layer!r} in {kind}; nearest: {', '.join(near)}; or 'last hidden', or a place")
    return layer


def _hooks(network: nn.Module, layer: str | int, catch: _Catch, widest: int) -> list[Any]:
    if layer != LAST_HIDDEN:
        name = find_layer(network, layer)
        module = network.get_submodule(name)
        return [module.register_forward_hook(lambda _, __, found: _keep(found, name, catch, widest))]
    weighted = [module for module in network.modules() if isinstance(module, WEIGHTED)]
    if not weighted:
        raise MoleError(
            f"no layer of {type(network).__name__} is linear, to take features from what it reads; name one"
        )

    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        _keep(inputs, LAST_HIDDEN, catch, widest)

    hook: Callable[[nn.Module, tuple[Any, ...]], None] = read
    return [module.register_forward_pre_hook(hook) for module in weighted]


def _keep(found: Any, name: str, catch: _Catch, widest: int) -> None:
    if catch.now is not None and not catch.last:
        return  # a layer that runs twice counts once
    features = tensor_of(found)
    if features.ndim == 0 or not len(features):
        return
    if features.ndim > 2 and features[0].numel() > widest:  # channels first, or tokens by channels
        features = features.flatten(2).mean(2) if features.ndim > 3 else features.mean(1)
    if features[0].numel() > widest:
        if catch.last:
            return
        raise MoleError(f"layer {name} has {features[0].numel():,} features; legal is at most {widest:,}")
    # a copy, because a layer after it may work in place
    catch.now = features.detach().reshape(len(features), -1).to("cpu", torch.float32, copy=True)


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
