"""What is to be ranked and on what, checked before any network is loaded.

Dimensions: n examples, T numbers to be told.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mole.errors import MoleError
from mole.rank.scorers import Evidence, Scorer, find_scorers
from mole.rank.scorers.protocol import AGREEMENT, ENSEMBLE

Data = tuple[Tensor, Tensor | None]
"""Inputs (n, ...), and labels (n,) int64, numbers to be told (n,) or (n, T), or nothing."""

LABELLED = ("class_mean", "neuralrank", "leep", "knn", "logme")
UNLABELLED = ("mutual_information", "kmeans", "confidence")
TARGETS = ("ridge", "logme")


@dataclass(frozen=True)
class Candidate:
    """A network to be ranked."""

    name: str
    load: Callable[[], nn.Module]
    provenance: dict[str, Any] = field(default_factory=dict)
    """Plain values: where it came from."""


def check_request(names: Sequence[str] | None, data: Data) -> list[Scorer]:
    """The scorers that are asked for, or a good choice.

    Raises:
        MoleError: one is not known or cannot be had with these labels, or labels and inputs do not fit.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise MoleError(f"data are {type(data).__name__}; legal is (inputs, labels), or (inputs, None) without labels")
    if isinstance(names, str) or (names is not None and not names):
        raise MoleError(f"scorers is {names!r}; legal is a list of names, or nothing for a good choice")
    inputs, labels = data
    if not all(part is None or isinstance(part, Tensor) for part in data):
        raise MoleError(f"data are {', '.join(type(part).__name__ for part in data)}; legal is tensors of PyTorch")
    if labels is not None and not labels.is_floating_point() and labels.ndim != 1:
        raise MoleError(f"labels {tuple(labels.shape)}; legal is ({len(inputs)},)")
    if labels is not None and len(labels) != len(inputs):
        raise MoleError(f"{len(inputs)} inputs and {len(labels)} labels; legal is one label per input")
    for name, part in (("inputs", inputs), ("labels", labels)):
        if part is not None and not bool(part.isfinite().all()):
            raise MoleError(f"{name} hold NaN or infinity; legal are finite numbers")
    if len(inputs) < 3:
        raise MoleError(f"{len(inputs)} inputs; legal is 3 or more")
    if names is None:
        names = UNLABELLED if labels is None else TARGETS if labels.is_floating_point() else LABELLED
    chosen = find_scorers([name for name in names if name not in (ENSEMBLE, AGREEMENT)])
    if not chosen and AGREEMENT not in names:
        raise MoleError(f"scorers: {ENSEMBLE} needs others to take the mean of")
    has = evidence_of(torch.zeros(len(inputs), 1), torch.zeros(len(inputs), 1), labels, 0).has()
    unfit = [s.name for s in chosen if set(s.needs) - has - {"own classes"}]
    if AGREEMENT in names and labels is not None and labels.is_floating_point():
        unfit.append(AGREEMENT)
    if unfit:
        numbers = "numbers; classes are whole ones, of an integer type"
        kind = "none" if labels is None else numbers if labels.is_floating_point() else "classes"
        raise MoleError(f"{', '.join(unfit)} cannot be had with these labels ({kind})")
    if labels is not None and not labels.is_floating_point() and len(labels.unique()) < 2:
        raise MoleError(f"labels are all {int(labels[0])}; legal is two classes or more")
    if labels is not None and not labels.is_floating_point() and int(labels.min()) < 0:
        raise MoleError(f"labels go down to {int(labels.min())}; legal is 0 and above")
    return chosen


def listed(networks: Iterable[Candidate] | Mapping[str, nn.Module]) -> list[Candidate]:
    """Networks as candidates.

    Raises:
        MoleError: there are none, or two have one name.
    """
    if isinstance(networks, Mapping):
        found = [Candidate(str(name), partial(_itself, network)) for name, network in networks.items()]
    else:
        found = list(networks)
    if strange := [network for network in found if not isinstance(network, Candidate)]:
        raise MoleError(f"networks hold {type(strange[0]).__name__}; legal is {{name: module}}, or candidates")
    if not found:
        raise MoleError("there are no networks to rank")
    names = [candidate.name for candidate in found]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise MoleError(f"names of networks must differ; several are called {', '.join(twice[:3])}")
    return found


def _itself(network: nn.Module) -> nn.Module:
    return network


def evidence_of(features: Tensor, outputs: Tensor, labels: Tensor | None, seed: int) -> Evidence:
    """What scorers are given: labels are classes where they are whole numbers, else targets."""
    if labels is not None and labels.is_floating_point():
        return Evidence(features, outputs if outputs.shape[1] else None, targets=labels, seed=seed)
    return Evidence(features, class_logits(outputs), classes=None if labels is None else labels.long(), seed=seed)


def class_logits(outputs: Tensor) -> Tensor | None:
    """Outputs (n, C) as logits of classes.

    One column is the logit of the second of two classes. Rows of probabilities become their logarithms, which softmax
    turns back. None where there are no columns. What a sigmoid or a softmax at the end was given, `see` finds.
    """
    if not outputs.shape[1]:
        return None
    if outputs.shape[1] == 1:
        return torch.cat([torch.zeros_like(outputs), outputs], 1)
    shares = float(outputs.min()) >= 0 and float(outputs.max()) <= 1
    if shares and torch.allclose(outputs.sum(1), torch.ones(len(outputs), dtype=outputs.dtype), atol=1e-3):
        return outputs.double().clamp_min(1e-30).log().to(outputs.dtype)
    return outputs


def labels_of(labels: Tensor | None) -> Tensor | None:
    """Labels as classes where they are truth values, or 0. and 1., as losses of one logit want them; else as they
    are."""
    if labels is None or not (labels.is_floating_point() or labels.dtype == torch.bool):
        return labels
    return labels.long() if labels.ndim == 1 and bool(((labels == 0) | (labels == 1)).all()) else labels


def as_data(data: Any) -> Any:
    """A pair of inputs and labels as tensors, from tensors, arrays of NumPy or lists; anything else as it is."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return data
    try:
        inputs, labels = (None if part is None else torch.as_tensor(part) for part in data)
        if labels is not None and labels.dtype in (torch.uint16, torch.uint32, torch.uint64):
            labels = labels.to(torch.int64)
    except (TypeError, ValueError, RuntimeError):
        return data
    return inputs, labels_of(labels)
