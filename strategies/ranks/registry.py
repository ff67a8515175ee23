"""Rank policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from strategies.naming import Registry
from strategies.ranks.autorank import AutoRank
from strategies.ranks.base import ListRank, RankPolicy, ReportedRank, UniformRank
from strategies.ranks.by_hand import RandomRank, StaircaseRank
from strategies.ranks.capacity import CapacityRank
from strategies.ranks.feedback import FeedbackRank
from strategies.ranks.pruning import SelfPruningRank
from strategies.ranks.quality import QualityRank

RANK_POLICIES: Registry[Callable[..., RankPolicy]] = Registry(
    {
        "uniform": UniformRank,
        "list": ListRank,
        "cycle": lambda ranks: ListRank(ranks, cycle=True),
        "reported": ReportedRank,
        "quality": QualityRank,
        "autorank": AutoRank,
        "self-pruning": SelfPruningRank,
        "staircase": StaircaseRank,
        "random": RandomRank,
        "feedback": FeedbackRank,
        "capacity": CapacityRank,
    }
)

PolicyT = TypeVar("PolicyT", bound=RankPolicy)


def register(cls: type[PolicyT]) -> type[PolicyT]:
    """Make a rank policy available by its ``name``, in ``make_rank_policy`` and the run config.

    Raises
    ------
    ValueError
        If the policy has no name, or another policy has it.
    """
    return RANK_POLICIES.register(cls)


def make_rank_policy(name: str, **options: Any) -> RankPolicy:
    """Return the policy registered as ``name``.

    Raises
    ------
    ValueError
        If there is no such policy; the message lists those that exist.
    """
    return RANK_POLICIES.make(name, **options)
