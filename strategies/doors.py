"""What is said to those who give ``FedLoRA`` something else than it takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

T = TypeVar("T")

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
    "proximal_mu": "a term of the loss in your training loop",
}


def refuse_unknown(unknown: Iterable[str], known: Callable[..., Any]) -> None:
    """Refuse keyword arguments that do not exist, and say what to write instead.

    Raises
    ------
    TypeError
        If there are any.
    """
    names = [n for n, p in inspect.signature(known).parameters.items() if p.kind == p.KEYWORD_ONLY]
    said = []
    for name in unknown:
        if name in FEDAVG:
            said.append(f"{name!r} of FedAvg is {FEDAVG[name]} here")
        else:
            close = difflib.get_close_matches(name, names, n=1)
            said.append(f"{name!r} is unknown{f'; did you mean {close[0]!r}?' if close else ''}")
    if said:
        raise TypeError(f"FedLoRA: {'; '.join(said)}")


def made(what: str, value: T | str, kind: Any, make: Callable[[str], T], example: str) -> T:
    """Return an object of a kind: as it came, or made by its registered name.

    Parameters
    ----------
    what : str
        The name of the argument.
    value : object or str
    kind : type
    make : callable
        Returns what is registered by a name.
    example : str
        What one could write.

    Raises
    ------
    TypeError
        If it is neither; says what it is instead.
    ValueError
        If no such name is registered.
    """
    if isinstance(value, str):
        return make(value)
    if isinstance(value, kind):
        return cast(T, value)
    raise TypeError(f"{what}: expected {_article(kind)}{kind.__name__} or its name, got "
                    f"{_said(value)}; write for example {example}")  # fmt: skip


def _said(value: Any) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__} itself (call it)"
    from flwr.serverapp.strategy import Strategy

    if isinstance(value, Strategy):
        return f"{type(value).__name__}, which is a whole strategy (a preset)"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}…"


def _article(kind: type) -> str:
    return "an " if kind.__name__[0] in "AEIO" else "a "
