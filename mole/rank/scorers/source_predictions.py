"""Scores of what the network itself says, whatever its own classes mean: LEEP and NCE."""

import torch.nn.functional as F

from mole.rank.scorers.protocol import Evidence, scorer


@scorer("leep", needs=["classes", "outputs"], source="Nguyen et al. 2020", cost="n C K")
def leep(evidence: Evidence) -> float:
    """Mean log likelihood of the labels under the classifier that reads only the network's own probabilities."""
    said = evidence.probabilities  # (n, C)
    joint = said.T @ evidence.one_hot / len(said)  # (C, K)
    given = joint / joint.sum(1, keepdim=True).clamp_min(1e-300)
    likelihood = (said @ given).gather(1, evidence.member[:, None])
    return float(likelihood.clamp_min(1e-300).log().mean())


@scorer("nce", needs=["classes", "outputs"], source="Tran, Nguyen, Hassner 2019", cost="n")
def nce(evidence: Evidence) -> float:
    """Minus the entropy, in nats, of the label once the network's own answer is known."""
    said = F.one_hot(evidence.probabilities.argmax(1), evidence.probabilities.shape[1]).double()
    joint = said.T @ evidence.one_hot / len(said)
    given = joint / joint.sum(1, keepdim=True).clamp_min(1e-300)
    return float((joint * given.clamp_min(1e-300).log()).sum())


@scorer("minus_loss", needs=["own classes"], source="validation loss", cost="n C")
def minus_loss(evidence: Evidence) -> float:
    """Minus the cross-entropy of the network's own answers, in nats, where its classes are those of the data."""
    assert evidence.outputs is not None and evidence.classes is not None
    return -float(F.cross_entropy(evidence.outputs.double(), evidence.classes))
