"""What is asked of a generator, checked before anything is computed.

Dimensions: N networks, P parameters, K examples, M numbers per example.
"""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mole.checkpoints.recipes import CODES
from mole.diffusion.card import Card
from mole.diffusion.codec import Codec
from mole.errors import MoleError, PromptWarning
from mole.representations import WeightSpec
from mole.tasks import Architecture, Task, labelled

Support = tuple[Tensor, Tensor]
"""Labelled examples of the data: images (K, M) or (N, K, M), labels (K,) or (N, K)."""

LARGEST = 1e6
"""No weight and no number of an image is as large."""
LIMITS = {"n": (1, 2**20), "seed": (0, 2**20 - 1), "evaluations": (1, 1000)}


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


def check_numbers(whole: Mapping[str, Any], guidance: Any) -> list[str]:
    """What is wrong with the numbers of `Generator.sample`, in words."""
    faults = []
    for name, value in whole.items():
        low, high = LIMITS[name]
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
            faults.append(f"{name} is {value!r}; legal is a whole number from {low} to {high}")
    if not _is_number(guidance) or not 0 <= guidance <= 20:
        faults.append(f"guidance is {guidance!r}; legal is a number from 0 to 20")
    return faults


def check_wanted(card: Card, asked: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Conditions as numbers, and what is wrong with the others, in words; if nothing is asked, the zoo's best loss."""
    known, wanted, faults = card.denoiser.conditions, dict[str, float](), list[str]()
    for name, value in asked.items():
        if value is None:
            continue
        if name == "target_error" and "target_accuracy" in known and _is_number(value):
            name, value = "target_accuracy", 1 - value
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            faults.append(f"{name} is no condition of this generator; it knows {', '.join(known)}{hint}")
        elif name in CODES:
            if value in CODES[name]:
                wanted[name] = float(CODES[name].index(value))
            else:
                faults.append(f"{name} is {value!r}; legal: {', '.join(CODES[name])}")
        elif not _is_number(value) or not 0 <= value < 1e6:
            faults.append(f"{name} is {value!r}; legal is a number from 0 to below a million")
        elif name.endswith("_accuracy") and value > 1:
            faults.append(f"{name} is {value!r}; legal is a share from 0 to 1")
        elif name in wanted:
            faults.append(f"{name} is asked for twice")
        else:
            wanted[name] = float(value)
    return wanted or {"target_loss": card.ranges["loss"][0]}, faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)


def warn_outside(card: Card, wanted: Mapping[str, float], architecture: Architecture | None = None) -> None:
    """Say which targets lie outside what the zoo holds, and whether networks like these were seen."""
    if architecture is not None and [architecture] != card.architectures and len(card.architectures) == 1:
        warnings.warn(
            f"this generator has seen networks of widths {card.architecture.widths} alone; what it makes of "
            f"{architecture.widths} may be poor: train one on several (harvest.vary.width)",
            PromptWarning,
            stacklevel=3,
        )
    for name, value in wanted.items():
        low, high = card.ranges.get(name.removeprefix("target_"), (-float("inf"), float("inf")))
        if name.startswith("target_") and not low * (1 - 1e-6) <= value <= high * (1 + 1e-6):
            warnings.warn(
                f"{name} {value:.4g} lies outside the zoo, {low:.4g} to {high:.4g}; "
                "the generator has seen no such network",
                PromptWarning,
                stacklevel=3,
            )


def warn_loud(codec: Codec, starts: Tensor | None) -> None:
    """Say how many starts are larger than any that the generator has seen."""
    if starts is not None and (loud := int((codec.quieted(starts) != starts).any(1).sum())):
        warnings.warn(
            f"{loud} of {len(starts)} starts have weights far larger than the training networks'; these tensors are "
            "brought to the scale of theirs",
            PromptWarning,
            stacklevel=3,
        )


def check_architecture(card: Card, architecture: Any) -> None:
    """Whether the generator has seen networks of this kind.

    Raises:
        MoleError: it is no architecture, none with such an activation was seen, or those that were have a network in
            common that others have not.
    """
    if not isinstance(architecture, Architecture):
        raise MoleError(f"architecture is {architecture!r}; legal is an Architecture, {card.architecture!r}")
    seen = sorted({known.activation for known in card.architectures})
    if architecture.activation not in seen:
        raise MoleError(f"this generator has seen no {architecture.activation} networks; it knows {', '.join(seen)}")
    if card.denoiser.common and architecture not in card.architectures:
        raise MoleError(
            f"this generator makes networks of widths {card.architecture.widths} alone, which have a network in "
            "common; legal for others is one that was trained with generator.common false"
        )


def check_starts(starts: Any, spec: WeightSpec, n: int) -> Tensor:
    """Given weights or networks as plain float32 weights (n, P) on the CPU.

    Raises:
        MoleError: they do not fit the network, naming the tensor and both shapes where it is known.
    """
    if isinstance(starts, str):
        raise MoleError(f"starts is {starts!r}; legal is 'fresh', 'none', weights ({n}, {spec.size}), or networks")
    if isinstance(starts, nn.Module | Mapping):
        starts = [starts]
    if isinstance(starts, Sequence):
        states = [start.state_dict() if isinstance(start, nn.Module) else start for start in starts]
        for number, state in enumerate(states):
            if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
                raise MoleError(f"starts[{number}] is {type(state).__name__}; legal is a network or its state dict")
            try:
                spec.check(state)
            except MoleError as error:
                raise MoleError(f"starts[{number}]: {error}") from None
        starts = torch.stack([spec.flatten(state) for state in states]) if states else torch.empty(0, spec.size)
    if not isinstance(starts, Tensor) or starts.shape != (n, spec.size) or starts.is_complex():
        found = f"{tuple(starts.shape)} {starts.dtype}" if isinstance(starts, Tensor) else type(starts).__name__
        raise MoleError(f"starts: found {found}; legal is a tensor ({n}, {spec.size}) of real numbers, or networks")
    plain = starts.detach().float().cpu()
    if not bool((plain.abs() < LARGEST).all()):
        raise MoleError(f"starts: some weights are NaN or {LARGEST:g} and above; legal is finite ones")
    return plain


def check_support(card: Card, support: Any, n: int, task: Task) -> Support | None:
    """Images (n, K, M) and labels (n, K), or nothing where the generator reads none.

    Raises:
        MoleError: the generator reads no data, or needs some, or these are not examples of its classes.
    """
    numbers = card.examples
    if support is None:
        if card.denoiser.data:
            raise MoleError(
                "support: this generator is told by labelled examples what its networks are for; give images "
                f"(K, {numbers}) and labels (K,)"
            )
        return None
    if not card.denoiser.data:
        raise MoleError("support: this generator reads no data; those of sub-tasks do (configs/tasks.yaml)")
    try:
        images, labels = (torch.as_tensor(part) for part in support)
    except (TypeError, ValueError) as error:
        raise MoleError(f"support: {error}; legal is a pair of images (K, M) and labels (K,)") from None
    wrong_shape = images.ndim not in (2, 3) or labels.shape != images.shape[:-1] or images.shape[-1] != numbers
    if wrong_shape or not labels.numel() or images.is_complex():
        raise MoleError(
            f"support: images {tuple(images.shape)} and labels {tuple(labels.shape)}; legal is (K, "
            f"{numbers}) and (K,), or ({n}, K, {numbers}) and ({n}, K)"
        )
    classes = labelled(task).classes
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < classes)).all()):
        wrong = sorted(set(labels[(labels < 0) | (labels >= classes)].tolist()))[:5]
        raise MoleError(f"support: labels {wrong or labels.dtype}; legal is whole numbers from 0 to {classes - 1}")
    if images.ndim == 3 and len(images) != n:
        raise MoleError(f"support: of {len(images)} networks, but {n} are asked for")
    if not bool((images.float().abs() < LARGEST).all()):
        raise MoleError(f"support: some numbers of the images are not finite, or {LARGEST:g} and above")
    return images.float().expand(n, -1, -1), labels.long().expand(n, -1)
