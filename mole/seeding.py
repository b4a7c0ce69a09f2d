"""Random numbers that no other thread can disturb, and that no other purpose shares."""

import hashlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWS = {
    "bernoulli", "bernoulli_", "exponential_", "kaiming_uniform_", "multinomial", "normal", "normal_", "rand",
    "randint", "randn", "randperm", "random_", "trunc_normal_", "uniform_",
}  # fmt: skip
"""Functions of PyTorch that take a generator, as they are called from Python."""


def derived(purpose: str, *numbers: int) -> int:
    """A seed for a purpose, of the numbers alone.

    PyTorch's generator on the CPU reads the lowest 32 bits of a seed and nothing else: seeds told apart by an offset of
    2**32 or more would draw the same numbers, and what was drawn for one purpose would tell of another.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def stream(purpose: str, *numbers: int) -> torch.Generator:
    """A generator for a purpose, on the CPU."""
    return torch.Generator().manual_seed(derived(purpose, *numbers))


class Seeded(TorchFunctionMode):
    """Within it, what this thread draws comes from a generator of its own, on the CPU.

    PyTorch's global generator is neither read nor moved, so threads that build networks at once do not meet. The
    numbers are those that `torch.manual_seed(seed)` gives.

    Example:
        >>> with Seeded(0):
        ...     network = nn.Linear(2, 3)
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ in DRAWS and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)
