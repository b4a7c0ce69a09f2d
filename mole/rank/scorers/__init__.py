"""Scorers, one small file per idea; a new one is imported here and passes `tests/rank/conformance.py`."""

from mole.rank.scorers import (
    class_mean,
    coding_rate,
    gbc,
    h_score,
    logme,
    neighbours,
    neuralrank,
    parc,
    probe,
    ridge,
    source_predictions,
    unlabelled,
)
from mole.rank.scorers.protocol import REGISTRY, Evidence, Scorer, find_scorers, scorer

__all__ = [
    "REGISTRY", "Evidence", "Scorer", "class_mean", "coding_rate", "find_scorers", "gbc", "h_score", "logme",
    "neighbours", "neuralrank", "parc", "probe", "ridge", "scorer", "source_predictions", "unlabelled",
]  # fmt: skip
