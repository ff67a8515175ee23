"""What a strategy says of its settings before a run, and what it refuses then."""

from __future__ import annotations

from logging import INFO
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord
from flwr.common import log

from strategies.optimizers import refuse_optimizer
from strategies.privacy.outside import short_of_noise
from strategies.run.fit import check_fit

if TYPE_CHECKING:
    from strategies.strategy import FedLoRA


def log_settings(strategy: FedLoRA) -> None:
    """Log the settings in effect as a small tree."""
    s, rule = strategy, strategy.aggregation
    robust = f", {rule.robust.name}" if rule.robust else ""
    log(INFO, "%s", type(s).__name__)
    log(INFO, "├── aggregation: %s%s", rule.name, robust)
    log(INFO, "├── ranks:       %s", s.ranks.summary())
    log(INFO, "├── sampling:    %s", s.participation.sampler.summary())
    log(INFO, "├── clock:       %s", s.participation.clock.summary())
    log(INFO, "├── rounds:      %s", s.flow.summary(s.aggregation, **_noise(s)))
    log(INFO, "├── clients:     %s, at least %s replies of %s nodes",
        type(s.protocol).__name__, s.min_replies, s.min_available_nodes)  # fmt: skip
    log(INFO, "└── scale %g, %s on the wire, seed %s", s.scale, s.wire_dtype, s.seed)


def check_settings(strategy: FedLoRA, arrays: ArrayRecord) -> None:
    """Refuse initial arrays that the rule, the rank policy or privacy cannot work with.

    Raises
    ------
    ValueError
        With what to use instead.
    """
    s, sampler = strategy, strategy.participation.sampler
    model = s.models.of(arrays)
    adapter = model.adapter
    s.aggregation.check(adapter)
    if model.start.pairs and (refusal := s.aggregation.refuse_start()):
        raise ValueError(f"the model starts from factors of its frozen weights, and {refusal}")
    s.participation.check()
    if refused := refuse_optimizer(s.optimizer, s.aggregation, sampler):
        raise ValueError("; ".join(refused))
    s.flow.check(s.aggregation, **_noise(s))
    s.privacy.check(
        s.aggregation, s.ranks, sampler,
        evaluate_fraction=s.evaluation.share, server_clips=s.clip_norm > 0,
    )  # fmt: skip
    s.outside.check(noise_lacking(s, differ=s.ranks.may_differ))
    check_fit(s.aggregation, s.ranks, adapter, head_only=s.head_only)


def _noise(strategy: FedLoRA) -> dict[str, bool]:
    """Return who adds noise of privacy."""
    private = bool(strategy.privacy.parts())
    return {"private": private, "noised_outside": strategy.outside.expected}


def noise_lacking(strategy: FedLoRA, *, differ: bool = False) -> list[str]:
    """Return why noise that is enough for a mean would be too little.

    Parameters
    ----------
    strategy : FedLoRA
    differ : bool (default: False)
        Whether ranks may differ, beside those of this round, which are looked at.
    """
    s = strategy
    problems = short_of_noise(
        s.aggregation, s.wire_dtype,
        independent=s.participation.independent, ranks_differ=differ or s.round.ranks_differ,
    )  # fmt: skip
    if s.optimizer is not None:
        problems.append(
            f"server optimizer {s.optimizer.name!r} moves the model by more than the mean of the "
            "updates; use none"
        )
    return problems
