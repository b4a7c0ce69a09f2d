"""Which of these networks suits my data? A table of scores, one row per network.

Dimensions: n examples, N networks, R halves of the examples.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mole.devices import usable_device
from mole.errors import MoleError, check_choice
from mole.rank.agreement import mean_rank, with_the_others
from mole.rank.features import LAST_HIDDEN, see
from mole.rank.kept import Finished, Row, data_digest, network_digest
from mole.rank.request import Candidate, Data, as_data, check_request, evidence_of, listed
from mole.rank.scorers import Scorer
from mole.rank.scorers.protocol import AGREEMENT, ENSEMBLE
from mole.rank.scoring import halves, resampled, scored

Progress = Callable[[int], None]
"""Told the networks done."""


@dataclass(frozen=True)
class Leaderboard:
    """Networks from best to worst by `by`; those without a score come last, in the order they were given."""

    rows: list[Row]
    by: str

    @classmethod
    def of(cls, rows: Sequence[Row], scorers: Sequence[str], by: str, parts: Sequence[Tensor] = ()) -> "Leaderboard":
        """Rows in order; with their agreement where answers are kept, and the mean rank of several scorers."""
        rows = _agreeing(rows, parts)
        scorers = [*scorers, *([AGREEMENT] if any(AGREEMENT in row.scores for row in rows) else [])]
        if len(scorers) > 1:
            table = torch.tensor([[row.scores.get(name, float("nan")) for row in rows] for name in scorers],
                                 dtype=torch.float64)  # fmt: skip
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

    @cached_property
    def resampled(self) -> dict[str, Tensor]:
        """By network, its scores by `by` on random halves of the examples, (R,)."""
        if self.by != ENSEMBLE:
            return {row.name: torch.tensor(row.resampled[self.by], dtype=torch.float64)
                    for row in self.rows if self.by in row.resampled}  # fmt: skip
        names = list(dict.fromkeys(name for row in self.rows for name in row.resampled))
        rows = [row for row in self.rows if row.resampled and set(names) <= set(row.resampled)]
        if not rows:
            return {}
        table = torch.tensor(
            [[row.resampled[name] for row in rows] for name in names], dtype=torch.float64
        )  # (S, N, R)
        ranks = torch.stack([mean_rank(table[:, :, part]) for part in range(table.shape[2])], 1)  # (N, R)
        return {row.name: found for row, found in zip(rows, ranks, strict=True)}

    def best_probability(self) -> dict[str, float]:
        """By network, the share of random halves on which it is the best; ties are shared."""
        if not self.resampled:
            return {}
        table = torch.stack(list(self.resampled.values()))  # (N, R)
        best = (table == table.max(0).values).double()
        return dict(zip(self.resampled, (best / best.sum(0)).mean(1).tolist(), strict=True))

    def interval(self, row: Row) -> tuple[float, float] | None:
        """Where the score would lie for other examples, with 90 %: the spread over random halves about the score.

        Scores of halves without repetition vary about as much as those of other samples of full size (Politis & Romano
        1994); their level may differ, so they are moved to the score.
        """
        if row.name not in self.resampled or self.by not in row.scores:
            return None
        found = self.resampled[row.name]
        low, high = (found - found.mean()).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        return row.scores[self.by] + low, row.scores[self.by] + high

    def records(self) -> list[dict[str, Any]]:
        """One flat dictionary per network, the columns of every table."""
        chance, found = self.best_probability(), []
        for place, row in enumerate(self.rows, 1):
            record: dict[str, Any] = {"rank": place if self.by in row.scores else None, "name": row.name}
            record |= {name: row.scores.get(name) for name in self.scorers}
            if chance:
                low, high = self.interval(row) or (None, None)
                record |= {"low": low, "high": high, "best_probability": chance.get(row.name)}
            record |= {"seconds": row.seconds, "reason": row.reason, "digest": row.digest}
            found.append(record | {"provenance": json.dumps(row.provenance, sort_keys=True)})
        return found


def leaderboard(
    networks: Iterable[Candidate] | Mapping[str, nn.Module],
    data: Data,
    *,
    scorers: Sequence[str] | None = None,
    layer: str | int = LAST_HIDDEN,
    lacking: Literal["row", "error"] = "row",
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
            may be named first; `agreement` is how often a network gives the answer of another one.
        layer: whose outputs are read, by name or place, or what the last layer reads.
        lacking: what a network without that layer is: a `row` with its reason, or an `error` that names all of them.
        bootstrap: random halves of the examples, for intervals and the probability of being best.
        batch_size: inputs at once.
        device: where networks run.
        seed: of what scorers draw, and of the bootstrap.
        kept: file of finished rows, one JSON object per line; the same call again goes on from it.
        progress: told the networks done.

    Raises:
        MoleError: there are no networks, a scorer is not known, labels do not fit the inputs, there is no such device,
            or, where that is asked for, a layer is lacking.
    """
    data = as_data(data)
    chosen, candidates, device = check_request(scorers, data), listed(networks), usable_device(device)
    check_choice("lacking", lacking, ("row", "error"))
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or bootstrap < 0:
        raise MoleError(f"bootstrap is {bootstrap!r}; legal is a whole number of at least 0")
    agreement = scorers is not None and AGREEMENT in scorers
    settings = json.dumps([[s.name for s in chosen], agreement, str(layer), bootstrap, seed, data_digest(data)])
    finished, rows, parts = Finished(kept, settings), list[Row](), halves(data, bootstrap, seed)
    for done, candidate in enumerate(candidates, 1):
        rows.append(_row(candidate, data, chosen, layer, parts, batch_size, device, seed, finished, agreement))
        progress(done)
    without = [row.name for row in rows if row.reason.startswith("no layer ")]
    if lacking == "error" and without:
        raise MoleError(f"layer {layer!r} is not in {', '.join(without)}; legal is a layer of all, or lacking='row'")
    judges = [s.name for s in chosen] + [AGREEMENT] * agreement
    by = scorers[0] if scorers and (scorers[0] != ENSEMBLE or len(judges) > 1) else judges[0]
    return Leaderboard.of(_marked(rows), [s.name for s in chosen], by, parts)


def _row(
    candidate: Candidate, data: Data, scorers: Sequence[Scorer], layer: str | int, parts: Sequence[Tensor],
    batch_size: int, device: torch.device | str, seed: int, finished: Finished, agreement: bool,
) -> Row:  # fmt: skip
    began, digest, answers, outputs = time.perf_counter(), "", list[int](), 0
    try:
        network = candidate.load()
        digest = network_digest(network)
        if (known := finished.row(candidate.name, digest)) is not None:
            return known
        seen = see(network, data[0].split(batch_size), [layer], device=device)
        evidence = evidence_of(seen.features[str(layer)], seen.outputs, data[1], seed)
        scores, reasons = scored(scorers, evidence)
        again = resampled(scorers, evidence, parts)
        if agreement and seen.outputs.shape[1] > 1:
            answers, outputs = seen.outputs.argmax(1).tolist(), seen.outputs.shape[1]
    except Exception as error:  # whatever is wrong with one network is not the end of the others
        scores, again = {}, {}
        reasons = [str(error) if isinstance(error, MoleError) else f"{type(error).__name__}: {error}"]
    reason = "; ".join(reasons)
    seconds = time.perf_counter() - began
    row = Row(candidate.name, scores, reason, seconds, digest, candidate.provenance, again, answers, outputs)
    finished.add(row)
    return row


def _agreeing(rows: Sequence[Row], parts: Sequence[Tensor]) -> list[Row]:
    """With the agreement of networks whose answers are of one kind, also on parts of the examples; copies of a network
    count once, and those with other answers get a reason."""
    kinds = [row.outputs for row in rows if row.answers]
    kind = max(kinds, key=kinds.count) if kinds else 0
    first = {row.digest: row for row in rows if row.answers and row.outputs == kind}
    if len(first) < 2:
        return [_with_reason(row, "there is no other network to agree with") if row.answers else row for row in rows]
    answers = torch.tensor([row.answers for row in first.values()])
    scores = dict(zip(first, with_the_others(answers).tolist(), strict=True))
    halves = [with_the_others(answers[:, part]) for part in parts]
    resampled = dict(zip(first, torch.stack(halves, 1).tolist(), strict=True)) if parts else {}
    found = list[Row]()
    for row in rows:
        if row.answers and row.outputs == kind:
            again = {**row.resampled, AGREEMENT: resampled[row.digest]} if parts else row.resampled
            found.append(replace(row, scores={**row.scores, AGREEMENT: scores[row.digest]}, resampled=again))
        else:
            told = f"{row.outputs} answers where others have {kind}"
            found.append(_with_reason(row, told) if row.answers else row)
    return found


def _with_reason(row: Row, told: str) -> Row:
    return replace(row, reason="; ".join(filter(None, (row.reason, f"{AGREEMENT}: {told}"))))


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
