"""Between plain weights and what the denoiser sees: symmetry, scale, and a learned code if there is one.

Dimensions: N networks, P parameters, Z numbers of the code (P without an autoencoder).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mole.config import GeneratorConfig
from mole.errors import MoleError
from mole.representations import EntryScale, View, WeightSpec, chunk_view, make_view
from mole.representations.handling import Canonical, Elements
from mole.representations.latent import Autoencoder
from mole.representations.views import unequal


class Codec(nn.Module):
    """Maps flat weights to normalised codes and back.

    Args:
        spec: of the networks.
        config: says which view, and what is done about symmetry.
        stds: one per tensor, of the training networks.
        reference: (P,), the network that others are matched to, where symmetry is handled by that.
    """

    scale: Tensor
    reference: Tensor | None

    def __init__(
        self, spec: WeightSpec, config: GeneratorConfig, stds: list[float], reference: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec, self.config, self.stds = spec, config, stds
        self.register_buffer("scale", EntryScale.of(spec, stds).scale, persistent=False)
        self.register_buffer("reference", reference)
        self.autoencoder = Autoencoder(spec.size, config.latent) if config.view == "latent" else None
        self.canonical = Canonical(spec, reference) if reference is not None else None

    @property
    def size(self) -> int:
        """Numbers of a code, Z."""
        return self.config.latent if self.autoencoder is not None else self.spec.size

    def view(self) -> View:
        """How the denoiser sees a code."""
        if self.autoencoder is not None:
            code = WeightSpec.of_state({"code": torch.zeros(self.config.latent)})
            return chunk_view(code, size=max(1, self.config.latent // 16))
        if self.config.view == "chunks":
            return chunk_view(self.spec, size=self.config.chunk)
        assert self.config.view != "latent"
        view = make_view(self.config.view, self.spec)
        if self.config.symmetry == "equivariant" and (broken := unequal(view)):
            raise MoleError(
                f"generator.symmetry equivariant: view {self.config.view} of this network is not "
                f"({', '.join(broken[:5])}); legal there: none, augment, canonical"
            )
        return view

    def elements(self, flat: Tensor) -> Elements | None:
        """The element that brings each network (N, P) into canonical form; None where none is wanted."""
        return self.canonical.elements(flat) if self.canonical is not None else None

    def normalise(self, flat: Tensor) -> Tensor:
        """Codes (N, Z) of weights (N, P)."""
        normal = flat / self.scale
        return normal if self.autoencoder is None else self.autoencoder.encode(normal)

    def restore(self, code: Tensor) -> Tensor:
        """Weights (N, P) of codes (N, Z); exact up to rounding without an autoencoder."""
        return (code if self.autoencoder is None else self.autoencoder.decode(code)) * self.scale

    def fit(self, draw: Callable[[torch.Generator], Tensor], seed: int) -> None:
        """Train the autoencoder, if there is one, on batches (N, P) of plain weights that `draw` gives."""
        if self.autoencoder is not None:
            steps = self.config.latent_steps
            self.autoencoder.fit(lambda generator: draw(generator) / self.scale, steps=steps, seed=seed)
