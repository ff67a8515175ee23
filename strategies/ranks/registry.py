"""Rank policies by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from strategies.ranks.autorank import AutoRank
from strategies.ranks.base import ListRank, RankPolicy, ReportedRank, UniformRank
from strategies.ranks.pruning import SelfPruningRank
from strategies.ranks.quality import QualityRank

RANK_POLICIES: dict[str, Callable[..., RankPolicy]] = {
    "uniform": UniformRank,
    "list": ListRank,
    "cycle": lambda ranks: ListRank(ranks, cycle=True),
    "reported": ReportedRank,
    "quality": QualityRank,
    "autorank": AutoRank,
    "self-pruning": SelfPruningRank,
}


def make_rank_policy(name: str, **options: Any) -> RankPolicy:
    """Return the policy registered as ``name``.

    Raises
    ------
    ValueError
        If there is no such policy; the message lists those that exist.
    """
    if name not in RANK_POLICIES:
        close = difflib.get_close_matches(name, list(RANK_POLICIES), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"expected one of {', '.join(RANK_POLICIES)}; got {name!r}{hint}")
    return RANK_POLICIES[name](**options)
