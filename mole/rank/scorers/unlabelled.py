"""What can be said without any label."""

import torch
from sklearn.cluster import KMeans

from mole.rank.features import principal_components
from mole.rank.scorers.protocol import Evidence, few, scorer
from mole.rank.silhouette import silhouette

COMPONENTS, MOST = 10, 5000


@scorer("mutual_information", needs=["outputs"], source="Bridle, Heading, MacKay 1992", cost="n C")
def mutual_information(evidence: Evidence) -> float:
    """Between examples and the network's answers, in nats: sure of each, and not the same for all."""
    said = evidence.probabilities
    mean = said.mean(0)
    each = -(said * said.clamp_min(1e-300).log()).sum(1).mean()
    return float(-(mean * mean.clamp_min(1e-300).log()).sum() - each)


@scorer("confidence", needs=["outputs"], source="Hendrycks and Gimpel 2017", cost="n C")
def confidence(evidence: Evidence) -> float:
    """Mean probability of the likeliest answer."""
    return float(evidence.probabilities.max(1).values.mean())


@scorer("nuclear_norm", needs=["outputs"], source="Deng et al. 2023", cost="n C^2")
def nuclear_norm(evidence: Evidence) -> float:
    """Nuclear norm of the table of answers, over its largest possible value: sure and varied."""
    said = evidence.probabilities
    return float(torch.linalg.svdvals(said).sum() / (min(said.shape) * len(said)) ** 0.5)


@scorer("kmeans", needs=["outputs"], source="silhouette of k-means clusters", cost="n C D, n at most 5,000")
def kmeans(evidence: Evidence) -> float:
    """Silhouette (cosine, PCA to 10) of as many k-means clusters as the network has answers."""
    evidence = few(evidence, MOST)
    assert evidence.outputs is not None
    x = principal_components(evidence.x, COMPONENTS)
    clusters = min(max(2, evidence.outputs.shape[1]), len(x) - 1)
    model = KMeans(clusters, n_init="auto", random_state=evidence.seed)
    found = torch.from_numpy(model.fit_predict(x.numpy())).long()
    return silhouette(x, found) if int(found.max()) else 0.0
