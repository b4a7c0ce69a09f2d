"""The trained generator: saved as `config.json` and `model.safetensors`, loaded, sampled.

Dimensions: N networks, P parameters, K examples, M numbers per example.
"""

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save
from torch import Tensor, nn

from mole.devices import usable_device
from mole.diffusion.card import Card, check_size, read_card
from mole.diffusion.codec import Codec
from mole.diffusion.conditions import Conditions
from mole.diffusion.denoiser import Networks
from mole.diffusion.models import AnyDenoiser, make_denoiser
from mole.diffusion.pairs import with_data
from mole.diffusion.process import Drawn, reverse
from mole.diffusion.request import (
    Request,
    Support,
    check_architecture,
    check_numbers,
    check_starts,
    check_support,
    check_wanted,
    warn_loud,
    warn_outside,
)
from mole.diffusion.samples import Samples
from mole.errors import CorruptFileError, GenerationWarning, MoleError
from mole.files import file_digest, replacing, write_json, write_text
from mole.reading.guard import check_file, check_promise
from mole.reading.tensors import read_safetensors, safetensors_header
from mole.representations import WeightSpec, weights_digest
from mole.representations.handling import Elements
from mole.revision import revision
from mole.seeding import derived
from mole.tasks import Architecture, Task, labelled, load_task


class Asked(NamedTuple):
    """A request as the denoiser takes it."""

    start: Tensor
    """(N, Z), normalised; zeros where there is none."""
    conditions: Conditions
    losses: Tensor | None
    """(N,) of the starts, on the CPU; on the support set where there is one."""
    elements: Elements | None
    """That brought the starts into canonical form."""


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
        self, model: AnyDenoiser, codec: Codec, card: Card, device: torch.device, known: Task | None = None
    ) -> None:  # other names than in the card, from which the Hugging Face mix-in would fill them
        self.denoiser, self.codec, self.card, self.device, self._known = model, codec, card, device, known
        model.requires_grad_(requires_grad=False)  # where gradients may be asked for, attention rounds otherwise

    @property
    def spec(self) -> WeightSpec:
        """Layout of the networks of its task."""
        return self.codec.spec

    @cached_property
    def task(self) -> Task:
        """The task whose networks it generates."""
        return self._known or load_task(self.card.task).to(self.device)

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
            architecture: of the networks; the generator must know what they are made of. Other widths are what
                generators of several widths are for (`configs/widths.yaml`).
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
            PromptWarning: a target lies outside what the zoo holds, or the generator has seen one architecture alone
                and another one is asked for.
        """
        faults = check_numbers({"n": n, "seed": seed, "evaluations": evaluations}, guidance)
        wanted, more = check_wanted(self.card, asked)
        if faults or more:
            raise MoleError("; ".join([*faults, *more]))
        task = self._task_for(architecture)
        codec = self.codec.of(task.spec)
        warn_outside(self.card, wanted, architecture)
        seeds = [derived("noise", seed, index) for index in range(n)]
        given, origins = self._starts(starts, task, [derived("fresh start", seed, index) for index in range(n)])
        warn_loud(codec, given)
        data = check_support(self.card, support, n, self.task)
        request = Request(given, wanted, data, architecture, seeds, evaluations, float(guidance))
        drawn, losses = self._draw(request, task, seeds)
        if odd := (~drawn.flat.isfinite().all(1)).nonzero()[:, 0].tolist():
            more = ", ..." if len(odd) > 8 else ""
            warnings.warn(
                f"{len(odd)} of {n} generated networks have NaN or infinite weights: {', '.join(map(str, odd[:8]))}"
                f"{more}; leave them out, or train the generator with a lower train.learning_rate",
                GenerationWarning,
                stacklevel=2,
            )
        prompt: dict[str, Any] = {name: value for name, value in asked.items() if value is not None} or dict(wanted)
        if guidance != 1:
            prompt["guidance"] = float(guidance)
        common = {
            "generator": self.digest, "zoo": self.card.zoo, "prompt": prompt, "seed": seed, "drawn_together": n,
            "network_evaluations": drawn.evaluations, "architecture": task.architecture.model_dump(mode="json"),
            "versions": versions(),
        }  # fmt: skip
        records = []
        for i, origin in enumerate(origins):
            start = origin if losses is None else {**origin, "loss": float(losses[i])}
            told = {} if data is None else {"support": _digest(data, i)}
            records.append({"weights": weights_digest(drawn.flat[i]), "index": i, "start": start, **common, **told})
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
        self, request: Request, task: Task, seeds: Sequence[int], at_once: int = 256
    ) -> tuple[Drawn, Tensor | None]:
        """Weights and, where there are starts, their losses; both on the CPU."""
        codec = self.codec.of(task.spec)
        self.denoiser.knows(codec.view)
        request = replace(request, seeds=seeds)
        drawn, losses, calls = [], [], 0
        for low in range(0, len(seeds), at_once):
            part = request.part(low, low + at_once)
            odd = torch.zeros(len(part.seeds), dtype=torch.bool)
            if part.starts is not None:  # from a network that is none comes none
                odd = ~part.starts.isfinite().all(1).cpu()
                part = replace(part, starts=part.starts.masked_fill(odd[:, None].to(part.starts.device), 0))
            noise = torch.stack([_noise(s, codec.size) for s in part.seeds]).to(self.device)
            asked = self._asked(part, task, codec)
            if asked.losses is not None:
                losses.append(asked.losses)
            denoise = _Guided(self.denoiser, codec, asked, request.guidance)
            process = self.card.denoiser.process
            found = reverse(denoise, noise, request.evaluations, kind=process, seeds=part.seeds)
            flat = codec.restore(found.flat)
            flat = (flat if asked.elements is None else asked.elements.undo(flat)).cpu()
            drawn.append(flat.masked_fill(odd[:, None], torch.nan))
            calls = denoise.calls
        return Drawn(torch.cat(drawn), calls), torch.cat(losses) if losses else None

    def _asked(self, request: Request, task: Task, codec: Codec) -> Asked:
        """A request with what can be measured of its starts."""
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
            nothing = torch.zeros(size, codec.size, device=self.device)
            return Asked(nothing, conditions.to(self.device), None, None)
        starts = codec.quieted(request.starts.to(self.device))
        if support is not None:
            measured = labelled(task).judge(starts, support[0].to(self.device), support[1].to(self.device))
        else:
            measured = task.measure(starts, "prompt")
        metrics = {f"start_{name}": values.cpu() for name, values in measured.items()}
        conditions = Conditions.of(names, size, {**{k: v for k, v in metrics.items() if k in names}, **known})
        elements = codec.elements(starts.cpu())
        starts = starts if elements is None else elements.act(starts)
        if support is not None:  # the gradient in the order that the denoiser sees
            conditions = with_data(conditions, codec, task, starts, *(part.to(self.device) for part in support))
        return Asked(codec.normalise(starts), conditions.to(self.device), metrics["start_loss"], elements)

    def _task_for(self, architecture: Architecture | None) -> Task:
        """The task with networks of an architecture.

        Raises:
            MoleError: such networks do not fit the task's data, or were never seen with their activation.
        """
        if architecture is not None:
            check_architecture(self.card, architecture)
        return self.task if architecture is None else self.task.with_architecture(architecture)

    def _starts(self, starts: Any, task: Task, seeds: Sequence[int]) -> tuple[Tensor | None, list[Any]]:
        """Plain float32 weights (n, P) on the CPU, and where each came from.

        Raises:
            MoleError: they do not fit the network, naming the tensor and both shapes where it is known.
        """
        if isinstance(starts, str) and starts == "none":
            return None, [{"kind": "none"} for _ in seeds]
        if isinstance(starts, str) and starts == "fresh":
            return task.initial(seeds), [{"kind": "fresh initialisation", "seed": s} for s in seeds]
        plain = check_starts(starts, task.spec, len(seeds))
        return plain, [{"kind": "given weights", "weights": weights_digest(start)} for start in plain]

    def save(self, folder: str | Path) -> "Generator":
        """Write `model.safetensors`, `README.md`, then `config.json` with its digest; returns it as loaded."""
        folder = Path(folder)
        with replacing(folder / "model.safetensors") as temporary:
            parts = {"denoiser": self.denoiser, "codec": self.codec}
            temporary.write_bytes(
                save({f"{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()})
            )
        card = self.card.model_copy(update={"weights": file_digest(folder / "model.safetensors")}).sealed()
        write_text(folder / "README.md", card.page())
        write_json(folder / "config.json", card.model_dump(mode="json"))
        return type(self)(self.denoiser, self.codec, card, self.device, self._known)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Generator":
        """Read a generator from its folder, or from the folder of the run that trained it.

        Raises:
            MoleError: there is none, or no such device.
            CorruptFileError: a file is not what was written, or of another format.
        """
        folder, place = Path(path), usable_device(device)
        folder = folder / "generator" if (folder / "generator").is_dir() else folder
        try:
            card = read_card(folder / "config.json")
            check_promise(folder / "model.safetensors", check_file(folder / "model.safetensors"))
            found = file_digest(folder / "model.safetensors")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MoleError(
                f"{path}: no generator here ({error.filename} is missing); legal is a run folder or a folder of "
                "config.json and model.safetensors, as `python train.py` writes them"
            ) from None
        except OSError as error:
            raise MoleError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
        if found != card.weights:
            raise CorruptFileError(f"{folder}/model.safetensors: truncated or altered; train again or copy it anew")
        check_size(card, safetensors_header(folder / "model.safetensors"), folder)
        try:
            tensors = read_safetensors(folder / "model.safetensors")
            if odd := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
                raise MoleError(f"{len(odd)} tensors hold NaN or infinity, {odd[0]} first: its training diverged")
            specs = [WeightSpec.of(architecture.build(seed=0)) for architecture in card.architectures]
            codec = Codec(specs[0], card.denoiser, card.scales, tensors.get("codec.reference"))
            views = [codec.of(spec).view for spec in specs]
            with torch.device("meta"):  # a card that asks for more than the file holds gets no memory
                wanted = make_denoiser(views, card.denoiser, numbers=card.examples).state_dict()
            if {f"denoiser.{k}": t.shape for k, t in wanted.items()} != _shapes(tensors, "denoiser."):
                raise MoleError("the denoiser has other tensors than the card's")
            denoiser = make_denoiser(views, card.denoiser, numbers=card.examples)
            for name, part in (("denoiser", denoiser), ("codec", codec)):
                mine = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
                part.load_state_dict(mine)
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError, MemoryError, MoleError) as error:
            raise CorruptFileError(f"{folder}: weights and configuration do not fit ({error})") from None
        return cls(denoiser.to(place).eval(), codec.to(place).eval(), card, place)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Read a generator from a folder, or from a repository of the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: the folder, or `owner/name`.
            options: `device`, and what the hub library takes (`revision`, `cache_dir`, `token`, ...).

        Raises:
            MoleError: it is neither, or there is no generator in it.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except HFValidationError:
            raise MoleError(
                f"{pretrained_model_name_or_path}: no folder here; legal is a folder of config.json and "
                "model.safetensors, or owner/name of a repository on the hub"
            ) from None

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str = "cpu", **download: Any) -> Self:  # pyright: ignore
        kept = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        folder = model_id if Path(model_id).is_dir() else snapshot_download(
            model_id, **{name: download[name] for name in kept if name in download}
        )  # fmt: skip
        return cls.load(folder, device)  # pyright: ignore[reportReturnType]


class _Guided:
    """The denoiser with its start and conditions, counted; the prompt may be overdone."""

    def __init__(self, denoiser: AnyDenoiser, codec: Codec, asked: Asked, guidance: float) -> None:
        self.denoiser, self.codec, self.asked, self.guidance, self.calls = denoiser, codec, asked, guidance, 0
        told = [not name.startswith("start_") for name in denoiser.config.conditions]
        columns = torch.tensor(told, device=asked.start.device).expand(len(asked.start), -1)
        self.unprompted = asked.conditions.without(columns)

    def __call__(self, noised: Tensor, level: Tensor) -> Tensor:
        clean = self._once(noised, level, self.asked.conditions)
        if self.guidance == 1:
            return clean
        plain = self._once(noised, level, self.unprompted)
        return plain + self.guidance * (clean - plain)

    def _once(self, noised: Tensor, level: Tensor, conditions: Conditions) -> Tensor:
        self.calls += 1
        return self.denoiser([Networks(self.codec.view, noised, self.asked.start, level, conditions)])[0]


def _digest(support: Support, row: int) -> dict[str, Any]:
    """What tells a support set of others."""
    images, labels = support[0][row], support[1][row]
    return {"examples": len(labels), "images": weights_digest(images), "labels": labels.tolist()}


def _shapes(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}


def _noise(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def versions() -> dict[str, Any]:
    """Versions of what decides the bits of a generated network; of MOLE the commit too, and whether it was clean."""
    packages = ("torch", "diffusers", "numpy", "safetensors")
    found = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"mole": revision().as_dict(), **found}


def load(path: str | Path, device: str | torch.device = "cpu") -> Generator:
    """Read a generator from its folder or from its run folder; see `Generator.load`."""
    return Generator.load(path, device)
