"""What cannot work together, each with what to do instead: small functions over ``Parts``.

A check asks a part what it is and does (``equal_ranks``, ``merges_base``, ``judges``), never
what it is called: a plug-in is judged like our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedlora_app.config.build import Parts
from fedlora_app.config.keys import RunConfig
from fedlora_app.models.lora import variant_problem
from fedlora_app.models.starts import STARTS
from fedlora_app.tasks import LOSS, TASKS, primary
from strategies.optimizers import refuse_optimizer
from strategies.participation import Participation
from strategies.privacy import refuse_private
from strategies.ranks import AutoRank, ListRank, SelfPruningRank
from strategies.round.waiting import Waiting, refuse_waiting
from strategies.sampling import PlannedSampling
from strategies.wallclock import MeasuredClock


def impossible(parts: Parts) -> list[str]:
    """Return everything that is wrong with a config whose parts are fine by themselves."""
    return [problem for check in CHECKS for problem in check(parts)]


def _rounded_merges(parts: Parts) -> Iterator[str]:
    config = parts.config
    if parts.rule.merges_base and config.train.precision == "bfloat16":
        yield (
            f"aggregation = {config.aggregation!r} merges into the frozen weights, and "
            f"train.precision = {config.train.precision!r} would round every merge; "
            "use auto or float32"
        )


def _kept_base(parts: Parts) -> Iterator[str]:
    if parts.rule.merges_base and parts.task.keeps_base and parts.config.federated:
        yield (
            f"aggregation = {parts.config.aggregation!r} merges into the frozen weights, and "
            f"task = {parts.task.name!r} measures against them as they were; use another rule"
        )


def _baselines(parts: Parts) -> Iterator[str]:
    """Refuse what a method cannot be measured with."""
    config = parts.config
    if config.method in ("personal", "central") and parts.privacy is not None:
        reason = "puts all rows in one place" if config.method == "central" else (
            "is about what clients score on their own rows, which a private run keeps to them"
        )  # fmt: skip
        yield f"method = {config.method!r} {reason}; set privacy.noise-multiplier = 0"
    if config.method == "central" and config.sampling.policy != "fraction":
        yield (
            "method = 'central' sees as many rows as the clients of a round, and sampling.policy = "
            f"{config.sampling.policy!r} does not say how many join; set it to 'fraction', with "
            "the same expected share"
        )


def _variant(parts: Parts) -> Iterator[str]:
    if problem := variant_problem(parts.config.lora.variant):
        yield problem


def _start(parts: Parts) -> Iterator[str]:
    """Refuse what cannot go with factors that are taken out of the frozen weights."""
    config, variant = parts.config, parts.config.lora.variant
    if variant not in STARTS:
        return
    said = f"lora.variant = {variant!r} takes its factors out of the frozen weights"
    if refused := parts.rule.refuse_start():
        yield f"{said}, and {refused}"
    for key, hinders, reason in (
        (f"task = {config.task!r}", parts.task.keeps_base, "measures against them as they were"),
        (
            f"model.quantization = {config.model.quantization!r}",
            config.model.quantization != "none",
            "would round what is left of them",
        ),
        ("lora.dora", config.lora.dora, "takes its magnitudes from them"),
        ("method = 'head'", config.method == "head", "trains no LoRA modules"),
        (
            f"ranks.policy = {config.ranks.policy!r}",
            isinstance(parts.policy.core, SelfPruningRank),
            "gives up entries that fade, which these do not",
        ),
    ):
        if hinders:
            yield f"{said}, and {key} {reason}; leave one of them out"


def _dora(parts: Parts) -> Iterator[str]:
    config = parts.config
    if config.lora.dora and not parts.rule.supports_dora:
        yield (
            f"aggregation = {config.aggregation!r} changes the factors that DoRA magnitudes belong "
            "to; set lora.dora = false or use an averaging rule"
        )
    if config.lora.dora and config.method == "head":
        yield "method = 'head' trains no LoRA modules; set lora.dora = false"


def _scores(parts: Parts) -> Iterator[str]:
    """Refuse scores that are none of the task's."""
    config, task = parts.config, parts.task
    wanted = config.checkpoint_best
    names = [f"{'' if s.higher_is_better else '-'}{s.name}" for s in (*task.scores, LOSS)]
    if wanted not in ("auto", *names):
        yield f"checkpoint-best: expected auto or one of {', '.join(names)}, got {wanted!r}"
    first = primary(task)
    if first.top is not None and config.stop_score > first.top:
        yield (
            f"stop-score: {config.stop_score:g}, but {first.label} ends at {first.top:g}, so no "
            "run would stop"
        )


def _units(parts: Parts) -> Iterator[str]:
    """Refuse a unit that the task cannot count in."""
    wanted, task = parts.config.weight_by, parts.task
    if wanted not in task.units:
        yield (
            f"weight-by: expected {' or '.join(task.units)} for task = {task.name!r}, got "
            f"{wanted!r}"
        )


def _of_other_tasks(parts: Parts) -> Iterator[str]:
    """Refuse what other tasks read and this one would pass over in silence."""
    flat, usual = parts.config.to_flat(), RunConfig().to_flat()
    readers: dict[str, list[str]] = {}
    for name, task in TASKS.items():
        for key in task.reads - parts.task.reads:
            readers.setdefault(key, []).append(name)
    for key, names in sorted(readers.items()):
        if flat[key] != usual[key]:
            yield (
                f"{key} = {flat[key]!r}: task = {parts.task.name!r} does not read it, only "
                f"{', '.join(names)}; leave it out"
            )


def _resume(parts: Parts) -> Iterator[str]:
    config = parts.config
    if config.resume_from in ("latest", "best") and not config.output:
        yield f"resume-from = {config.resume_from!r} is about the run in output; name its folder"


def _natural(parts: Parts) -> Iterator[str]:
    data = parts.config.data
    if data.partition == "natural" and not data.partition_column:
        yield (
            "data.partition = 'natural': data.partition-column names no column; set it to the one "
            "that says whose a row is"
        )


def _unequal_ranks(parts: Parts) -> Iterator[str]:
    config = parts.config
    if parts.rule.equal_ranks and parts.policy.may_differ and config.method in ("lora", "personal"):
        key = "list" if isinstance(parts.policy.core, ListRank) else "policy"
        yield (
            f"aggregation = {config.aggregation!r} averages equal ranks only, and ranks.{key} = "
            f"{getattr(config.ranks, key)!r} lets clients differ; use ranks.policy = 'uniform' or "
            "another aggregation"
        )


def _judge_of_halves(parts: Parts) -> Iterator[str]:
    config = parts.config
    kept = set(parts.rule.trained()) - set(parts.rule.uploaded())
    if kept and parts.policy.judges:
        instead = " or ranks.validation-rows = 0" if parts.validation_rows else ""
        yield (
            f"ranks.policy = {config.ranks.policy!r} judges whole adapters on the server, but "
            f"aggregation = {config.aggregation!r} keeps {', '.join(sorted(kept))} on the clients; "
            f"use another aggregation{instead}"
        )


def _budget(parts: Parts) -> Iterator[str]:
    ranks = parts.config.ranks
    for key, value, fits in (
        ("ranks.budget", ranks.budget, parts.policy.core.divides_budget),
        ("ranks.budget-mb", ranks.budget_mb, isinstance(parts.policy.core, AutoRank)),
    ):
        if value and not fits:
            yield (
                f"{key} is divided by scores, which ranks.policy = {ranks.policy!r} does not have; "
                "use ranks.policy = 'autorank'"
            )


def _coins(parts: Parts) -> Iterator[str]:
    sampling = parts.config.sampling
    if parts.sampler.probabilities([]) is not None:
        return
    for key, value, default in (
        ("estimator", sampling.estimator, "auto"),
        ("server-rate", sampling.server_rate, 1.0),
    ):
        if value != default:
            yield (
                f"sampling.{key} = {value!r} is for independent sampling, and sampling.policy = "
                f"{sampling.policy!r} has no probabilities; leave it out or use 'independent'"
            )


def _rule_and_sampler(parts: Parts) -> Iterator[str]:
    try:
        Participation(parts.sampler, MeasuredClock(), parts.rule).check()
    except (TypeError, ValueError) as error:
        yield f"sampling.policy = {parts.config.sampling.policy!r}: {error}"


def _waiting(parts: Parts) -> Iterator[str]:
    private = parts.privacy is not None
    for reason in refuse_waiting(parts.waiting, parts.rule, parts.sampler, private=private):
        yield f"round: {reason}"
    if parts.config.clock.deadline and parts.waiting != Waiting(staleness=parts.waiting.staleness):
        yield (
            "clock.deadline: round.deadline is the same for every clock, and goes with the other "
            "keys of round; use that alone"
        )


def _ways(parts: Parts) -> Iterator[str]:
    config = parts.config
    if config.round.mode != "auto":
        return
    if not (isinstance(parts.sampler, PlannedSampling) and config.clock.simulated):
        yield (
            "round.mode = 'auto' chooses by what the planner promises; set sampling.policy = "
            "'planned' and a simulated clock.profile, or name the mode"
        )
    if parts.waiting.closes or config.clock.deadline:
        yield (
            "round.mode = 'auto' chooses the deadline as well; leave round.quorum, round.deadline, "
            "round.over-selection and clock.deadline out"
        )


def _server_optimizer(parts: Parts) -> Iterator[str]:
    for reason in refuse_optimizer(parts.optimizer, parts.rule, parts.sampler):
        yield f"server.optimizer: {reason}"


def _clock(parts: Parts) -> Iterator[str]:
    clock = parts.config.clock
    if clock.simulated and (clock.shared_band or clock.allocator != "none"):
        key = "shared-band" if clock.shared_band else "allocator"
        yield (
            f"clock.{key} is for a real network, and clock.profile = {clock.profile!r} simulates "
            "one; leave it out, or set clock.profile = 'measured'"
        )
    if clock.allocate_with and clock.allocator == "none":
        yield "clock.allocate-with is for an allocator; set clock.allocator too"
    if not clock.simulated and (clock.deadline or clock.change_round):
        key = "deadline" if clock.deadline else "change-round"
        instead = ", or use round.deadline" if clock.deadline else ""
        yield f"clock.{key} is for simulated clocks; set clock.profile{instead}"
    if clock.availability == "always":
        return
    if not clock.simulated:
        yield (
            f"clock.availability = {clock.availability!r} is for simulated clocks; set "
            "clock.profile, or leave it out: real nodes come and go by themselves"
        )
    if parts.privacy is not None:
        yield (
            f"clock.availability = {clock.availability!r}: who is there would move the chance to "
            "join that the guarantee of privacy.noise-multiplier counts with; leave one of them out"
        )


def _together(parts: Parts) -> Iterator[str]:
    """Refuse what clients that share a batch cannot do."""
    config, train = parts.config, parts.config.train
    if config.simulate.clients_per_process < 2:
        return
    for key, hinders in (
        (f"task = {config.task!r}", not parts.task.one_pass),
        ("data.packing", config.data.packing),
        ("train.accumulate", train.accumulate > 1),
        ("train.gradient-checkpointing", train.gradient_checkpointing),
        ("train.proximal-mu", train.proximal_mu > 0),
        (f"train.optimizer = {train.optimizer!r}", train.optimizer != "adamw"),
        (f"lora.variant = {config.lora.variant!r}", config.lora.variant != "lora"),
        ("lora.dora", config.lora.dora),
    ):
        if hinders:
            yield (
                "simulate.clients-per-process: clients cannot train in one batch with "
                f"{key}; leave one of them out"
            )


def _quantization(parts: Parts) -> Iterator[str]:
    config, kind = parts.config, parts.config.model.quantization
    if kind == "none":
        return
    if not parts.task.quantizable:
        yield (
            f"model.quantization = {kind!r}: task = {config.task!r} trains weights in full, which "
            "cannot be of few bits; leave it out"
        )
    if config.lora.dora and kind == "8bit":
        yield (
            "lora.dora: its magnitudes are read from the frozen weights, which bitsandbytes does "
            "not give back at 8 bits; use model.quantization = '4bit', or lora.dora = false"
        )
    if parts.rule.merges_base:
        yield (
            f"aggregation = {config.aggregation!r} merges into the frozen weights, and "
            f"model.quantization = {kind!r} would round every merge to {kind.rstrip('bit')} bits; "
            "use a rule that does not merge, or model.quantization = 'none'"
        )


def _accumulate(parts: Parts) -> Iterator[str]:
    train = parts.config.train
    if train.accumulate > train.batch_size:
        yield (
            f"train.accumulate: {train.batch_size} rows of a step (train.batch-size) cannot be "
            f"{train.accumulate} parts; use at most {train.batch_size}, or more rows"
        )


def _privacy(parts: Parts) -> Iterator[str]:
    if parts.privacy is not None:  # what would void the guarantee of private updates
        share = parts.config.evaluate.clients
        for reason in refuse_private(
            parts.rule, parts.policy, parts.sampler, evaluate_fraction=share
        ):
            yield f"privacy.noise-multiplier: {reason}"


CHECKS: tuple[Callable[[Parts], Iterator[str]], ...] = (
    _rounded_merges,
    _kept_base,
    _baselines,
    _variant,
    _start,
    _dora,
    _scores,
    _units,
    _of_other_tasks,
    _resume,
    _natural,
    _unequal_ranks,
    _judge_of_halves,
    _budget,
    _coins,
    _rule_and_sampler,
    _waiting,
    _ways,
    _server_optimizer,
    _clock,
    _together,
    _quantization,
    _accumulate,
    _privacy,
)
