"""The networks that generate, by their names and sizes."""

from collections.abc import Sequence

import torch

from mole.config import GeneratorConfig
from mole.diffusion.denoiser import Denoiser
from mole.diffusion.gpt import Gpt
from mole.errors import MoleError
from mole.representations import View

AnyDenoiser = Denoiser | Gpt


def make_denoiser(views: Sequence[View], config: GeneratorConfig, *, numbers: int = 0) -> AnyDenoiser:
    """A fresh denoiser for networks of these views.

    Args:
        views: of the networks that it shall know.
        config: which one, and how large.
        numbers: per example of a support set, where the generator reads data.

    Raises:
        MoleError: the wanted number of parameters is too small for any.
    """
    if config.parameters is not None:
        config = config.model_copy(update={"width": widest(views, config, numbers=numbers)})
    return Gpt(views[0], config) if config.model == "gpt" else Denoiser(views, config, numbers=numbers)


def widest(views: Sequence[View], config: GeneratorConfig, *, numbers: int = 0) -> int:
    """The largest width whose denoiser has at most `config.parameters` parameters, a multiple of heads.

    Raises:
        MoleError: the smallest one has more.
    """
    assert config.parameters is not None
    step = config.heads

    def size(width: int) -> int:
        trial = config.model_copy(update={"width": width, "parameters": None})
        with torch.device("meta"):
            return sum(p.numel() for p in make_denoiser(views, trial, numbers=numbers).parameters())

    if size(step) > config.parameters:
        common = f" ({views[0].spec.size:,} of them by generator.common)" if config.common else ""
        raise MoleError(
            f"generator.parameters is {config.parameters:,}; with {config.layers} layers of {config.heads} heads the "
            f"smallest denoiser has {size(step):,}{common}: raise it or lower heads"
        )
    low, high = 1, 2
    while size(high * step) <= config.parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle * step) <= config.parameters else (low, middle)
    return low * step
