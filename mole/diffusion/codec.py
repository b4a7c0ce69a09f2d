"""Between plain weights and what the denoiser sees: symmetry, scale, and a learned code if there is one.

Dimensions: N networks, P parameters, Z numbers of the code (P without an autoencoder).
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from mole.config import GeneratorConfig
from mole.errors import MoleError
from mole.representations import EntryScale, View, WeightSpec, chunk_view, make_view
from mole.representations.handling import Canonical, Elements
from mole.representations.latent import Autoencoder
from mole.representations.spec import differences
from mole.representations.structure import word
from mole.representations.views import unequal

LOUDEST = 3.0
"""A tensor of a start that is larger than this, in standard deviations of the training networks, is made smaller: no
generator has seen such a start, and what training makes of starts hardly depends on their scale."""


LEAST_VARIANCE = 0.01
"""Of a generated running variance, in standard deviations of those of the training networks."""


class Codec(nn.Module):
    """Maps flat weights to normalised codes and back.

    Args:
        spec: of the networks.
        config: says which view, and what is done about symmetry.
        stds: standard deviations over the training networks, of every tensor by its word.
        reference: (P,), the network that others are matched to, where symmetry is handled by that.

    Raises:
        MoleError: a tensor has a word that the training networks had not.
    """

    scale: Tensor
    reference: Tensor | None

    def __init__(
        self, spec: WeightSpec, config: GeneratorConfig, stds: dict[str, float], reference: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec, self.config, self.stds = spec, config, stds
        unknown = [f"{entry.name} ({word(entry)})" for entry in spec.entries if word(entry) not in stds]
        if unknown:
            raise MoleError(f"this generator has seen no {', '.join(unknown)}; it knows {', '.join(stds)}")
        scales = EntryScale.of(spec, [stds[word(entry)] for entry in spec.entries])
        self.register_buffer("scale", scales.scale, persistent=False)
        self.variances = [slice(e.offset, e.stop) for e in spec.entries if e.role == "norm.running_var"]
        """Where running variances lie."""
        self._others: dict[str, Codec] = {}
        self.register_buffer("reference", reference)
        self.autoencoder = Autoencoder(spec.size, config.latent) if config.view == "latent" else None
        self.canonical = Canonical(spec, reference) if reference is not None else None

    @property
    def size(self) -> int:
        """Numbers of a code, Z."""
        return self.config.latent if self.autoencoder is not None else self.spec.size

    def of(self, spec: WeightSpec) -> "Codec":
        """The codec of networks of another layout.

        Raises:
            MoleError: such networks cannot be generated.
        """
        if spec.fingerprint == self.spec.fingerprint:
            return self
        if self.reference is not None or self.autoencoder is not None or self.config.view in ("chunks", "flat"):
            handling = f"view {self.config.view}, symmetry {self.config.symmetry}"
            raise MoleError(f"{handling} serves one layout only ({differences(self.spec, spec)}); legal for several: "
                            "neurons, classes or graph, and equivariant")  # fmt: skip
        if spec.fingerprint not in self._others:
            self._others[spec.fingerprint] = Codec(spec, self.config, self.stds).to(self.scale.device)
        return self._others[spec.fingerprint]

    @cached_property
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

    def quieted(self, flat: Tensor) -> Tensor:
        """Weights (N, P) whose tensors are not far larger than those of the training networks: one whose root mean
        square is above `LOUDEST` of their standard deviations is brought to one of them. Where one scale is for all
        tensors (G.pt), nothing is done."""
        if self.config.scale == "global":
            return flat
        found = flat.clone()
        for entry in self.spec.entries:
            own, std = slice(entry.offset, entry.stop), self.stds[word(entry)]
            size = flat[:, own].square().mean(1, keepdim=True).sqrt() / std
            found[:, own] = torch.where(size > LOUDEST, flat[:, own] / size.clamp_min(1e-12), flat[:, own])
        return found

    def elements(self, flat: Tensor) -> Elements | None:
        """The element that brings each network (N, P) into canonical form; None where none is wanted."""
        return self.canonical.elements(flat) if self.canonical is not None else None

    def normalise(self, flat: Tensor) -> Tensor:
        """Codes (N, Z) of weights (N, P)."""
        normal = flat / self.scale
        return normal if self.autoencoder is None else self.autoencoder.encode(normal)

    def restore(self, code: Tensor) -> Tensor:
        """Weights (N, P) of codes (N, Z); exact up to rounding without an autoencoder.

        A running variance of a norm is never negative, nor much smaller than any: its network would compute NaN.
        """
        flat = (code if self.autoencoder is None else self.autoencoder.decode(code)) * self.scale
        if not self.variances:
            return flat
        floor = torch.full_like(self.scale, -torch.inf)
        for own in self.variances:
            floor[own] = LEAST_VARIANCE * self.scale[own]
        return torch.maximum(flat, floor)

    def fit(self, draw: Callable[[torch.Generator], Tensor], seed: int) -> None:
        """Train the autoencoder, if there is one, on batches (N, P) of plain weights that `draw` gives."""
        if self.autoencoder is not None:
            steps = self.config.latent_steps
            self.autoencoder.fit(lambda generator: draw(generator) / self.scale, steps=steps, seed=seed)
