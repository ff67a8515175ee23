"""The rank policy of a run config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from strategies.lora import Adapter
from strategies.ranks import (
    AutoRank,
    ListRank,
    QualityRank,
    RankPolicy,
    ReportedRank,
    SelfPruningRank,
    UniformRank,
    make_rank_policy,
)

if TYPE_CHECKING:
    from fedlora_app.config import RunConfig


def make_ranks(config: RunConfig, score_fn: Callable[[Adapter], float] | None = None) -> RankPolicy:
    """Return the rank policy of the run config; ``score_fn`` is for ``quality``."""
    r = config.ranks
    match r.policy:
        case "uniform":
            return UniformRank(r.rank)
        case "reported":
            return ReportedRank(r.max, fallback=r.fallback_rank())
        case "quality":
            return QualityRank(r.low, r.high, r.best_fraction, score_fn=score_fn)
        case "autorank":
            return AutoRank(
                r.min,
                r.max,
                budget=r.budget or None,
                byte_budget=r.budget_mb * 1e6 or None,
                reassign_every=r.reassign_every,
                fallback=r.fallback or None,
                profile_samples=r.profile_samples,
                order=r.order,
                seed=config.seed,
            )
        case "self-pruning":
            return SelfPruningRank(r.max, gamma=r.gamma, penalty=r.penalty, min_rank=r.min)
        case "list" | "cycle":
            return ListRank(config.rank_list(), cycle=r.policy == "cycle")
        case own:
            return make_rank_policy(own, **r.settings())
