"""A linear probe, cross-validated: what the cheap scorers stand in for."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mole.errors import MoleError
from mole.rank.scorers.protocol import Evidence, few, scorer

MOST, FOLDS = 5000, 3


@scorer("linear_probe", needs=["classes"], source="Alain and Bengio 2016", cost="hundreds of n K D, n at most 5,000")
def linear_probe(evidence: Evidence) -> float:
    """Accuracy of logistic regression on the features, over three folds."""
    evidence = few(evidence, MOST)
    least = int(evidence.one_hot.sum(0).min())
    if least < FOLDS:
        raise MoleError(f"linear_probe needs {FOLDS} examples of every class; found {least}")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=evidence.seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
    return float(np.mean(cross_val_score(model, evidence.x.numpy(), evidence.member.numpy(), cv=folds)))
