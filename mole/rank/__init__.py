"""Which of these networks suits my data? Scorers, and the table that they fill."""

from mole.rank.agreement import kendall_tau, mean_rank, regret, weighted_tau, with_the_others
from mole.rank.features import principal_components, see
from mole.rank.halving import Halving, successive_halving
from mole.rank.kept import Row
from mole.rank.leaderboard import Leaderboard, leaderboard
from mole.rank.request import Candidate
from mole.rank.scorers import REGISTRY, Evidence, Scorer, find_scorers, scorer
from mole.rank.scoring import layer_scores
from mole.rank.silhouette import silhouette, silhouette_of, silhouette_samples

__all__ = [
    "REGISTRY", "Candidate", "Evidence", "Halving", "Leaderboard", "Row", "Scorer", "find_scorers",
    "kendall_tau", "layer_scores", "leaderboard", "mean_rank", "principal_components", "regret", "scorer", "see",
    "silhouette", "silhouette_of", "silhouette_samples", "successive_halving", "weighted_tau",
    "with_the_others",
]  # fmt: skip
