"""The same networks, computed in the way that is fast and right when many of them run under `vmap`."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASK = [(1 << (64 - shift)) - 1 for shift in (30, 27, 31)]


class BatchedLinear(nn.Linear):
    """A linear layer as weights times images: on a CPU the batched product is four times as fast that way round."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that PyTorch gave it
        if input.ndim != 2:
            return F.linear(input, self.weight, self.bias)
        product = self.weight @ input.mT  # (outputs, B)
        return (product if self.bias is None else product + self.bias[:, None]).mT


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of a key, so that a run's masks do not depend on its neighbours.

    The key is a buffer, one number per run; `advance_keys` gives it a new value for every step.
    """

    key: Tensor

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        index = torch.arange(values.numel(), device=values.device)
        bits = _mix(index + _mix(self.key * 1024 + self.layer)) & (2**24 - 1)
        kept = (bits >= self.probability * 2**24).reshape(values.shape)
        return values * kept / (1 - self.probability)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in wrapping int64 arithmetic."""
    value = value * -7046029254386353131
    value = (value ^ ((value >> 30) & _MASK[0])) * -4658895280553007687
    value = (value ^ ((value >> 27) & _MASK[1])) * -7723592293110705685
    return value ^ ((value >> 31) & _MASK[2])


def singly(network: nn.Module, device: torch.device) -> bool:
    """Whether many such networks are faster one after the other than under `vmap`: 2-D convolutions on a CPU.

    There `vmap` is one convolution with groups, over tensors that no cache holds: 2.4 times as slow (one thread of an
    AMD EPYC, G.pt's CIFAR-10 network, 8 networks, batches of 128).
    """
    return device.type == "cpu" and any(isinstance(layer, nn.Conv2d) for layer in network.modules())


def batched(network: nn.Module) -> nn.Module:
    """A copy that computes the same function with the layers of this file.

    Names and shapes of parameters stay; a dropout layer gains the buffer `key`.
    """
    network = copy.deepcopy(network)
    for layer in network.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = BatchedLinear
    dropouts = [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]
    for number, (parent, name, child) in enumerate(d for d in dropouts if type(d[2]) is nn.Dropout):
        assert isinstance(child, nn.Dropout)
        setattr(parent, name, KeyedDropout(child.p, number).train(child.training))
    return network


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers, each once: a tied tensor under its first name."""
    seen, state = set[int](), dict[str, Tensor]()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def advance_keys(state: dict[str, Tensor], names: list[str], seeds: Tensor, step: int) -> None:
    """Give the dropout keys (N,) under `names` their values for a step: of seed and step alone."""
    for name in names:
        state[name].copy_(_mix(seeds.to(state[name].device)) + step)


def dropout_keys(template: nn.Module) -> list[str]:
    """Names of the keys that a batched network has beside its own tensors."""
    return [f"{name}.key" for name, layer in template.named_modules() if isinstance(layer, KeyedDropout)]
