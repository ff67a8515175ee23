"""Combinations of config keys that cannot work, each with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.rank_policies import make_ranks
from fedlora_app.samplers import make_run_sampler
from fedlora_app.tasks import LOSS, make_task, primary
from strategies.aggregation import AGGREGATIONS, Aggregator, make_aggregator
from strategies.naming import named
from strategies.participation import Participation
from strategies.privacy import refuse_private
from strategies.ranks import RANK_POLICIES
from strategies.sampling import SAMPLERS, Sampler
from strategies.wallclock import PROFILES, MeasuredClock

if TYPE_CHECKING:
    from fedlora_app.config import RanksConfig, RunConfig, SamplingConfig

# Those that have keys of their own in the config; others get theirs from `options`.
OWN_KEYS = {
    "ranks": ("uniform", "list", "cycle", "reported", "quality", "autorank", "self-pruning"),
    "sampling": ("fraction", "independent", "weighted", "statistical", "planned"),
}


def impossible(config: RunConfig) -> list[str]:
    """Return what is wrong with a config that no key alone can show."""
    problems = []
    try:
        named(AGGREGATIONS, config.aggregation)
    except ValueError as error:
        problems.append(f"aggregation: {error}")
    else:
        try:
            rule = make_aggregator(config.aggregation, **config.aggregation_settings())
        except (TypeError, ValueError) as error:
            problems.append(f"aggregation-options: {error}")
        else:
            if rule.merges_base and config.train.precision == "bfloat16":
                problems.append(
                    f"aggregation = {config.aggregation!r} merges into the frozen weights, and "
                    f"train.precision = {config.train.precision!r} would round every merge; "
                    "use auto or float32"
                )
            if config.lora.dora and not rule.supports_dora:
                problems.append(
                    f"aggregation = {config.aggregation!r} changes the factors that DoRA "
                    "magnitudes belong to; set lora.dora = false or use an averaging rule"
                )
    if config.ranks.policy in ("list", "cycle"):
        try:
            ranks = config.rank_list()
        except ValueError:
            ranks = [0]
        if min(ranks) < 1:
            problems.append(
                "ranks.list: expected comma-separated whole numbers of at least 1, "
                f"got {config.ranks.list!r}"
            )
    if config.resume_from in ("latest", "best") and not config.output:
        problems.append(
            f"resume-from = {config.resume_from!r} is about the run in output; name its folder"
        )
    if config.method == "head" and config.lora.dora:
        problems.append("method = 'head' trains no LoRA modules; set lora.dora = false")
    problems += _impossible_task(config)
    problems += _impossible_choice("ranks", config.ranks, RANK_POLICIES)
    problems += _impossible_choice("sampling", config.sampling, SAMPLERS)
    problems += _impossible_ranks(config)
    problems += _impossible_sampling(config)
    if not problems:  # what the strategy would refuse, before a run leaves a folder
        rule = make_aggregator(config.aggregation, **config.aggregation_settings())
        try:
            sampler = make_run_sampler(config)
            Participation(sampler, MeasuredClock(), rule).check()
        except (TypeError, ValueError) as error:
            problems.append(f"sampling.policy = {config.sampling.policy!r}: {error}")
        else:
            problems += _impossible_together(config, rule, sampler)
    return problems


def _impossible_task(config: RunConfig) -> list[str]:
    """Return what is wrong with the name of a task, or with a score that is none of it."""
    try:
        task = make_task(config)
    except ValueError as error:
        return [f"task: {error}"]
    problems = []
    known = {score.name: score for score in (*task.scores, LOSS)}
    wanted = config.checkpoint_best
    if wanted != "auto":
        score = known.get(wanted.removeprefix("-"))
        signed = [name if s.higher_is_better else f"-{name}" for name, s in known.items()]
        if score is None or wanted not in signed:
            problems.append(
                f"checkpoint-best: expected auto or one of {', '.join(signed)}, got {wanted!r}"
            )
    first = primary(task)
    if first.top is not None and config.stop_score > first.top:
        problems.append(
            f"stop-score: {config.stop_score:g}, but {first.label} ends at {first.top:g}, so no "
            "run would stop"
        )
    return problems


def _impossible_together(config: RunConfig, rule: Aggregator[Any], sampler: Sampler) -> list[str]:
    """Return what rule, ranks and sampler do not do together."""
    on_server = config.ranks.policy == "quality" and config.ranks.validation_rows
    try:
        policy = make_ranks(config, (lambda adapter: 0.0) if on_server else None)
    except (TypeError, ValueError) as error:
        return [f"ranks.policy = {config.ranks.policy!r}: {error}"]
    problems = []
    if rule.equal_ranks and policy.may_differ and config.method == "lora":
        key = "list" if config.ranks.policy in ("list", "cycle") else "policy"
        problems.append(
            f"aggregation = {config.aggregation!r} averages equal ranks only, and ranks.{key} = "
            f"{getattr(config.ranks, key)!r} lets clients differ; use ranks.policy = 'uniform' or "
            "another aggregation"
        )
    kept = set(rule.trained()) - set(rule.uploaded())
    if kept and policy.judges:
        problems.append(
            f"ranks.policy = {config.ranks.policy!r} judges whole adapters on the server, but "
            f"aggregation = {config.aggregation!r} keeps {', '.join(sorted(kept))} on the clients; "
            f"use another aggregation{' or ranks.validation-rows = 0' if on_server else ''}"
        )
    if config.privacy.noise_multiplier:  # what would void the guarantee of private updates
        share = config.evaluate.clients
        reasons = refuse_private(rule, policy, sampler, evaluate_fraction=share)
        problems += [f"privacy.noise-multiplier: {reason}" for reason in reasons]
    return problems


def _impossible_choice(
    section: str, keys: RanksConfig | SamplingConfig, registry: Mapping[str, Callable[..., Any]]
) -> list[str]:
    """Return what is wrong with the name of a policy and its options."""
    try:
        make = named(registry, keys.policy)
    except ValueError as error:
        return [f"{section}.policy: {error}"]
    if keys.policy in OWN_KEYS[section]:
        if keys.options:
            return [
                f"{section}.options: {keys.policy!r} has keys of its own in [{section}]; options "
                "are for what plugins register"
            ]
        return []
    try:
        make(**keys.settings())
    except (TypeError, ValueError) as error:
        return [f"{section}.options: {error}"]
    return []


def _impossible_sampling(config: RunConfig) -> list[str]:
    sampling, problems = config.sampling, []
    for key, read in (("q", sampling.probabilities), ("pilot-fractions", sampling.pilots)):
        try:
            values = read()
            if not all(0 < q <= 1 for q in ([values] if isinstance(values, float) else values)):
                raise ValueError(f"not all of {values} are")
        except ValueError as error:
            problems.append(
                f"sampling.{key}: expected comma-separated numbers above 0 and up to 1"
                f"{', two of them' if key != 'q' else ''}; {error}"
            )
    if sampling.policy == "fraction":
        for key, value, default in (
            ("estimator", sampling.estimator, "auto"),
            ("server-rate", sampling.server_rate, 1.0),
        ):
            if value != default:
                problems.append(
                    f"sampling.{key} = {value!r} is for independent sampling, and sampling.policy "
                    "= 'fraction' draws a fixed number; leave it out or use 'independent'"
                )
    pilots = 2 * sampling.pilot_rounds
    if sampling.policy == "planned" and not sampling.alpha and config.rounds <= pilots:
        problems.append(
            f"sampling.pilot-rounds: two pilots take {pilots} of rounds = {config.rounds}, and "
            "nothing would be planned; have more rounds or shorter pilots, or set sampling.alpha "
            "and sampling.beta"
        )
    if bool(sampling.alpha) != bool(sampling.beta):
        problems.append("sampling.alpha and sampling.beta: set both, or neither for pilots")
    profile, simulated = config.clock.profile, config.clock.profile != "measured"
    if simulated and profile not in PROFILES and not Path(profile).expanduser().is_file():
        problems.append(
            f"clock.profile: expected measured, {', '.join(PROFILES)} or a csv file; got "
            f"{profile!r}"
        )
    if not simulated and (config.clock.deadline or config.clock.change_round):
        key = "deadline" if config.clock.deadline else "change-round"
        problems.append(
            f"clock.{key} is for simulated clocks; set clock.profile"
            + (", or use round-timeout" if config.clock.deadline else "")
        )
    return problems


def _impossible_ranks(config: RunConfig) -> list[str]:
    ranks, problems = config.ranks, []
    least, most = {
        "reported": (ranks.fallback_rank(), ranks.max),
        "autorank": (ranks.min, ranks.max),
        "self-pruning": (ranks.min, ranks.max),
        "quality": (ranks.low, ranks.high),
    }.get(ranks.policy, (0, 0))
    names = {
        "reported": ("ranks.fallback" if ranks.fallback else "ranks.min", "ranks.max"),
        "quality": ("ranks.low", "ranks.high"),
    }.get(ranks.policy, ("ranks.min", "ranks.max"))
    if least > most:
        problems.append(f"{names[0]} ({least}) must not exceed {names[1]} ({most})")
    if ranks.policy == "autorank" and ranks.fallback > ranks.max:
        problems.append(
            f"ranks.fallback ({ranks.fallback}) must not exceed ranks.max ({ranks.max})"
        )
    if ranks.budget and ranks.budget_mb:
        problems.append("ranks.budget and ranks.budget-mb: set one of them, the other to 0")
    if (ranks.budget or ranks.budget_mb) and ranks.policy != "autorank":
        key = "ranks.budget" if ranks.budget else "ranks.budget-mb"
        problems.append(
            f"{key} is divided by scores, which ranks.policy = {ranks.policy!r} does not have; "
            "use ranks.policy = 'autorank'"
        )
    elif ranks.budget and not least <= ranks.budget <= most:
        problems.append(
            f"ranks.budget: a mean rank of {ranks.budget:g} is not between ranks.min ({least}) "
            f"and ranks.max ({most})"
        )
    return problems
