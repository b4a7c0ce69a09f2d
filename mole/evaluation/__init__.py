"""How good, how obedient and how new generated networks are, beside baselines and null models."""

from mole.evaluation.alignment import alignment
from mole.evaluation.novelty import PermutationDistance, dispersion, max_wrong_iou
from mole.evaluation.nulls import null_models
from mole.evaluation.optimisers import OptimiserCurve, best_curve, steps_to_match

__all__ = [
    "OptimiserCurve",
    "PermutationDistance",
    "alignment",
    "best_curve",
    "dispersion",
    "max_wrong_iou",
    "null_models",
    "steps_to_match",
]
