"""The silhouette of features: neuralRank, as its tables were made, as its text says, and without its PCA."""

from mole.rank.features import principal_components
from mole.rank.scorers.protocol import Evidence, scorer
from mole.rank.silhouette import silhouette

SOURCE = "Desai, Chu, Ganti, Stein, Srivatsa: neuralRank"
COMPONENTS = 10


@scorer("neuralrank", needs=["classes"], source=SOURCE, cost="n D^2 (PCA)")
def neuralrank(evidence: Evidence) -> float:
    """Silhouette with cosine distance after PCA to 10 components."""
    return silhouette(principal_components(evidence.x, COMPONENTS), evidence.member)


@scorer("neuralrank_centroid", needs=["classes"], source=f"{SOURCE} (its text)", cost="n D^2 (PCA)")
def neuralrank_centroid(evidence: Evidence) -> float:
    """The same against the centroids of the other classes."""
    return silhouette(principal_components(evidence.x, COMPONENTS), evidence.member, variant="centroid")


@scorer("silhouette", needs=["classes"], source="Rousseeuw 1987", cost="n K D")
def silhouette_unreduced(evidence: Evidence) -> float:
    """Silhouette with cosine distance of the features as they are."""
    return silhouette(evidence.x, evidence.member)
