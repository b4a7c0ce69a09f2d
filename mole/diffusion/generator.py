"""The trained generator: saved as `config.json` and `model.safetensors`, loaded, sampled.

Dimensions: N networks, P parameters.
"""

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole.config import GeneratorConfig, TaskConfig
from mole.diffusion.codec import Codec
from mole.diffusion.conditions import Conditions
from mole.diffusion.denoiser import Denoiser
from mole.diffusion.process import Drawn, reverse
from mole.diffusion.samples import Samples
from mole.errors import CorruptFileError, MoleError, PromptWarning
from mole.files import file_digest, read_json, replacing, value_digest, write_json
from mole.representations import WeightSpec, weights_digest
from mole.tasks import Architecture, Task, load_task

FORMAT = 2
FRESH_SEEDS = 2**40
"""Initialisations from here on belong to sampling; harvests use smaller seeds."""


class Card(BaseModel):
    """What `config.json` of a generator holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: int
    denoiser: GeneratorConfig
    task: TaskConfig
    architecture: Architecture
    """The generated networks."""
    spec: dict[str, Any]
    scales: list[float]
    prompt_range: tuple[float, float]
    """Lowest and highest loss in the zoo, in nats."""
    zoo: str
    """Digest of the zoo it learned from."""
    train_steps: int
    seed: int
    weights: str = ""
    """SHA-256 of `model.safetensors`."""
    digest: str = ""
    """Of everything above: the identity of the generator."""

    def sealed(self) -> "Card":
        """The same card with its digest."""
        return self.model_copy(update={"digest": value_digest(self.model_dump(mode="json", exclude={"digest"}))})


@dataclass(frozen=True)
class Generator:
    """A denoiser with all it needs to draw networks.

    Example:
        >>> generator = mole.load("runs/digits")
        >>> samples = generator.sample(target_loss=0.15, n=64, seed=0)
        >>> network = samples[0].module()
    """

    denoiser: Denoiser
    codec: Codec
    card: Card
    device: torch.device
    loaded_task: Task | None = None
    """The task with its data on `device`; loaded at first use when absent."""

    @cached_property
    def spec(self) -> WeightSpec:
        return self.codec.spec

    @cached_property
    def task(self) -> Task:
        """The task whose networks it generates."""
        return self.loaded_task or load_task(self.card.task).to(self.device)

    @property
    def digest(self) -> str:
        """Identity of this generator: of its configuration and weights; empty before it is saved."""
        return self.card.digest

    def sample(
        self,
        *,
        target_loss: float | None = None,
        n: int = 1,
        seed: int = 0,
        starts: Tensor | None = None,
        evaluations: int = 1,
    ) -> Samples:
        """Generate networks for a wanted loss.

        Args:
            target_loss: cross-entropy in nats on the task's prompt images; the zoo's best by default.
            n: number of networks.
            seed: of the noise and of the fresh initialisations, below 2**20; network i depends on (seed, i)
                only, up to rounding, which the size of the batch can change in the last bit.
            starts: weights (n, P) of the networks to start from; fresh initialisations by default.
            evaluations: calls of the generator per network.

        Returns:
            The networks in order, with their provenance.

        Raises:
            MoleError: an argument is not legal.

        Warns:
            PromptWarning: `target_loss` lies outside the losses in the zoo.
        """
        target = self.card.prompt_range[0] if target_loss is None else target_loss
        _check_request(target, n, seed, evaluations)
        self._warn_outside_range(target)
        seeds = [FRESH_SEEDS + seed * 2**20 + index for index in range(n)]
        if starts is None:
            origins = [{"kind": "fresh initialisation", "seed": s} for s in seeds]
            starts = self.task.initial(seeds)
        else:
            starts = self._checked_starts(starts, n)
            origins = [{"kind": "given weights", "weights": weights_digest(start)} for start in starts]
        drawn, losses = self._draw(starts, torch.full((n,), float(target)), seeds, evaluations)
        records = [
            {
                "weights": weights_digest(drawn.flat[i]),
                "generator": self.digest,
                "zoo": self.card.zoo,
                "prompt": {"target_loss": float(target)},
                "start": {**origins[i], "loss": float(losses[i])},
                "seed": seed,
                "index": i,
                "drawn_together": n,
                "network_evaluations": drawn.evaluations,
                "versions": versions(),
            }
            for i in range(n)
        ]
        return Samples(drawn.flat, self.spec, self.card.architecture, records, drawn.evaluations)

    def _checked_starts(self, starts: Tensor, n: int) -> Tensor:
        """The starts as plain float32 on the CPU, if they fit the network."""
        if not isinstance(starts, Tensor) or starts.shape != (n, self.spec.size) or not starts.isfinite().all():
            found = tuple(starts.shape) if isinstance(starts, Tensor) else type(starts).__name__
            raise MoleError(f"starts: found {found}; legal is a tensor ({n}, {self.spec.size}), all finite")
        return starts.detach().float().cpu()

    def draw(self, starts: Tensor, target_loss: Tensor, *, seed: int = 0, evaluations: int = 1) -> Drawn:
        """Weights (N, P) for starts (N, P) and prompts (N,), without records or warnings."""
        seeds = [FRESH_SEEDS + seed * 2**20 + index for index in range(len(starts))]
        return self._draw(starts, target_loss, seeds, evaluations)[0]

    @torch.no_grad()
    def _draw(
        self, starts: Tensor, target_loss: Tensor, seeds: Sequence[int], evaluations: int, at_once: int = 256
    ) -> tuple[Drawn, Tensor]:
        """Weights and the losses of the starts; both on the CPU."""
        drawn, losses, calls = [], [], 0
        for low in range(0, len(starts), at_once):
            part = slice(low, low + at_once)
            start = starts[part].to(self.device)
            noise = torch.stack([_noise(s, self.codec.size) for s in seeds[part]]).to(self.device)
            loss = self.task.measure(start, "prompt")["loss"]
            conditions = Conditions(loss, target_loss[part].to(start))
            elements = self.codec.elements(starts[part])
            start = start if elements is None else elements.act(start)
            found = reverse(self.denoiser, noise, self.codec.normalise(start), conditions, evaluations)
            flat = self.codec.restore(found.flat)
            drawn.append((flat if elements is None else elements.undo(flat)).cpu())
            calls = found.evaluations
            losses.append(loss.cpu())
        return Drawn(torch.cat(drawn), calls), torch.cat(losses)

    def _warn_outside_range(self, target: float) -> None:
        low, high = self.card.prompt_range
        if not low * (1 - 1e-6) <= target <= high * (1 + 1e-6):
            warnings.warn(
                f"target_loss {target:.4g} lies outside the losses of the zoo, {low:.4g} to {high:.4g}; "
                "the generator has seen no such network",
                PromptWarning,
                stacklevel=3,
            )

    def save(self, folder: str | Path) -> "Generator":
        """Write `model.safetensors`, then `config.json` with its digest; returns the generator as loaded."""
        folder = Path(folder)
        with replacing(folder / "model.safetensors") as temporary:
            parts = {"denoiser": self.denoiser, "codec": self.codec}
            save_file({f"{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()}, temporary)
        card = self.card.model_copy(update={"weights": file_digest(folder / "model.safetensors")}).sealed()
        write_json(folder / "config.json", card.model_dump(mode="json"))
        return replace(self, card=card)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Generator":
        """Read a generator from its folder, or from the folder of the run that trained it.

        Raises:
            MoleError: there is none.
            CorruptFileError: a file is not what was written, or of another format.
        """
        folder = Path(path)
        folder = folder / "generator" if (folder / "generator").is_dir() else folder
        try:
            card = Card.model_validate(read_json(folder / "config.json"))
            found = file_digest(folder / "model.safetensors")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MoleError(
                f"{path}: no generator here ({error.filename} is missing); legal is a run folder or a folder of "
                "config.json and model.safetensors, as `python train.py` writes them"
            ) from None
        except ValidationError as error:
            raise CorruptFileError(f"{folder}/config.json: {error}") from None
        if card.format != FORMAT:
            raise CorruptFileError(f"{folder}/config.json: format {card.format}; this version reads {FORMAT}")
        if card.sealed() != card:
            raise CorruptFileError(f"{folder}/config.json: altered after it was written; train again or copy it anew")
        if found != card.weights:
            raise CorruptFileError(f"{folder}/model.safetensors: truncated or altered; train again or copy it anew")
        try:
            tensors = load_file(folder / "model.safetensors")
            codec = Codec(WeightSpec.from_json(card.spec), card.denoiser, card.scales, tensors.get("codec.reference"))
            denoiser = Denoiser(codec.view(), card.denoiser)
            for name, part in (("denoiser", denoiser), ("codec", codec)):
                mine = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
                part.load_state_dict(mine)
        except (SafetensorError, RuntimeError, KeyError, TypeError, IndexError) as error:
            raise CorruptFileError(f"{folder}: weights and configuration do not fit ({error})") from None
        try:
            place = torch.device(device)
            denoiser.to(place)
            codec.to(place)
        except (RuntimeError, AssertionError) as error:
            raise MoleError(f"device {str(device)!r}: {error}; legal is cpu, or cuda where PyTorch finds it") from None
        return cls(denoiser.eval(), codec.eval(), card, place)


def _check_request(target_loss: object, n: object, seed: object, evaluations: object) -> None:
    """Refuse what `sample` cannot do, everything at once."""
    whole = {"n": (n, 1, 2**20), "seed": (seed, 0, 2**20 - 1), "evaluations": (evaluations, 1, 1000)}
    faults = [
        f"{name} is {value!r}; legal is a whole number from {low} to {high}"
        for name, (value, low, high) in whole.items()
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high
    ]
    if isinstance(target_loss, bool) or not isinstance(target_loss, int | float) or not 0 < target_loss < 1e6:
        faults.append(f"target_loss is {target_loss!r}; legal is a number above 0, in nats")
    if faults:
        raise MoleError("; ".join(faults))


def _noise(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a generated network."""
    packages = ("mole", "torch", "diffusers", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def load(path: str | Path, device: str | torch.device = "cpu") -> Generator:
    """Read a generator from its folder or from its run folder; see `Generator.load`."""
    return Generator.load(path, device)
