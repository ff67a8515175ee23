"""One line each for ``NumPyClient.fit`` and ``evaluate``: a list of arrays in, one out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import nn

from strategies.client.exchange import check_limit, receive, send
from strategies.client.message_api import reported, start_watch, training_metrics
from strategies.client.profiling import Measure, profile_if_wanted
from strategies.messages import NAMES_KEY


def receive_parameters(
    model: nn.Module,
    parameters: Sequence[NDArray[Any]],
    config: Mapping[str, Any],
    state: RecordDict | None = None,
    *,
    measure: Measure | None = None,
    adapter_name: str = "default",
    node: Mapping[str, Any] | None = None,
) -> None:
    """Make a PEFT model what ``fit(parameters, config)`` or ``evaluate`` was given.

    Make the optimiser after this call: where the rank changes, the parameters are new ones.

    Parameters
    ----------
    model : nn.Module
        What ``peft.get_peft_model`` returned; of any rank.
    parameters : sequence of arrays
        As received; their names come in the config.
    config : Mapping[str, Any]
        As received.
    state : RecordDict, optional
        ``context.state``; needed by rules that keep a factor on the client (fedsa), and to
        profile.
    measure : callable, optional
        Returns ``(losses, labels)`` of the training samples on the model as it now is. Called
        only when AutoRank asks for a new profile (``reassign_every``), with ``limit=…`` where it
        takes that and AutoRank has ``profile_samples``.
    adapter_name : str (default: "default")
    node : Mapping[str, Any], optional
        ``context.node_config``, whose ``max-rank`` is kept to.

    Raises
    ------
    ValueError
        If the config does not come from ``FedLoRA``, the arrays do not fit the model,
        ``state`` is needed, or, as a ``RankLimitError``, the rank is above the node's ``max-rank``.
    """
    if NAMES_KEY not in config:
        raise ValueError(
            f"the config has no {NAMES_KEY!r}, which FedLoRA sends with client_api = 'numpy'"
        )
    check_limit(config, node or {})
    names: list[str] = json.loads(str(config[NAMES_KEY]))
    if len(names) != len(parameters):
        raise ValueError(
            f"expected {len(names)} arrays, as the config names, got {len(parameters)}"
        )
    arrays = {n: torch.from_numpy(p) for n, p in zip(names, parameters, strict=True)}
    receive(model, arrays, config, state, adapter_name=adapter_name)
    profile_if_wanted(config, state, measure)
    start_watch(model)


def send_parameters(
    model: nn.Module,
    config: Mapping[str, Any],
    state: RecordDict | None = None,
    *,
    adapter_name: str = "default",
    node: Mapping[str, Any] | None = None,
) -> list[NDArray[Any]]:
    """Return the arrays that ``fit`` is to return, those that are asked for, in order.

    ``training_metrics(model, config, state, steps=…)`` gives the metrics that the clock and
    AutoRank read; ``fit_reply`` gives all that ``fit`` returns.

    Parameters
    ----------
    model, config, state, adapter_name
        As in ``receive_parameters``.
    node : Mapping[str, Any], optional
        ``context.node_config``; needed by a node that insists on privacy in it.
    """
    sent = send(model, config, state, adapter_name=adapter_name, node=node)
    return [tensor.numpy() for tensor in sent.values()]


def fit_reply(
    model: nn.Module,
    config: Mapping[str, Any],
    state: RecordDict | None = None,
    *,
    num_examples: int,
    metrics: Mapping[str, float] | None = None,
    steps: int | None = None,
    adapter_name: str = "default",
    node: Mapping[str, Any] | None = None,
) -> tuple[list[NDArray[Any]], int, dict[str, Any]]:
    """Return what ``fit`` is to return, arrays, weight and metrics: a NumPyClient's ``make_reply``.

    Where the message asks for a private update, the weight is 1 and there are no metrics.

    Parameters
    ----------
    model, config, state, adapter_name, node
        As in ``send_parameters``.
    num_examples : int
        The weight of this client.
    metrics : Mapping[str, float], optional
        Numbers to report, beside those of ``training_metrics`` and before them.
    steps : int, optional
        Local optimiser steps, for the clock.
    """
    arrays = send_parameters(model, config, state, adapter_name=adapter_name, node=node)
    found = {**training_metrics(model, config, state, steps=steps), **(metrics or {})}
    return arrays, *reported(config, node, num_examples, found)
