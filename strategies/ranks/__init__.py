"""Rank policies: which LoRA rank each client trains."""

from strategies.ranks.autorank import AutoRank
from strategies.ranks.base import (
    Explanation,
    ListRank,
    RankPolicy,
    ReportedRank,
    UniformRank,
)
from strategies.ranks.by_hand import RandomRank, StaircaseRank
from strategies.ranks.capacity import CapacityRank
from strategies.ranks.feedback import FeedbackRank
from strategies.ranks.pruning import SelfPruningRank
from strategies.ranks.quality import QualityRank
from strategies.ranks.registry import RANK_POLICIES, make_rank_policy, register
from strategies.trained import Trained

__all__ = [
    "RANK_POLICIES",
    "AutoRank",
    "CapacityRank",
    "Explanation",
    "FeedbackRank",
    "ListRank",
    "QualityRank",
    "RandomRank",
    "RankPolicy",
    "ReportedRank",
    "SelfPruningRank",
    "StaircaseRank",
    "Trained",
    "UniformRank",
    "make_rank_policy",
    "register",
]
