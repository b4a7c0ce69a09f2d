"""Scorers applied to what a network makes of data: all that can go wrong becomes a reason."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mole.errors import MoleError
from mole.rank.features import layer_names, see
from mole.rank.request import Data, as_data, evidence_of
from mole.rank.scorers import Evidence, Scorer, find_scorers


def scored(scorers: Sequence[Scorer], evidence: Evidence) -> tuple[dict[str, float], list[str]]:
    """Scores by name, and why others could not be had."""
    scores, reasons = dict[str, float](), list[str]()
    if not bool((evidence.x != evidence.x[0]).any()):
        return scores, ["features are the same for every example"]
    for scorer in scorers:
        try:
            value = scorer(evidence)
        except Exception as error:  # of one scorer, which is not the end of the others
            reasons.append(f"{scorer.name}: {error}" if isinstance(error, MoleError) else f"{scorer.name}: {error!r}")
            continue
        if value == value and abs(value) != float("inf"):
            scores[scorer.name] = value
        else:
            reasons.append(f"{scorer.name}: {value}")
    return scores, reasons


def halves(data: Data, count: int, seed: int) -> list[Tensor]:
    """Random halves of the examples, of every class: indices without repetition.

    Drawing with repetition would show scorers that leave one out its copies, and favour them.
    """
    inputs, labels = data
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.arange(len(inputs))]
    if labels is not None and not labels.is_floating_point():
        groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    return [torch.cat([group[torch.randperm(len(group), generator=generator)[: (len(group) + 1) // 2]]
                       for group in groups]) for _ in range(count)]  # fmt: skip


def resampled(scorers: Sequence[Scorer], evidence: Evidence, parts: Sequence[Tensor]) -> dict[str, list[float]]:
    """Scores by name on each part of the examples; scorers that fail on one are left out."""
    found: dict[str, list[float]] = {scorer.name: [] for scorer in scorers} if parts else {}
    for part in parts:
        scores, _ = scored(scorers, evidence.rows(part))
        for name, value in scores.items():
            found[name].append(value)
    return {name: values for name, values in found.items() if len(values) == len(parts)}


def layer_scores(
    network: nn.Module, data: Data, scorer: str = "neuralrank", *, batch_size: int = 512
) -> dict[str, float]:
    """Score of every layer that runs, in one pass over the data, the inputs first: where do classes come apart?

    The contrast that Desai et al. look for is that of the last hidden layer with the inputs. Layers whose features do
    not vary, or that cannot be scored, are left out.
    """
    data = as_data(data)
    (found,) = find_scorers([scorer])
    seen = see(network, data[0].split(batch_size), layer_names(network), skip=True)
    layers = {"input": data[0].flatten(1), **seen.features}
    scores = {name: scored([found], evidence_of(x, seen.outputs, data[1], 0))[0] for name, x in layers.items()}
    return {name: values[scorer] for name, values in scores.items() if values}
