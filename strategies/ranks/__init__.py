"""Rank policies: which LoRA rank each client trains."""

from strategies.ranks.base import (
    RANK_POLICIES,
    ListRank,
    RankPolicy,
    ReportedRank,
    UniformRank,
    make_rank_policy,
)

__all__ = [
    "RANK_POLICIES",
    "ListRank",
    "RankPolicy",
    "ReportedRank",
    "UniformRank",
    "make_rank_policy",
]
