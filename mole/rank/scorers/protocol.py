"""What a scorer is given, what it says of itself, and where it is found by its name.

Dimensions: n examples, D features, C outputs of the network, K classes of the data.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.errors import MoleError

Need = Literal["classes", "targets", "outputs", "own classes"]
"""`classes`: labels; `targets`: labels or numbers; `outputs`: what the network says itself; `own classes`: outputs that
are the data's classes."""


@dataclass(frozen=True)
class Evidence:
    """What one network made of the data, and what is known of them."""

    features: Tensor
    """(n, D)."""
    outputs: Tensor | None = None
    """(n, C), before any softmax."""
    classes: Tensor | None = None
    """(n,) int64."""
    targets: Tensor | None = None
    """(n, T) numbers, where there are no classes."""
    seed: int = 0
    """Of whatever is drawn."""

    @cached_property
    def x(self) -> Tensor:
        """Features (n, D) in float64."""
        return self.features.double()

    @cached_property
    def member(self) -> Tensor:
        """Classes (n,) numbered from 0 without gaps."""
        assert self.classes is not None
        return self.classes.unique(return_inverse=True)[1]

    @cached_property
    def one_hot(self) -> Tensor:
        """(n, K) float64."""
        return F.one_hot(self.member).double()

    @cached_property
    def y(self) -> Tensor:
        """What shall be told, (n, T) float64: one column per class, or the targets."""
        if self.targets is not None:
            return self.targets.double().reshape(len(self.targets), -1)
        return self.one_hot

    @cached_property
    def probabilities(self) -> Tensor:
        """(n, C) float64: softmax of the outputs."""
        assert self.outputs is not None
        return self.outputs.double().softmax(1)

    def rows(self, index: Tensor) -> "Evidence":
        """Some of the examples."""
        parts = {name: getattr(self, name) for name in ("features", "outputs", "classes", "targets")}
        return replace(self, **{name: None if part is None else part[index] for name, part in parts.items()})

    def has(self) -> set[Need]:
        """What scorers can be given of this."""
        found: set[Need] = set()
        if self.classes is not None:
            found |= {"classes", "targets"}
        if self.targets is not None:
            found.add("targets")
        if self.outputs is not None:
            found.add("outputs")
            if self.classes is not None and int(self.classes.max()) < self.outputs.shape[1]:
                found.add("own classes")
        return found


@dataclass(frozen=True)
class Scorer:
    """A way to say from what a network makes of data how well it would serve them: higher is better."""

    name: str
    needs: tuple[Need, ...]
    source: str
    """Where it was published."""
    cost: str
    """Operations, in n, D, K."""
    score: Callable[[Evidence], float]

    def __call__(self, evidence: Evidence) -> float:
        """The score of one network.

        Raises:
            MoleError: something that it needs is not known, or the labels are of one class only.
        """
        if lacking := [need for need in self.needs if need not in evidence.has()]:
            how = " (a network's one tensor, or several with one named logits)" if "outputs" in lacking else ""
            raise MoleError(f"{self.name} needs {', '.join(lacking)}{how}")
        if "classes" in self.needs and evidence.one_hot.shape[1] < 2:
            raise MoleError(f"{self.name} needs at least two classes; found one")
        return float(self.score(evidence))


REGISTRY: dict[str, Scorer] = {}


def scorer(
    name: str, *, needs: Sequence[Need], source: str, cost: str
) -> Callable[[Callable[[Evidence], float]], Scorer]:
    """Make a function a scorer, to be found by its name."""

    def register(score: Callable[[Evidence], float]) -> Scorer:
        REGISTRY[name] = Scorer(name, tuple(needs), source, cost, score)
        return REGISTRY[name]

    return register


ENSEMBLE = "mean_rank"
AGREEMENT = "agreement"
"""Scores that a network has only beside others: no scorers, but legal names."""


def find_scorers(names: Sequence[str]) -> list[Scorer]:
    """Scorers by their names.

    Raises:
        MoleError: some are not known; the nearest names are given.
    """
    unknown = [name for name in names if name not in REGISTRY]
    if unknown:
        legal = [*sorted(REGISTRY), AGREEMENT, ENSEMBLE]
        near = dict.fromkeys(n for name in unknown for n in difflib.get_close_matches(name, legal, n=3, cutoff=0.3))
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise MoleError(f"no scorer {', '.join(unknown)}{hint}; legal: {', '.join(legal)}")
    return [REGISTRY[name] for name in names]


def centred(values: Tensor) -> Tensor:
    """Minus the mean over examples."""
    return values - values.mean(0)


def few(evidence: Evidence, most: int) -> Evidence:
    """At most `most` examples, drawn by the seed."""
    if len(evidence.features) <= most:
        return evidence
    generator = torch.Generator().manual_seed(evidence.seed)
    return evidence.rows(torch.randperm(len(evidence.features), generator=generator)[:most])
