"""Generated networks, each with the record of where it came from."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mole.errors import MoleError
from mole.files import replacing
from mole.representations import WeightSpec, weights_digest
from mole.tasks import Architecture


@dataclass(frozen=True, eq=False)
class Sample:
    """One generated network; two are equal if their weights are."""

    flat: Tensor
    """(P,) float32."""
    spec: WeightSpec
    architecture: Architecture
    provenance: dict[str, Any]
    """Generator, zoo, prompt, start, seed and versions."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and self.spec == other.spec and torch.equal(self.flat, other.flat)

    def __hash__(self) -> int:
        return hash(weights_digest(self.flat))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under the names that the plain network uses."""
        return {name: tensor.clone() for name, tensor in self.spec.unflatten(self.flat).items()}

    def module(self) -> nn.Module:
        """The network, as a plain module of PyTorch."""
        network = self.architecture.build(seed=0)
        network.load_state_dict(self.state_dict())
        return network

    def save(self, path: str | Path) -> None:
        """Write a plain safetensors file; the digests of its origin stand in the file's metadata.

        Raises:
            MoleError: the name does not end in `.safetensors`.
        """
        if Path(path).suffix != ".safetensors":
            raise MoleError(f"{path}: the file is safetensors; legal is a name that ends in .safetensors")
        origin = {key: self.provenance[key] for key in ("generator", "zoo", "weights")}
        metadata = {"mole": json.dumps(origin)}  # one key: the format does not keep the order of several
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save(self.state_dict(), metadata=metadata))


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Generated networks, drawn together.

    Example:
        >>> samples = generator.sample(target_loss=0.15, n=64, seed=0)
        >>> samples[0].module()(images).argmax(-1)
    """

    flat: Tensor
    """(N, P) float32, on the CPU."""
    spec: WeightSpec
    architecture: Architecture
    provenance: list[dict[str, Any]]
    network_evaluations: int
    """Calls of the generator per network."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and self.spec == other.spec and torch.equal(self.flat, other.flat)

    def __hash__(self) -> int:
        return hash(weights_digest(self.flat))

    def __len__(self) -> int:
        return len(self.flat)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return Samples(
                self.flat[index], self.spec, self.architecture, self.provenance[index], self.network_evaluations
            )  # fmt: skip
        return Sample(self.flat[index], self.spec, self.architecture, self.provenance[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Samples({len(self)} networks {self.architecture}, {self.network_evaluations} evaluation(s) each)"
