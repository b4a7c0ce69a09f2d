"""Which of these networks suits my data? A table of scores, one row per network.

Dimensions: n examples, N networks.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole.errors import MoleError
from mole.rank.agreement import mean_rank
from mole.rank.features import LAST_HIDDEN, layer_names, see
from mole.rank.scorers import Evidence, Scorer, find_scorers

Data = tuple[Tensor, Tensor | None]
"""Inputs (n, ...), and labels (n,) int64, numbers to be told (n,) or (n, T), or nothing."""

Progress = Callable[[int], None]
"""Told the networks done."""

LABELLED = ("neuralrank", "silhouette", "class_mean", "h_score_shrunk", "knn", "logme")
UNLABELLED = ("mutual_information", "coding_rate", "kmeans", "confidence")
TARGETS = ("ridge", "logme")
ENSEMBLE = "mean_rank"


@dataclass(frozen=True)
class Candidate:
    """A network to be ranked."""

    name: str
    load: Callable[[], nn.Module]
    provenance: dict[str, Any] = field(default_factory=dict)
    """Plain values: where it came from."""


@dataclass(frozen=True)
class Row:
    """What is known of one network."""

    name: str
    scores: dict[str, float]
    """By scorer; one that could not be had is not there."""
    reason: str
    """Why scores are missing; empty if none are."""
    seconds: float
    digest: str
    """SHA-256 of the weights; empty where they could not be loaded."""
    provenance: dict[str, Any]
    resampled: list[float] = field(default_factory=list)
    """Scores of the first scorer on bootstrap samples of the examples, the same samples for every network."""


@dataclass(frozen=True)
class Leaderboard:
    """Networks from best to worst by `by`; those without a score come last, in the order they were given."""

    rows: list[Row]
    by: str

    @classmethod
    def of(cls, rows: Sequence[Row], scorers: Sequence[str], by: str) -> "Leaderboard":
        """Rows in order; with the mean rank beside, where there are several scorers."""
        rows = list(rows)
        if len(scorers) > 1:
            table = torch.tensor([[row.scores.get(name, float("nan")) for row in rows] for name in scorers])
            ensemble = mean_rank(table).tolist()
            rows = [replace(row, scores={**row.scores, ENSEMBLE: value}) if row.scores else row
                    for row, value in zip(rows, ensemble, strict=True)]  # fmt: skip
        return cls(sorted(rows, key=lambda row: (by not in row.scores, -row.scores.get(by, 0.0))), by)

    def scores(self, name: str) -> Tensor:
        """One scorer's scores (N,), NaN where there is none."""
        return torch.tensor([row.scores.get(name, float("nan")) for row in self.rows], dtype=torch.float64)

    @property
    def scorers(self) -> list[str]:
        """Names of the scorers in the table."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def best_probability(self) -> dict[str, float]:
        """By network, the share of bootstrap samples in which it is the best; ties are shared."""
        rows = [row for row in self.rows if row.resampled]
        if not rows:
            return {}
        table = torch.tensor([row.resampled for row in rows])  # (N, R)
        best = (table == table.max(0).values).double()
        shares = (best / best.sum(0)).mean(1)
        return {row.name: float(share) for row, share in zip(rows, shares, strict=True)}

    def records(self) -> list[dict[str, Any]]:
        """One flat dictionary per network, the columns of every table."""
        chance, found = self.best_probability(), []
        for place, row in enumerate(self.rows, 1):
            record: dict[str, Any] = {"rank": place if self.by in row.scores else None, "name": row.name}
            record |= {name: row.scores.get(name) for name in self.scorers}
            if chance:
                ends = torch.tensor(row.resampled).quantile(torch.tensor([0.05, 0.95])) if row.resampled else None
                record |= {"low": None if ends is None else float(ends[0])}
                record |= {"high": None if ends is None else float(ends[1])}
                record |= {"best_probability": chance.get(row.name)}
            record |= {"seconds": row.seconds, "reason": row.reason, "digest": row.digest}
            found.append(record | {"provenance": json.dumps(row.provenance, sort_keys=True)})
        return found


def leaderboard(
    networks: Iterable[Candidate] | Mapping[str, nn.Module],
    data: Data,
    *,
    scorers: Sequence[str] | None = None,
    layer: str | int = LAST_HIDDEN,
    lacking: str = "row",
    bootstrap: int = 0,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    seed: int = 0,
    kept: Path | None = None,
    progress: Progress = lambda done: None,
) -> Leaderboard:
    """Score networks on data, and order them by the first scorer.

    Args:
        networks: modules by their names, or candidates that are loaded one at a time.
        data: inputs, with labels, numbers, or neither.
        scorers: by name (`mole.rank.REGISTRY`); a good choice by default. Several also give their `mean_rank`, which
            may be named first.
        layer: whose outputs are read, by name or place, or what the last layer reads.
        lacking: what a network without that layer is: a `row` with its reason, or an `error` that names all of them.
        bootstrap: samples of the examples, for intervals and the probability of being best.
        batch_size: inputs at once.
        device: where networks run.
        seed: of what scorers draw, and of the bootstrap.
        kept: file of finished rows, one JSON object per line; the same call again goes on from it.
        progress: told the networks done.

    Raises:
        MoleError: there are no networks, a scorer is not known, labels do not fit the inputs, or, where that is asked
            for, a layer is lacking.
    """
    chosen, candidates = check_request(scorers, data), listed(networks)
    settings = json.dumps([[s.name for s in chosen], str(layer), bootstrap, seed, _digest(data)])
    finished, rows = _Finished(kept, settings), list[Row]()
    for done, candidate in enumerate(candidates, 1):
        rows.append(_row(candidate, data, chosen, layer, bootstrap, batch_size, device, seed, finished))
        progress(done)
    without = [row.name for row in rows if row.reason.startswith("layer ")]
    if lacking == "error" and without:
        raise MoleError(f"layer {layer!r} is not in {', '.join(without)}; legal is a layer of all, or lacking='row'")
    by = ENSEMBLE if scorers and scorers[0] == ENSEMBLE and len(chosen) > 1 else chosen[0].name
    return Leaderboard.of(_marked(rows), [s.name for s in chosen], by)


def check_request(names: Sequence[str] | None, data: Data) -> list[Scorer]:
    """The scorers that are asked for, or a good choice.

    Raises:
        MoleError: one is not known or cannot be had with these labels, or labels and inputs do not fit.
    """
    inputs, labels = data
    if labels is not None and len(labels) != len(inputs):
        raise MoleError(f"{len(inputs)} inputs and {len(labels)} labels; legal is one label per input")
    if len(inputs) < 3:
        raise MoleError(f"{len(inputs)} inputs; legal is 3 or more")
    if names is None:
        names = UNLABELLED if labels is None else TARGETS if labels.is_floating_point() else LABELLED
    chosen = find_scorers([name for name in names if name != ENSEMBLE])
    if not chosen:
        raise MoleError(f"scorers: {ENSEMBLE} needs others to take the mean of")
    has = evidence_of(torch.zeros(len(inputs), 1), torch.zeros(len(inputs), 1), labels, 0).has()
    unfit = [s.name for s in chosen if set(s.needs) - has - {"own classes"}]
    if unfit:
        kind = "none" if labels is None else "numbers" if labels.is_floating_point() else "classes"
        raise MoleError(f"{', '.join(unfit)} cannot be had with these labels ({kind})")
    if labels is not None and not labels.is_floating_point() and len(labels.unique()) < 2:
        raise MoleError(f"labels are all {int(labels[0])}; legal is two classes or more")
    return chosen


def listed(networks: Iterable[Candidate] | Mapping[str, nn.Module]) -> list[Candidate]:
    """Networks as candidates.

    Raises:
        MoleError: there are none.
    """
    if isinstance(networks, Mapping):
        found = [Candidate(str(name), partial(_itself, network)) for name, network in networks.items()]
    else:
        found = list(networks)
    if not found:
        raise MoleError("there are no networks to rank")
    return found


def _itself(network: nn.Module) -> nn.Module:
    return network


def evidence_of(features: Tensor, outputs: Tensor, labels: Tensor | None, seed: int) -> Evidence:
    """What scorers are given: labels are classes where they are whole numbers, else targets."""
    if labels is not None and labels.is_floating_point():
        return Evidence(features, outputs, targets=labels, seed=seed)
    return Evidence(features, outputs, classes=None if labels is None else labels.long(), seed=seed)


def _row(
    candidate: Candidate, data: Data, scorers: Sequence[Scorer], layer: str | int, bootstrap: int, batch_size: int,
    device: torch.device | str, seed: int, finished: "_Finished",
) -> Row:  # fmt: skip
    began, digest = time.perf_counter(), ""
    try:
        network = candidate.load()
        digest = _weights_digest(network)
        if (known := finished.row(candidate.name, digest)) is not None:
            return known
        seen = see(network, data[0].split(batch_size), [layer], device=device)
        evidence = evidence_of(seen.features[str(layer)], seen.outputs, data[1], seed)
        scores, reasons = _scored(scorers, evidence)
        resampled = _resampled(scorers[0], evidence, bootstrap, seed) if scorers[0].name in scores else []
    except Exception as error:  # whatever is wrong with one network is not the end of the others
        scores, resampled = {}, []
        reasons = [str(error) if isinstance(error, MoleError) else f"{type(error).__name__}: {error}"]
    reason = "; ".join(reasons)
    row = Row(candidate.name, scores, reason, time.perf_counter() - began, digest, candidate.provenance, resampled)
    if digest:
        finished.add(row)
    return row


def _scored(scorers: Sequence[Scorer], evidence: Evidence) -> tuple[dict[str, float], list[str]]:
    scores, reasons = dict[str, float](), list[str]()
    if not bool((evidence.x != evidence.x[0]).any()):
        return scores, ["features are the same for every example"]
    for scorer in scorers:
        try:
            value = scorer(evidence)
        except (MoleError, ValueError, RuntimeError) as error:
            reasons.append(f"{scorer.name}: {error}")
            continue
        if value == value and abs(value) != float("inf"):
            scores[scorer.name] = value
        else:
            reasons.append(f"{scorer.name}: {value}")
    return scores, reasons


def _resampled(scorer: Scorer, evidence: Evidence, count: int, seed: int) -> list[float]:
    generator, found = torch.Generator().manual_seed(seed), []
    size = len(evidence.features)
    for _ in range(count):
        index = torch.randint(size, (size,), generator=generator)
        try:
            found.append(scorer(evidence.rows(index)))
        except (MoleError, ValueError):  # a class that was not drawn
            found.append(float("-inf"))
    return found


def _marked(rows: list[Row]) -> list[Row]:
    """With a word where two have the same weights."""
    first: dict[str, str] = {}
    marked = []
    for row in rows:
        if row.digest and row.digest in first:
            row = replace(row, provenance={**row.provenance, "same_weights_as": first[row.digest]})
        first.setdefault(row.digest, row.name)
        marked.append(row)
    return marked


class _Finished:
    """Rows on disk, from which an interrupted ranking goes on."""

    def __init__(self, path: Path | None, settings: str) -> None:
        self.path, self.rows = path, dict[tuple[str, str], Row]()
        self.settings = hashlib.sha256(settings.encode()).hexdigest()
        for line in path.read_text().splitlines() if path is not None and path.is_file() else []:
            try:
                values = json.loads(line)
                if values.pop("settings") == self.settings:
                    row = Row(**values)
                    self.rows[row.name, row.digest] = row
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # cut off when the last ranking was killed, or not ours

    def row(self, name: str, digest: str) -> Row | None:
        return self.rows.get((name, digest))

    def add(self, row: Row) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**asdict(row), "settings": self.settings}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _weights_digest(network: nn.Module) -> str:
    found = hashlib.sha256(type(network).__name__.encode())
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _digest(data: Data) -> str:
    found = hashlib.sha256()
    for tensor in data:
        if tensor is not None:
            found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def layer_scores(
    network: nn.Module, data: Data, scorer: str = "neuralrank", *, batch_size: int = 512
) -> dict[str, float]:
    """Score of every layer in one pass over the data, the inputs first: where in a network do classes come apart?

    The contrast that Desai et al. look for is that of the last hidden layer with the inputs.
    """
    (found,) = find_scorers([scorer])
    seen = see(network, data[0].split(batch_size), layer_names(network))
    layers = {"input": data[0].flatten(1), **seen.features}
    return {name: found(evidence_of(x, seen.outputs, data[1], 0)) for name, x in layers.items()}
