"""Inputs to try a network on, when nobody has given any."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and named arguments of a network's forward."""

SIDES = (32, 64, 28, 224, 96, 128, 256, 384)
"""Of images that are tried."""


def as_inputs(given: Any) -> Inputs:
    """What a person may give: one tensor, a tuple of arguments, or a dictionary of named ones."""
    if isinstance(given, Mapping):
        return (), given
    return (tuple(given), {}) if isinstance(given, tuple | list) else ((given,), {})


def example_inputs(module: nn.Module) -> Iterator[Inputs]:
    """Inputs that may fit, likely ones first."""
    yield from _of_timm(module)
    yield from _of_transformers(module)
    first = next((layer for layer in module.modules() if isinstance(layer, LAYERS)), None)
    if first is not None:
        yield from _of_layer(first)


def _images(channels: int, height: int, width: int) -> Inputs:
    return (_normal(2, channels, height, width),), {}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _of_timm(module: nn.Module) -> Iterator[Inputs]:
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple) and len(size) == 2:
        yield _images(3, *size)
    config = getattr(module, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if isinstance(size, tuple) and len(size) == 3:
        for side in sorted({min(64, size[1]), size[1]}):
            yield _images(size[0], side, side)


def _of_transformers(module: nn.Module) -> Iterator[Inputs]:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return
    words = torch.arange(2, 14).reshape(2, 6) % max(3, int(getattr(config, "vocab_size", 0) or 100))
    if getattr(module, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 224)
        side = size[0] if isinstance(size, tuple | list) else size
        yield (), {"pixel_values": _normal(2, getattr(config, "num_channels", 3), side, side)}
    if getattr(module, "main_input_name", "") == "input_features":  # spectra, of a fixed length
        length = 2 * int(getattr(config, "max_source_positions", 512))
        spectra = {"input_features": _normal(1, int(getattr(config, "num_mel_bins", 80)), length)}
        yield (), {**spectra, "decoder_input_ids": words[:1, :4]}
        yield (), spectra
    if getattr(config, "is_encoder_decoder", False):
        yield (), {"input_ids": words, "decoder_input_ids": words[:, :4]}
    yield (), {"input_ids": words}
    yield (), {"input_values": _normal(2, 4000)}


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase)


def _of_layer(layer: nn.Module) -> Iterator[Inputs]:
    """By the first layer that has weights."""
    if isinstance(layer, nn.Linear):
        yield (_normal(4, layer.in_features),), {}
        yield (_normal(2, 5, layer.in_features),), {}
    elif isinstance(layer, nn.Conv1d):
        for length in (64, 256, 1024):
            yield (_normal(2, layer.in_channels, length),), {}
    elif isinstance(layer, nn.Conv2d):
        for side in SIDES:
            yield _images(layer.in_channels, side, side)
    elif isinstance(layer, nn.Conv3d):
        yield (_normal(2, layer.in_channels, 16, 16, 16),), {}
    elif isinstance(layer, nn.Embedding):
        yield (torch.arange(2, 14).reshape(2, 6) % layer.num_embeddings,), {}
    elif isinstance(layer, nn.RNNBase):
        yield (_normal(2, 5, layer.input_size),), {}
