"""What is said to those who give ``FedLoRA`` something else than it takes."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, cast

from flwr.serverapp.strategy import Strategy

from strategies.aggregation import ROBUST, Aggregator, Robust, make_aggregator
from strategies.messages import MessageProtocol, NumPyProtocol, Protocol
from strategies.optimizers import OPTIMIZERS, ServerOptimizer
from strategies.privacy import PrivateRun
from strategies.ranks import RankPolicy, make_rank_policy
from strategies.round.waiting import Waiting
from strategies.sampling import Sampler, make_sampler
from strategies.saving import Saver
from strategies.scores import Score
from strategies.wallclock import Clock, MeasuredClock

T = TypeVar("T")
P = ParamSpec("P")

#: Arguments of Flower's ``FedAvg``, of the new style and the old, and what they are here.
FEDAVG = {
    "fraction_train": "sampling=FractionSampling(fraction)",
    "fraction_fit": "sampling=FractionSampling(fraction)",
    "min_train_nodes": "sampling=FractionSampling(fraction, min_clients=n)",
    "min_fit_clients": "sampling=FractionSampling(fraction, min_clients=n)",
    "fraction_evaluate": "evaluate_fraction",
    "min_evaluate_nodes": "evaluate_fraction",
    "min_evaluate_clients": "evaluate_fraction",
    "min_available_clients": "min_available_nodes",
    "initial_parameters": "start(initial_arrays=…), or LegacyFedLoRA(engine, initial_arrays)",
    "evaluate_fn": "start(evaluate_fn=…), or LegacyFedLoRA(evaluate_fn=…)",
    "on_fit_config_fn": "start(train_config=…), or LegacyFedLoRA(on_fit_config_fn=…)",
    "on_evaluate_config_fn": "start(evaluate_config=…), or LegacyFedLoRA(on_evaluate_config_fn=…)",
    "fit_metrics_aggregation_fn": "train_metrics_aggr_fn, or that of LegacyFedLoRA",
    "evaluate_metrics_aggregation_fn": "evaluate_metrics_aggr_fn, or that of LegacyFedLoRA",
    "accept_failures": "min_replies and min_answering",
    "inplace": "nothing: replies are folded in as they come",
}


#: What a number must be, by its argument: its kind, whether it is in range, and how that is said.
_NUMBERS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "scale": (Real, lambda x: x > 0, "a number above 0"),
    "proximal_mu": (Real, lambda x: 0 <= x < math.inf, "0 (none) or more"),
    "clip_norm": (Real, lambda x: x >= 0, "0 (none) or more"),
    "seed": (Integral, lambda x: x >= 0, "a whole number of 0 or more"),
    "query_timeout": (Real, lambda x: x >= 0, "seconds, 0 or more"),
    "profile_timeout": (Real, lambda x: x >= 0, "seconds, 0 or more"),
    **dict.fromkeys(
        ("evaluate_fraction", "min_answering"), (Real, lambda x: 0 <= x <= 1, "0 to 1")
    ),
    **dict.fromkeys(
        ("min_replies", "min_available_nodes", "evaluate_every"),
        (Integral, lambda x: x >= 1, "at least 1"),
    ),
}

#: What else an argument must be: its kind, how that is said, and what one could write.
_KINDS: dict[str, tuple[Any, str, str]] = {
    **dict.fromkeys(("query", "head_only"), (bool, "True or False", "")),
    **dict.fromkeys(
        ("wire_dtype", "weighted_by_key", "arrayrecord_key", "configrecord_key"),
        (str, "a text", ""),
    ),
    "stop_when": (Callable, "a callable", "lambda scores: scores['accuracy'] > 0.9"),
    **dict.fromkeys(
        ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"),
        (Callable, "a callable as Flower's FedAvg takes it", ""),
    ),
    "saver": (
        Saver,
        "a Saver",
        "Saver(Checkpoints('runs/1'), fingerprint={}) of strategies.saving and .checkpoint",
    ),
    "privacy": (
        PrivateRun,
        "a PrivateRun",
        "PrivateRun(Privacy(clip=0.5, noise_multiplier=8)) of strategies.privacy",
    ),
    "clock": (Clock, "a Clock", "SimulatedClock('lab', …) of strategies.wallclock"),
    "waiting": (Waiting, "a Waiting", "Waiting(quorum=0.8) of strategies.round.waiting"),
}


def _refuse_unknown(unknown: Iterable[str], known: Sequence[str]) -> None:
    said = []
    for name in sorted(unknown):
        if name in FEDAVG:
            said.append(f"{name!r} of FedAvg is {FEDAVG[name]} here")
        else:
            close = difflib.get_close_matches(name, known, n=1)
            said.append(f"{name!r} is unknown{f'; did you mean {close[0]!r}?' if close else ''}")
    if said:
        raise TypeError(f"FedLoRA: {'; '.join(said)}")


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Have a constructor refuse what is unknown, of another kind, or out of range.

    Raises
    ------
    TypeError, ValueError
        By the constructor: with what was expected.
    """
    known = {
        name: one.default
        for name, one in inspect.signature(init).parameters.items()
        if one.kind is one.KEYWORD_ONLY
    }

    @wraps(init)
    def told(*args: P.args, **settings: P.kwargs) -> None:
        if len(args) > 1:  # beside self
            raise TypeError(
                f"FedLoRA: every argument has a name, got {_said(args[1])} without one; write for "
                "example FedLoRA(aggregation='flexlora')"
            )
        _refuse_unknown(settings.keys() - known.keys(), list(known))
        for name, value in settings.items():
            if value is not None or known[name] is not None:
                _check(name, value)
        init(*args, **settings)

    return told


def _check(name: str, value: Any) -> None:
    if name in _NUMBERS:
        kind, fits, said = _NUMBERS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "a whole number" if kind is Integral else "a number"
            more = "" if said.startswith("a ") else f", {said}"
            raise TypeError(f"{name}: expected {what}{more}, got {_said(value)}")
        if not fits(value):
            raise ValueError(f"{name}: expected {said}, got {value!r}")
    elif name in _KINDS:
        kind, said, example = _KINDS[name]
        if not isinstance(value, kind) or inspect.isclass(value):
            more = f"; write for example {example}" if example else ""
            raise TypeError(f"{name}: expected {said}, got {_said(value, kind)}{more}")


def listeners(value: Iterable[T]) -> list[T]:
    """Return what ``listeners`` means."""
    return _each("listeners", value, callable, "callables", "[print]")


def scores(value: Iterable[Score]) -> list[Score]:
    """Return what ``scores`` means."""
    example = "[Score('accuracy', 'accuracy')] of strategies.scores"
    return _each("scores", value, lambda one: isinstance(one, Score), "Score", example)


def _each(
    what: str, value: Iterable[T], fits: Callable[[Any], bool], said: str, example: str
) -> list[T]:
    """Return a list of what fits.

    Raises
    ------
    TypeError
        If it is something else.
    """
    if fits(value) or isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{what}: expected a list of {said}, got {_said(value)}; write for example "
                        f"{example}")  # fmt: skip
    found = list(value)
    for one in found:
        if not fits(one) or inspect.isclass(one):
            raise TypeError(f"{what}: expected {said}, got {_said(one)}")
    return found


def rule(value: Aggregator[Any] | str) -> Aggregator[Any]:
    """Return what ``aggregation`` means."""
    example = "aggregation='flexlora' or FlexLoRA() of strategies.aggregation"
    return _made("aggregation", value, Aggregator, make_aggregator, example)


def robust(value: Robust | str) -> Robust | str:
    """Return what ``robust`` means; "none" as it is."""
    if value == "none":
        return "none"
    example = "robust='median' or TrimmedMean(liars=0.3) of strategies.aggregation"
    return _made("robust", value, Robust, ROBUST.make, example)


def optimizer(value: ServerOptimizer | str) -> ServerOptimizer | None:
    """Return what ``server_optimizer`` means; None for "none"."""
    if value == "none":
        return None
    example = "server_optimizer='adam' or Adam(learning_rate=0.02) of strategies.optimizers"
    return _made("server_optimizer", value, ServerOptimizer, OPTIMIZERS.make, example)


def policy(value: RankPolicy | str) -> RankPolicy:
    """Return what ``ranks`` means."""
    example = "UniformRank(8) or ListRank([2, 4, 8]) of strategies.ranks"
    return _made("ranks", value, RankPolicy, make_rank_policy, example)


def sampler(value: Sampler | str) -> Sampler:
    """Return what ``sampling`` means."""
    example = "FractionSampling(0.5) of strategies.sampling"
    return _made("sampling", value, Sampler, make_sampler, example)


def protocol(client_api: str, arrays_key: str, config_key: str, weight_key: str) -> Protocol:
    """Return what ``client_api`` means."""
    if client_api == "message":
        return MessageProtocol(arrays_key, config_key, weight_key)
    if client_api == "numpy":
        return NumPyProtocol()
    raise ValueError(f"client_api: expected 'message' or 'numpy', got {client_api!r}")


def clock(value: Clock | None) -> Clock:
    """Return what ``clock`` means."""
    return MeasuredClock() if value is None else value


def _made(what: str, value: T | str, kind: Any, make: Callable[[str], T], example: str) -> T:
    """Return an object of a kind: as it came, or made by its registered name.

    Raises
    ------
    TypeError
        If it is neither, or its name alone does not say enough; says what it is instead.
    ValueError
        If no such name is registered.
    """
    if isinstance(value, str):
        try:
            return make(value)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        except TypeError as error:  # no default for what it must know
            raise TypeError(f"{what}: the name {value!r} alone does not say enough ({error}); "
                            f"write for example {example}") from error  # fmt: skip
    if isinstance(value, kind):
        return cast(T, value)
    raise TypeError(f"{what}: expected {_article(kind)}{kind.__name__} or its name, got "
                    f"{_said(value, kind)}; write for example {example}")  # fmt: skip


def _said(value: Any, kind: Any = None) -> str:
    if inspect.isclass(value):
        if issubclass(value, Strategy):
            return f"the class {value.__name__}, which makes a whole strategy (a preset)"
        call = " itself (call it)" if inspect.isclass(kind) and issubclass(value, kind) else ""
        return f"the class {value.__name__}{call}"
    if isinstance(value, Strategy):
        return f"{type(value).__name__}, which is a whole strategy (a preset)"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}…"


def _article(kind: type) -> str:
    return "an " if kind.__name__[0] in "AEIO" else "a "
