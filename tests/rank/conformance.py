"""What every scorer must hold; the test of a new one is a line in `test_scorers.py`.

Separable features score above mixed ones; the order of examples and the names of classes mean nothing; the evidence is
left as it was; the same seed gives the same score.
"""

import torch

from mole.rank import Evidence, Scorer


def evidence(separation: float, *, examples: int = 120, features: int = 6, seed: int = 0) -> Evidence:
    """Three classes whose means lie apart by `separation` deviations, and outputs that tell them as well as that."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(examples) % 3
    means = torch.eye(3, features) * separation
    x = means[classes] + torch.randn(examples, features, generator=generator)
    outputs = 2 * x[:, :3]
    return Evidence(x, outputs, classes=classes, seed=seed)


def check_scorer(scorer: Scorer) -> None:
    """Check one scorer."""
    poor, good = evidence(0.0), evidence(4.0)
    before = good.features.clone()
    score = scorer(good)
    assert score == score and abs(score) < float("inf") and scorer.source and scorer.cost
    assert torch.equal(good.features, before) and scorer(good) == score
    assert score > scorer(poor), f"{scorer.name}: {score} for classes apart, {scorer(poor)} for mixed ones"
    if "own classes" in scorer.needs:
        return
    order = torch.randperm(len(before), generator=torch.Generator().manual_seed(1))
    tolerance = 0.05 if scorer.name in ("linear_probe", "kmeans") else 1e-6  # folds and centres are drawn
    assert abs(scorer(good.rows(order)) - score) <= tolerance * max(1.0, abs(score))
    assert good.classes is not None
    renamed = Evidence(good.features, good.outputs, classes=torch.tensor([7, 2, 90])[good.classes], seed=good.seed)
    assert abs(scorer(renamed) - score) <= tolerance * max(1.0, abs(score))
