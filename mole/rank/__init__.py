"""Screening: which of these networks separate the classes?"""

from mole.rank.features import hidden_features, principal_components
from mole.rank.leaderboard import Ranking, kendall_tau, rank_networks, regret
from mole.rank.silhouette import silhouette

__all__ = ["Ranking", "hidden_features", "kendall_tau", "principal_components", "rank_networks", "regret", "silhouette"]
