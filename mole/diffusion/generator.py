"""The trained generator: saved as `config.json` and `model.safetensors`, loaded, sampled.

Dimensions: N networks, P parameters, K examples, M numbers per example.
"""

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mole.checkpoints.recipes import CODES
from mole.diffusion.card import FORMAT, Card, parse
from mole.diffusion.codec import Codec
from mole.diffusion.conditions import Conditions
from mole.diffusion.denoiser import Networks
from mole.diffusion.models import AnyDenoiser, make_denoiser
from mole.diffusion.pairs import with_data
from mole.diffusion.process import Drawn, reverse
from mole.diffusion.samples import Samples
from mole.errors import CorruptFileError, MoleError, PromptWarning
from mole.files import file_digest, read_json, replacing, write_json, write_text
from mole.representations import WeightSpec, weights_digest
from mole.seeding import derived
from mole.tasks import Architecture, Classification, load_task

Support = tuple[Tensor, Tensor]
"""Labelled examples of the data: images (K, M) or (N, K, M), labels (K,) or (N, K)."""


@dataclass(frozen=True)
class Request:
    """What is asked of a generator."""

    starts: Tensor | None
    """(N, P), or nothing: networks from noise alone."""
    asked: Mapping[str, Tensor | float]
    """Conditions by their names; those that are left out are not asked for."""
    support: Support | None = None
    architecture: Architecture | None = None
    """Of the networks; by default those of the generator's task."""
    seeds: Sequence[int] = ()
    """Of the noise, one per network."""
    evaluations: int = 1
    guidance: float = 1.0

    def part(self, low: int, high: int) -> "Request":
        """The networks from `low` to `high`."""
        asked = {k: v[low:high] if isinstance(v, Tensor) and v.ndim else v for k, v in self.asked.items()}
        support = self.support
        if support is not None and support[1].ndim == 2:
            support = support[0][low:high], support[1][low:high]
        starts = None if self.starts is None else self.starts[low:high]
        return replace(self, starts=starts, asked=asked, support=support, seeds=self.seeds[low:high])


class Generator(ModelHubMixin, library_name="mole", tags=["mole", "weight-space-learning"]):
    """A denoiser with all it needs to draw networks.

    Args:
        model: the network that generates.
        codec: between plain weights and what the denoiser sees.
        card: what it is and what it has seen.
        device: where both lie.
        known: the task whose networks it generates, its data on `device`; loaded at first use when absent.

    Example:
        >>> generator = mole.load("runs/digits")
        >>> samples = generator.sample(target_loss=0.15, n=64, seed=0)
        >>> network = samples[0].module()
    """

    def __init__(
        self, model: AnyDenoiser, codec: Codec, card: Card, device: torch.device, known: Classification | None = None
    ) -> None:  # other names than in the card, from which the Hugging Face mix-in would fill them
        self.denoiser, self.codec, self.card, self.device, self._known = model, codec, card, device, known
        model.requires_grad_(requires_grad=False)  # where gradients may be asked for, attention rounds otherwise

    @property
    def spec(self) -> WeightSpec:
        """Layout of the networks of its task."""
        return self.codec.spec

    @cached_property
    def task(self) -> Classification:
        """The task whose networks it generates."""
        task = self._known or load_task(self.card.task).to(self.device)
        assert isinstance(task, Classification)
        return task

    @property
    def digest(self) -> str:
        """Identity of this generator: of its configuration and weights; empty before it is saved."""
        return self.card.digest

    def sample(
        self,
        *,
        n: int = 1,
        seed: int = 0,
        starts: Tensor | Sequence[nn.Module | Mapping[str, Tensor]] | str = "fresh",
        support: Support | None = None,
        architecture: Architecture | None = None,
        evaluations: int = 1,
        guidance: float = 1.0,
        **asked: float | str | None,
    ) -> Samples:
        """Generate networks with what is asked for.

        Args:
            n: number of networks.
            seed: of the noise and of the fresh initialisations, below 2**20; network i depends on (seed, i)
                only, up to rounding, which the size of the batch can change in the last bit.
            starts: `"fresh"` initialisations, `"none"` (from noise alone), weights (n, P), or n networks or their state
                dicts.
            support: labelled examples of the data that the networks shall serve, images (K, M) and labels (K,); needed
                where the generator reads data.
            architecture: of the networks; the generator must know what they are made of, not their width or depth.
            evaluations: calls of the generator per network and, if it is guided, twice that.
            guidance: 1 follows the conditions as they were learned; more overdoes them (Ho & Salimans 2022).
            asked: any of the generator's conditions, `target_loss=0.15`; losses are cross-entropies in nats on the
                task's prompt images. `target_error` is 1 - `target_accuracy`. If nothing is asked, the zoo's best loss
                is.

        Returns:
            The networks in order, with their provenance.

        Raises:
            MoleError: an argument is not legal.

        Warns:
            PromptWarning: a target lies outside what the zoo holds.
        """
        wanted = self._wanted(asked, {"n": n, "seed": seed, "evaluations": evaluations}, guidance)
        self._warn_outside_range(wanted)
        task = self._task_for(architecture)
        seeds = [derived("noise", seed, index) for index in range(n)]
        given, origins = self._starts(starts, task, [derived("fresh start", seed, index) for index in range(n)])
        data = None
        if support is not None:
            data = self._checked_support(support, n)
        elif self.card.denoiser.data:
            raise MoleError(
                "support: this generator is told by labelled examples what its networks are for; give images "
                f"(K, {self.card.examples}) and labels (K,)"
            )
        request = Request(given, wanted, data, architecture, seeds, evaluations, float(guidance))
        drawn, known = self._draw(request, task, seeds)
        prompt = {name: asked[name] for name in asked if asked[name] is not None} or dict(wanted)
        if guidance != 1:
            prompt["guidance"] = float(guidance)
        records = [
            {
                "weights": weights_digest(drawn.flat[i]),
                "generator": self.digest,
                "zoo": self.card.zoo,
                "prompt": prompt,
                "start": {**origins[i], **({"loss": float(known[i])} if known is not None else {})},
                "seed": seed,
                "index": i,
                "drawn_together": n,
                "network_evaluations": drawn.evaluations,
                "architecture": task.architecture.model_dump(mode="json"),
                **({} if data is None else {"support": _digest(data, i)}),
                "versions": versions(),
            }
            for i in range(n)
        ]
        return Samples(drawn.flat, task.spec, task.architecture, records, drawn.evaluations)

    def draw(self, request: Request, *, seed: int = 0) -> Drawn:
        """Weights (N, P) for a request, without records or warnings; `seed` decides the noise, unless seeds are given.

        A request without starts needs seeds.
        """
        count = len(request.seeds) if request.starts is None else len(request.starts)
        seeds = request.seeds or [derived("noise", seed, index) for index in range(count)]
        return self._draw(request, self._task_for(request.architecture), seeds)[0]

    @torch.no_grad()
    def _draw(
        self, request: Request, task: Classification, seeds: Sequence[int], at_once: int = 256
    ) -> tuple[Drawn, Tensor | None]:
        """Weights and, where there are starts, their losses; both on the CPU."""
        codec = self.codec.of(task.spec)
        self.denoiser.knows(codec.view)
        request = replace(request, seeds=seeds)
        drawn, losses, calls = [], [], 0
        for low in range(0, len(seeds), at_once):
            part = request.part(low, low + at_once)
            noise = torch.stack([_noise(s, codec.size) for s in part.seeds]).to(self.device)
            start, conditions, elements = self._conditioned(part, task, codec)
            if "start_loss" in conditions[1]:
                losses.append(conditions[1]["start_loss"].cpu())
            denoise = _Guided(self.denoiser, codec, start, conditions[0], request.guidance)
            process = self.card.denoiser.process
            found = reverse(denoise, noise, request.evaluations, kind=process, seeds=part.seeds)
            flat = codec.restore(found.flat)
            drawn.append((flat if elements is None else elements.undo(flat)).cpu())
            calls = denoise.calls
        return Drawn(torch.cat(drawn), calls), torch.cat(losses) if losses else None

    def _conditioned(self, request: Request, task: Classification, codec: Codec) -> Any:
        """Normalised starts, conditions with what is known of the starts, and the elements that made them canonical."""
        size, names = len(request.seeds), self.card.denoiser.conditions
        known = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in request.asked.items()}
        support = request.support
        if support is not None and support[1].ndim == 1:
            support = support[0].expand(size, -1, -1), support[1].expand(size, -1)
        if request.starts is None:
            conditions = Conditions.of(names, size, known)
            conditions = conditions.without(started=torch.ones(size, dtype=torch.bool))
            if support is not None:
                conditions = replace(conditions, images=support[0].cpu(), labels=support[1].cpu())
            return torch.zeros(size, codec.size, device=self.device), (conditions.to(self.device), {}), None
        starts = request.starts.to(self.device)
        if support is not None:
            metrics = task.judge(starts, support[0].to(self.device), support[1].to(self.device))
        else:
            metrics = task.measure(starts, "prompt")
        measured = {f"start_{name}": values for name, values in metrics.items()}
        conditions = Conditions.of(names, size, {**{k: v.cpu() for k, v in measured.items()}, **known})
        elements = codec.elements(request.starts)
        starts = starts if elements is None else elements.act(starts)
        if support is not None:  # the gradient in the order that the denoiser sees
            conditions = with_data(conditions, codec, task, starts, *(part.to(self.device) for part in support))
        return codec.normalise(starts), (conditions.to(self.device), measured), elements

    def _task_for(self, architecture: Architecture | None) -> Classification:
        """The task with networks of an architecture.

        Raises:
            MoleError: such networks do not fit the task's data, or were never seen with their activation.
        """
        if architecture is not None and not isinstance(architecture, Architecture):
            raise MoleError(f"architecture is {architecture!r}; legal is an Architecture, {self.card.architecture!r}")
        seen = sorted({known.activation for known in self.card.architectures})
        if architecture is not None and architecture.activation not in seen:
            raise MoleError(
                f"this generator has seen no {architecture.activation} networks; it knows {', '.join(seen)}"
            )
        return self.task if architecture is None else self.task.with_architecture(architecture)

    def _starts(self, starts: Any, task: Classification, seeds: Sequence[int]) -> tuple[Tensor | None, list[Any]]:
        """Plain float32 weights (n, P) on the CPU, and where each came from.

        Raises:
            MoleError: they do not fit the network, naming the tensor and both shapes where it is known.
        """
        n, size = len(seeds), task.spec.size
        if isinstance(starts, str):
            if starts not in ("fresh", "none"):
                raise MoleError(f"starts is {starts!r}; legal is 'fresh', 'none', weights ({n}, {size}), or networks")
            if starts == "none":
                return None, [{"kind": "none"} for _ in seeds]
            return task.initial(seeds), [{"kind": "fresh initialisation", "seed": s} for s in seeds]
        if isinstance(starts, Sequence):
            states = [s.state_dict() if isinstance(s, nn.Module) else s for s in starts]
            for number, state in enumerate(states):
                if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
                    raise MoleError(f"starts[{number}] is {type(state).__name__}; legal is a network or its state dict")
                try:
                    task.spec.check(state)
                except MoleError as error:
                    raise MoleError(f"starts[{number}]: {error}") from None
            starts = torch.stack([task.spec.flatten(state) for state in states]) if states else torch.empty(0, size)
        if not isinstance(starts, Tensor) or starts.shape != (n, size) or not starts.isfinite().all():
            found = tuple(starts.shape) if isinstance(starts, Tensor) else type(starts).__name__
            raise MoleError(f"starts: found {found}; legal is a tensor ({n}, {size}), all finite")
        plain = starts.detach().float().cpu()
        return plain, [{"kind": "given weights", "weights": weights_digest(start)} for start in plain]

    def _checked_support(self, support: Any, n: int) -> Support:
        """Images (n, K, M) and labels (n, K).

        Raises:
            MoleError: the generator reads no data, or these are not examples of its classes.
        """
        if not self.card.denoiser.data:
            raise MoleError("support: this generator was not trained to read data; legal is generator.data: true")
        try:
            images, labels = (torch.as_tensor(part) for part in support)
        except (TypeError, ValueError) as error:
            raise MoleError(f"support: {error}; legal is a pair of images (K, M) and labels (K,)") from None
        if images.ndim not in (2, 3) or labels.shape != images.shape[:-1] or images.shape[-1] != self.card.examples:
            raise MoleError(
                f"support: images {tuple(images.shape)} and labels {tuple(labels.shape)}; legal is (K, "
                f"{self.card.examples}) and (K,), or ({n}, K, {self.card.examples}) and ({n}, K)"
            )
        classes = self.task.classes
        if labels.is_floating_point() or not bool(((labels >= 0) & (labels < classes)).all()):
            wrong = sorted(set(labels[(labels < 0) | (labels >= classes)].tolist()))[:5]
            raise MoleError(f"support: labels {wrong or labels.dtype}; legal is whole numbers from 0 to {classes - 1}")
        if images.ndim == 3 and len(images) != n:
            raise MoleError(f"support: of {len(images)} networks, but {n} are asked for")
        if not images.isfinite().all():
            raise MoleError("support: some numbers of the images are not finite")
        return images.float().expand(n, -1, -1), labels.long().expand(n, -1)

    def _wanted(self, asked: Mapping[str, Any], whole: Mapping[str, Any], guidance: Any) -> dict[str, float]:
        """Conditions as numbers; everything that is wrong, at once.

        Raises:
            MoleError: an argument is not legal.
        """
        limits = {"n": (1, 2**20), "seed": (0, 2**20 - 1), "evaluations": (1, 1000)}
        faults = [
            f"{name} is {value!r}; legal is a whole number from {limits[name][0]} to {limits[name][1]}"
            for name, value in whole.items()
            if isinstance(value, bool) or not isinstance(value, int) or not limits[name][0] <= value <= limits[name][1]
        ]
        if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= 20:
            faults.append(f"guidance is {guidance!r}; legal is a number from 0 to 20")
        known, wanted = self.card.denoiser.conditions, dict[str, float]()
        for name, value in asked.items():
            if value is None:
                continue
            if (
                name == "target_error"
                and "target_accuracy" in known
                and isinstance(value, int | float | np.floating | np.integer)
            ):
                name, value = "target_accuracy", 1 - value
            if name not in known:
                faults.append(f"{name} is no condition of this generator; it knows {', '.join(known)}")
            elif name in CODES:
                if value not in CODES[name]:
                    faults.append(f"{name} is {value!r}; legal: {', '.join(CODES[name])}")
                else:
                    wanted[name] = float(CODES[name].index(str(value)))
            elif (
                isinstance(value, bool)
                or not isinstance(value, int | float | np.floating | np.integer)
                or not 0 < value < 1e6
            ):
                faults.append(f"{name} is {value!r}; legal is a number above 0")
            elif name.endswith("_accuracy") and value > 1:
                faults.append(f"{name} is {value!r}; legal is a share above 0 and up to 1")
            elif name in wanted:
                faults.append(f"{name} is asked for twice")
            else:
                wanted[name] = float(value)
        if faults:
            raise MoleError("; ".join(faults))
        if not wanted and "target_loss" in known:
            wanted["target_loss"] = self.card.ranges["loss"][0]
        return wanted

    def _warn_outside_range(self, wanted: Mapping[str, float]) -> None:
        for name, value in wanted.items():
            low, high = self.card.ranges.get(name.removeprefix("target_"), (-float("inf"), float("inf")))
            if name.startswith("target_") and not low * (1 - 1e-6) <= value <= high * (1 + 1e-6):
                warnings.warn(
                    f"{name} {value:.4g} lies outside the zoo, {low:.4g} to {high:.4g}; "
                    "the generator has seen no such network",
                    PromptWarning,
                    stacklevel=3,
                )

    def save(self, folder: str | Path) -> "Generator":
        """Write `model.safetensors`, `README.md`, then `config.json` with its digest; returns it as loaded."""
        folder = Path(folder)
        with replacing(folder / "model.safetensors") as temporary:
            parts = {"denoiser": self.denoiser, "codec": self.codec}
            save_file({f"{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()}, temporary)
        card = self.card.model_copy(update={"weights": file_digest(folder / "model.safetensors")}).sealed()
        write_text(folder / "README.md", card.page())
        write_json(folder / "config.json", card.model_dump(mode="json"))
        return type(self)(self.denoiser, self.codec, card, self.device, self._known)

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
            values = read_json(folder / "config.json")
            found = file_digest(folder / "model.safetensors")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MoleError(
                f"{path}: no generator here ({error.filename} is missing); legal is a run folder or a folder of "
                "config.json and model.safetensors, as `python train.py` writes them"
            ) from None
        if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
            raise CorruptFileError(
                f"{folder}/config.json: format {values['format']}; this version reads {FORMAT}: "
                f"{'update MOLE' if str(values['format']).isdigit() and values['format'] > FORMAT else 'train again'}"
            )
        try:
            card = parse(values)
        except ValidationError as error:
            raise CorruptFileError(f"{folder}/config.json: {error}") from None
        if card.sealed() != card:
            raise CorruptFileError(f"{folder}/config.json: altered after it was written; train again or copy it anew")
        if found != card.weights:
            raise CorruptFileError(f"{folder}/model.safetensors: truncated or altered; train again or copy it anew")
        try:
            tensors = load_file(folder / "model.safetensors")
            specs = [WeightSpec.of(architecture.build(seed=0)) for architecture in card.architectures]
            codec = Codec(specs[0], card.denoiser, card.scales, tensors.get("codec.reference"))
            views = [codec.of(spec).view for spec in specs]
            denoiser = make_denoiser(views, card.denoiser, numbers=card.examples)
            for name, part in (("denoiser", denoiser), ("codec", codec)):
                mine = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
                part.load_state_dict(mine)
        except (SafetensorError, RuntimeError, KeyError, TypeError, IndexError, MoleError) as error:
            raise CorruptFileError(f"{folder}: weights and configuration do not fit ({error})") from None
        try:
            place = torch.device(device)
            denoiser.to(place)
            codec.to(place)
        except (RuntimeError, AssertionError) as error:
            raise MoleError(f"device {str(device)!r}: {error}; legal is cpu, or cuda where PyTorch finds it") from None
        return cls(denoiser.eval(), codec.eval(), card, place)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str = "cpu", **download: Any) -> Self:  # pyright: ignore
        kept = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        folder = model_id if Path(model_id).is_dir() else snapshot_download(
            model_id, **{name: download[name] for name in kept if name in download}
        )  # fmt: skip
        return cls.load(folder, device)  # pyright: ignore[reportReturnType]


class _Guided:
    """The denoiser with its start and conditions, counted; the prompt may be overdone."""

    def __init__(
        self, denoiser: AnyDenoiser, codec: Codec, start: Tensor, conditions: Conditions, guidance: float
    ) -> None:
        self.denoiser, self.codec, self.start, self.conditions = denoiser, codec, start, conditions
        self.guidance, self.calls = guidance, 0
        told = [not name.startswith("start_") for name in denoiser.config.conditions]
        columns = torch.tensor(told, device=start.device).expand(len(start), -1)
        self.unprompted = conditions.without(columns)

    def __call__(self, noised: Tensor, level: Tensor) -> Tensor:
        clean = self._once(noised, level, self.conditions)
        if self.guidance == 1:
            return clean
        plain = self._once(noised, level, self.unprompted)
        return plain + self.guidance * (clean - plain)

    def _once(self, noised: Tensor, level: Tensor, conditions: Conditions) -> Tensor:
        self.calls += 1
        return self.denoiser([Networks(self.codec.view, noised, self.start, level, conditions)])[0]


def _digest(support: Support, row: int) -> dict[str, Any]:
    """What tells a support set of others."""
    images, labels = support[0][row], support[1][row]
    return {"examples": len(labels), "images": weights_digest(images), "labels": labels.tolist()}


def _noise(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a generated network."""
    packages = ("mole", "torch", "diffusers", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def load(path: str | Path, device: str | torch.device = "cpu") -> Generator:
    """Read a generator from its folder or from its run folder; see `Generator.load`."""
    return Generator.load(path, device)
