"""What a run config names, made once: rule, ranks, sampler, clock, privacy, task.

``RANKS`` and ``SAMPLING`` say, once for each policy with keys of its own in the config, which
these are. A policy of a plug-in takes its arguments from ``options``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fedlora_app.config.fields import each_of
from fedlora_app.config.keys import ConfigError, RunConfig, Scalar
from fedlora_app.config.round_keys import RanksConfig, SamplingConfig, ServerConfig
from fedlora_app.tasks import Task, make_task
from fedlora_app.timing import Timing
from strategies.aggregation import AGGREGATIONS, ROBUST, Aggregator
from strategies.lora import Adapter
from strategies.naming import Registry
from strategies.optimizers import OPTIMIZERS, ServerOptimizer
from strategies.privacy import Privacy
from strategies.ranks import RANK_POLICIES, CapacityRank, QualityRank, RankPolicy
from strategies.round.waiting import Waiting
from strategies.sampling import SAMPLERS, Sampler

T = TypeVar("T")
Arguments = Callable[[RunConfig], dict[str, Any]]


@dataclass(frozen=True)
class Parts:
    """What a run consists of; made at the door, judged there, and handed to the strategy."""

    config: RunConfig
    rule: Aggregator[Any]
    optimizer: ServerOptimizer | None
    policy: RankPolicy
    sampler: Sampler
    waiting: Waiting
    clock: Timing
    privacy: Privacy | None
    task: Task

    def with_config(self, config: RunConfig) -> Parts:
        """Return the same parts for a config that differs in what none of them is made from."""
        return replace(self, config=config, task=make_task(config))

    @property
    def validation_rows(self) -> int:
        """How many rows of the server's test set judge the clients, and test nothing."""
        judged_here = isinstance(self.policy.core, QualityRank) and self.policy.judges
        return self.config.ranks.validation_rows if judged_here else 0

    def judge_by(self, score_fn: Callable[[Adapter], float]) -> None:
        """Have the server judge clients by the loss on its validation rows, now that it can."""
        if isinstance(self.policy.core, QualityRank):
            self.policy.core.score_fn = score_fn


def make_parts(config: RunConfig) -> Parts:
    """Return what the config names.

    Raises
    ------
    ConfigError
        With every name and option of which nothing can be made.
    """
    made: dict[str, Any] = {}
    problems: list[str] = []
    p = config.privacy
    for part, make in (
        ("rule", lambda: _rule(config)),
        ("optimizer", lambda: _optimizer(config.server)),
        ("policy", lambda: _policy(config)),
        ("sampler", lambda: _by_policy("sampling", config, SAMPLING, SAMPLERS, Sampler)),
        ("waiting", lambda: _said("round", config.round.waiting)),
        ("clock", lambda: _said("clock.profile", lambda: Timing(config))),
        ("privacy", lambda: Privacy(p.clip, p.noise_multiplier) if p.noise_multiplier else None),
        ("task", lambda: _task(config)),
    ):
        try:
            made[part] = make()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Parts(config, **made)


def _rule(config: RunConfig) -> Aggregator[Any]:
    make = _said("aggregation", lambda: AGGREGATIONS.find(config.aggregation))
    key = "aggregation-options"
    rule = _said(key, lambda: make(**config.aggregation_settings()))
    made: Aggregator[Any] = _of_kind(f"aggregation = {config.aggregation!r}", rule, Aggregator)
    _protect(made, config.server)
    return made


def _protect(rule: Aggregator[Any], server: ServerConfig) -> None:
    """Have a rule protected as ``server.robust`` says."""
    found = _optional("server.robust", server.robust, server.robust_settings(), ROBUST)
    if found is not None:
        _said("server.robust", lambda: rule.protect(found))


def _optimizer(server: ServerConfig) -> ServerOptimizer | None:
    key = "server.optimizer"
    return _optional(key, server.optimizer, server.optimizer_settings(), OPTIMIZERS)


def _optional(
    key: str, name: str, settings: dict[str, Scalar], registry: Registry[type[T]]
) -> T | None:
    """Return what a key names, made with the options beside it; None for "none"."""
    if name == "none":
        if settings:
            raise ConfigError([f"{key}-options are for {key}, which is 'none'; leave them out"])
        return None
    make = _said(key, lambda: registry.find(name))
    return _said(f"{key}-options", lambda: make(**settings))


def _task(config: RunConfig) -> Task:
    task = _said("task", lambda: make_task(config))
    made: Task = _of_kind(f"task = {config.task!r}", task, Task)
    return made


def _policy(config: RunConfig) -> RankPolicy:
    """Return the rank policy, within what nodes can train if that is wanted."""
    made: RankPolicy = _by_policy("ranks", config, RANKS, RANK_POLICIES, RankPolicy)
    if not config.ranks.capacity or isinstance(made, CapacityRank):
        return made
    fallback = min(config.ranks.fallback_rank(), made.max_rank)
    limits = {**_limits(config), "fallback": fallback}
    return _said("ranks.capacity", lambda: CapacityRank(within=made, **limits))


def _limits(config: RunConfig) -> dict[str, Any]:
    return {"memory_share": config.ranks.memory_share, "seconds": config.ranks.seconds}


def _by_policy(
    section: str,
    config: RunConfig,
    own: Mapping[str, Arguments],
    registry: Registry[Any],
    kind: type[Any],
) -> Any:
    """Return what a section of the config names by ``policy``."""
    keys: RanksConfig | SamplingConfig = getattr(config, section)
    make = _said(f"{section}.policy", lambda: registry.find(keys.policy))
    name = f"{section}.policy = {keys.policy!r}"
    if keys.policy not in own:
        made = _said(f"{section}.options", lambda: make(**keys.settings()))
    elif keys.options:
        raise ConfigError(
            [
                f"{section}.options: {keys.policy!r} has keys of its own in [{section}]; options "
                "are for what plugins register"
            ]
        )
    else:
        arguments = own[keys.policy](config)
        made = _said(name, lambda: make(**arguments))
    return _of_kind(name, made, kind)


def _said(key: str, make: Callable[[], T]) -> T:
    """Return what is made; what is wrong with its arguments becomes a problem of a key."""
    try:
        return make()
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError([f"{key}: {error}"]) from error


def _of_kind(name: str, made: Any, kind: type[Any]) -> Any:
    if not isinstance(made, kind):  # a plug-in may register anything
        raise ConfigError(
            [
                f"{name}: expected {kind.__module__}.{kind.__name__}, got {type(made).__name__}; "
                "register a class of that kind"
            ]
        )
    return made


# ----- the policies of [ranks] ---------------------------------------------------------------


def _span(ranks: RanksConfig, low: str, high: str) -> tuple[int, int]:
    """Return the values of two keys, or refuse them where the first is the larger one."""
    least, most = getattr(ranks, low), getattr(ranks, high)
    if least > most:
        raise ConfigError([f"ranks.{low} ({least}) must not exceed ranks.{high} ({most})"])
    return least, most


def _listed(config: RunConfig) -> dict[str, Any]:
    return {"ranks": config.ranks.numbers()}


def _reported(config: RunConfig) -> dict[str, Any]:
    fallback, most = _span(config.ranks, "fallback" if config.ranks.fallback else "min", "max")
    return {"max_rank": most, "fallback": fallback}


def _quality(config: RunConfig) -> dict[str, Any]:
    low, high = _span(config.ranks, "low", "high")
    return {
        "low": low,
        "high": high,
        "fraction": config.ranks.best_fraction,
        "score_fn": _nobody if config.ranks.validation_rows else None,
    }


def _nobody(adapter: Adapter) -> float:
    raise RuntimeError("the server's validation rows are not there yet; see Parts.judge_by")


def _autorank(config: RunConfig) -> dict[str, Any]:
    r = config.ranks
    least, most = _span(r, "min", "max")
    _span(r, "fallback", "max")
    if r.budget and r.budget_mb:
        raise ConfigError(["ranks.budget and ranks.budget-mb: set one of them, the other to 0"])
    if r.budget and not least <= r.budget <= most:
        raise ConfigError(
            [
                f"ranks.budget: a mean rank of {r.budget:g} is not between ranks.min ({least}) "
                f"and ranks.max ({most})"
            ]
        )
    return {
        "min_rank": least,
        "max_rank": most,
        "budget": r.budget or None,
        "byte_budget": r.budget_mb * 1e6 or None,
        "reassign_every": r.reassign_every,
        "fallback": r.fallback or None,
        "profile_samples": r.profile_samples,
        "order": r.order,
        "seed": config.seed,
        "criteria": tuple(name.strip() for name in r.criteria.split(",")),
        "weights": each_of(r.weights, float) or None,
        "holders": r.holders,
    }


def _by_mean(config: RunConfig) -> dict[str, Any]:
    least, most = _span(config.ranks, "min", "max")
    key = "budget" if config.ranks.budget else "rank"
    mean = getattr(config.ranks, key)
    if not least <= mean <= most:
        raise ConfigError(
            [
                f"ranks.{key}: a mean rank of {mean:g} is not between ranks.min ({least}) and "
                f"ranks.max ({most})"
            ]
        )
    return {"mean": mean, "min_rank": least, "max_rank": most}


def _capacity(config: RunConfig) -> dict[str, Any]:
    fallback, most = _span(config.ranks, "fallback" if config.ranks.fallback else "min", "max")
    return {"max_rank": most, "fallback": fallback, **_limits(config)}


def _random(config: RunConfig) -> dict[str, Any]:
    return {**_by_mean(config), "seed": config.seed}


def _feedback(config: RunConfig) -> dict[str, Any]:
    r = config.ranks
    more = {"measure": r.measure, "every": r.reassign_every or 1, "holders": r.holders or 0.3}
    return {**_by_mean(config), **more}


def _self_pruning(config: RunConfig) -> dict[str, Any]:
    least, most = _span(config.ranks, "min", "max")
    gamma, penalty = config.ranks.gamma, config.ranks.penalty
    return {"start": most, "gamma": gamma, "penalty": penalty, "min_rank": least}


RANKS: dict[str, Arguments] = {
    "uniform": lambda config: {"rank": config.ranks.rank},
    "list": _listed,
    "cycle": _listed,
    "reported": _reported,
    "quality": _quality,
    "autorank": _autorank,
    "self-pruning": _self_pruning,
    "staircase": _listed,
    "random": _random,
    "feedback": _feedback,
    "capacity": _capacity,
}


# ----- the policies of [sampling] ------------------------------------------------------------


def _coins(config: RunConfig) -> dict[str, Any]:
    return {"estimator": config.sampling.estimator, "server_rate": config.sampling.server_rate}


def _fraction(config: RunConfig) -> dict[str, Any]:
    s = config.sampling
    return {"fraction": s.fraction, "min_clients": s.min_clients, "clients": s.clients}


def _proportional(config: RunConfig) -> dict[str, Any]:
    s = config.sampling
    return {"fraction": s.fraction, "q_min": s.q_min, **_coins(config)}


def _planned(config: RunConfig) -> dict[str, Any]:
    s = config.sampling
    if bool(s.alpha) != bool(s.beta):
        raise ConfigError(["sampling.alpha and sampling.beta: set both, or neither"])
    pilots = 2 * s.pilot_rounds
    if s.pilots and s.alpha:
        raise ConfigError(["sampling.pilots find alpha and beta; leave out one or the other"])
    if s.pilots and config.rounds <= pilots:
        raise ConfigError(
            [
                f"sampling.pilot-rounds: two pilots take {pilots} of rounds = {config.rounds}, and "
                "nothing would be planned; have more rounds or shorter pilots, or leave "
                "out sampling.pilots"
            ]
        )
    return {
        "pilot_rounds": s.pilot_rounds if s.pilots else None,
        "pilot_fractions": s.fractions_of_pilots() if s.pilots else None,
        "alpha": s.alpha or None,
        "beta": s.beta or None,
        "replan_every": s.replan_every,
        "sketch_cost": s.sketch_cost,
        "q_min": s.q_min,
        "seed": config.seed,
        **_coins(config),
    }


SAMPLING: dict[str, Arguments] = {
    "fraction": _fraction,
    "independent": lambda config: {"q": config.sampling.probabilities(), **_coins(config)},
    "weighted": _proportional,
    "statistical": _proportional,
    "planned": _planned,
}
