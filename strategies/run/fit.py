"""Which rules, rank policies and initial adapters go together."""

from __future__ import annotations

from typing import Any

from strategies.aggregation import Aggregator
from strategies.lora import Adapter
from strategies.ranks import RankPolicy


def check_fit(
    rule: Aggregator[Any], policy: RankPolicy, adapter: Adapter, *, head_only: bool
) -> None:
    """Refuse what cannot work, before anything is sent.

    Parameters
    ----------
    rule : Aggregator
    policy : RankPolicy
    adapter : Adapter
        The initial one.
    head_only : bool
        Whether an adapter without any LoRA module is meant so.

    Raises
    ------
    ValueError
        With what to use instead.
    """
    if rule.equal_ranks and policy.may_differ and adapter.pairs:
        raise ValueError(
            f"{rule.name} averages equal ranks only, but the rank policy "
            f"{policy.name!r} lets clients differ; use ranks = UniformRank(r) "
            "or another rule"
        )
    kept = set(rule.trained()) - set(rule.uploaded())
    if kept and policy.judges:
        raise ValueError(
            f"the rank policy {policy.name!r} judges whole adapters on the server, but "
            f"{rule.name} keeps {', '.join(sorted(kept))} on the clients; use "
            "another rule, or let the clients judge"
        )
    if not adapter.pairs and adapter.dense and not head_only:
        raise ValueError(
            "the initial arrays hold no LoRA module, so that there is no rank to give: "
            "expected what peft.get_peft_model_state_dict returns for a model of the largest "
            "rank; to train a head alone, say head_only=True"
        )
    if rule.equal_ranks and adapter.rank > policy.max_rank:
        raise ValueError(
            f"{rule.name} averages whole adapters, but the initial one has rank "
            f"{adapter.rank} and the rank policy {policy.name!r} gives "
            f"{policy.max_rank}; make the initial model with r = {policy.max_rank}"
        )
    if adapter.pairs and adapter.rank < policy.max_rank:
        raise ValueError(
            f"the initial adapter has rank {adapter.rank}, but the rank policy "
            f"{policy.name!r} gives up to {policy.max_rank}; make the initial "
            f"model with r = {policy.max_rank}"
        )
