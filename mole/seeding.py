"""Random numbers that no other thread can disturb."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWS = {
    "bernoulli", "bernoulli_", "exponential_", "kaiming_uniform_", "multinomial", "normal", "normal_", "rand",
    "randint", "randn", "randperm", "random_", "trunc_normal_", "uniform_",
}  # fmt: skip
"""Functions of PyTorch that take a generator, as they are called from Python."""


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
