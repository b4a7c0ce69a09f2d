"""Which neurons of a network are interchangeable: derived from the module, proved numerically.

The rule is for chains: in an `nn.Sequential` (nested ones included) the outputs of a linear layer
and the inputs of the next one run over the same neurons when only element-wise layers lie between.
Every other layer ends a chain, which is sound: it leaves a smaller group.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mole.errors import MoleError

ELEMENTWISE = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.LeakyReLU, nn.Softplus, nn.Identity, nn.Dropout,
)  # fmt: skip

Axes = dict[str, tuple[str | None, ...]]


class SymmetryError(MoleError):
    """A group that was derived does not leave the network's function unchanged."""


def derive_groups(module: nn.Module) -> Axes:
    """Tensor name to the group that each of its axes runs over; absent names have none.

    A group is named after the layer whose outputs it permutes.

    Raises:
        SymmetryError: the numeric check failed (a module that overrides `forward`, say).
    """
    axes: Axes = {}
    previous: tuple[str, nn.Linear] | None = None
    for name, layer in _chain(module):
        if isinstance(layer, nn.Linear):
            if previous is not None:
                group = previous[0]
                _set_axis(axes, group, previous[1], 0, group)
                _set_axis(axes, name, layer, 1, group)
            previous = (name, layer)
        elif not isinstance(layer, ELEMENTWISE):
            previous = None
    if axes:
        check_groups(module, axes)
    return axes


def _chain(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _chain(child, f"{prefix}.{name}" if prefix else name)


def _set_axis(axes: Axes, name: str, layer: nn.Linear, axis: int, group: str) -> None:
    old = axes.get(f"{name}.weight", (None, None))
    axes[f"{name}.weight"] = (group, old[1]) if axis == 0 else (old[0], group)
    if axis == 0 and layer.bias is not None:
        axes[f"{name}.bias"] = (group,)


def check_groups(module: nn.Module, axes: Axes, *, seed: int = 0, tolerance: float = 1e-10) -> None:
    """Permute every group at random in float64 and compare the outputs.

    Raises:
        SymmetryError: the outputs differ by more than `tolerance` of their largest value.
    """
    network = copy.deepcopy(module).double().eval()
    first = next(layer for _, layer in _chain(network) if isinstance(layer, nn.Linear))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, first.in_features, generator=generator, dtype=torch.float64)
    state = network.state_dict()
    sizes = {g: state[n].shape[i] for n, groups in axes.items() for i, g in enumerate(groups) if g is not None}
    permutations = {g: torch.randperm(size, generator=generator) for g, size in sizes.items()}
    moved = {n: permute_axes(t, axes.get(n, ()), permutations) for n, t in state.items()}
    with torch.no_grad():
        before, after = network(inputs), functional_call(network, moved, (inputs,))
    error = float((before - after).abs().max() / before.abs().max().clamp_min(1e-300))
    if not error <= tolerance:
        raise SymmetryError(
            f"permuting {', '.join(sizes)} changes the outputs by {error:.1e} (at most {tolerance:.0e} is legal); "
            f"does {type(module).__name__} override forward?"
        )


def permute_axes(tensor: Tensor, axes: tuple[str | None, ...], permutations: Mapping[str, Tensor]) -> Tensor:
    """Reorder the last `len(axes)` axes of `tensor`."""
    lead = tensor.ndim - len(axes)
    for axis, group in enumerate(axes):
        if group is not None and group in permutations:
            tensor = tensor.index_select(lead + axis, permutations[group].to(tensor.device))
    return tensor
