"""One line each for ``@app.train()`` and ``@app.evaluate()``: a message in, a reply out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeVar

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from torch import nn

from strategies.client.exchange import check_limit, receive, send
from strategies.client.profiling import Measure, profile_if_wanted, profile_wanted, profiled
from strategies.messages import (
    NAMES_KEY,
    STEPS_KEY,
    TRAIN_SECONDS_KEY,
    from_record,
    to_record,
)
from strategies.privacy import Privacy

Record = TypeVar("Record", ArrayRecord, ConfigRecord)


def apply_adapter(
    model: nn.Module,
    message: Message,
    context: Context | None = None,
    *,
    measure: Measure | None = None,
    arrays_key: str | None = None,
    config_key: str | None = None,
    adapter_name: str = "default",
) -> ConfigRecord:
    """Make a PEFT model what a message says it is: rank, scale, values, merges, what is trained.

    Instead of ``set_peft_model_state_dict(model, message.content["arrays"].…)``. Make the
    optimiser after this call: where the rank changes, the parameters are new ones.

    Parameters
    ----------
    model : nn.Module
        What ``peft.get_peft_model`` returned; of any rank. One resident model can serve one
        client after another.
    message : Message
        Of type ``train`` or ``evaluate``, from ``FedLoRA``.
    context : Context, optional
        Needed by rules that keep a factor on the client (fedsa), to profile, and for a
        ``max-rank`` in the node config to be kept to.
    measure : callable, optional
        Returns ``(losses, labels)`` of the training samples on the model as it now is. Called
        only when AutoRank asks for a new profile (``reassign_every``), with ``limit=…`` where it
        takes that and AutoRank has ``profile_samples``.
    arrays_key, config_key : str, optional
        Keys of the records in the message. Default: the only record of its kind.
    adapter_name : str (default: "default")

    Returns
    -------
    ConfigRecord
        The message's config, with the user's own keys.

    Raises
    ------
    ValueError
        If a record is missing, the message is for a ``NumPyClient``, the arrays do not fit the
        model, ``context`` is needed, or the rank is above the node's ``max-rank``.
    """
    config = _record(message.content.config_records, config_key, "config")
    if NAMES_KEY in config:
        raise ValueError(
            "the server speaks to NumPyClients; set client_api = 'message' in its FedLoRA (a "
            "NumPyClient calls receive_parameters instead)"
        )
    if context is not None:
        check_limit(config, context.node_config)
    arrays = _record(message.content.array_records, arrays_key, "array")
    state = context.state if context is not None else None
    receive(model, from_record(arrays), config, state, adapter_name=adapter_name)
    profile_if_wanted(config, state, measure)
    start_watch(model)
    return config


def make_reply(
    model: nn.Module,
    message: Message,
    *,
    num_examples: int,
    loss: float | None = None,
    metrics: Mapping[str, float] | None = None,
    steps: int | None = None,
    context: Context | None = None,
    config_key: str | None = None,
    arrays_key: str = "arrays",
    metrics_key: str = "metrics",
    weight_key: str = "num-examples",
    adapter_name: str = "default",
) -> Message:
    """Pack the reply to a training or evaluation message, as ``FedLoRA`` expects it.

    To a training message it holds the trained arrays, those that are asked for alone, in the
    order of the received ones where their names are the same: Flower's clipping mods compare
    the two lists. To an evaluation message it holds the metrics alone. Where the message asks
    for a private update, the only metric is a weight of 1.

    Parameters
    ----------
    model : nn.Module
        The model that ``apply_adapter`` got.
    message : Message
        What is replied to.
    num_examples : int
        The weight of this client.
    loss : float, optional
        Its mean training or evaluation loss, reported as ``loss``.
    metrics : Mapping[str, float], optional
        More numbers to report. ``quality`` must be among them where the config says
        ``report-quality``.
    steps : int, optional
        Local optimiser steps, for the clock. The seconds since ``apply_adapter`` are reported
        as ``seconds`` unless ``metrics`` has them.
    context : Context, optional
        As in ``apply_adapter``; also needed by a node that insists on privacy in its config.
    config_key : str, optional
        As in ``apply_adapter``.
    arrays_key, metrics_key : str (default: "arrays", "metrics")
        Keys of the records in the reply, as in Flower's template.
    weight_key : str (default: "num-examples")
        The strategy's ``weighted_by_key``.
    adapter_name : str (default: "default")

    Raises
    ------
    ValueError
        If the message has no single config record, ``context`` is needed, or the message asks
        for less privacy than the node insists on.
    """
    evaluated = message.metadata.message_type.partition(".")[0] == MessageType.EVALUATE
    config = _record(message.content.config_records, config_key, "config")
    state = context.state if context is not None else None
    node = context.node_config if context is not None else None
    found: dict[str, float | int] = {}
    if loss is not None:
        found["loss"] = float(loss)
    if not evaluated:
        found |= training_metrics(model, config, state, steps=steps)
    found |= metrics or {}
    weight, found = reported(config, node, num_examples, found)
    content = RecordDict({metrics_key: MetricRecord({weight_key: weight, **found})})
    if not evaluated:
        record = to_record(send(model, config, state, adapter_name=adapter_name, node=node))
        content[arrays_key] = _in_received_order(record, message)
    return Message(content, reply_to=message)


def reported(
    config: Mapping[str, Any],
    node: Mapping[str, Any] | None,
    num_examples: int,
    metrics: Mapping[str, Any],
) -> tuple[int, dict[str, Any]]:
    """Return the weight and the metrics of a reply; of a private one a weight of 1 alone."""
    if Privacy.asked(config, node):  # none of these numbers has noise
        return 1, {}
    return num_examples, dict(metrics)


def start_watch(model: nn.Module) -> None:
    """Start the watch that ``training_metrics`` reads."""
    model.fedlora_started = time.perf_counter()  # type: ignore[assignment]


def training_metrics(
    model: nn.Module,
    config: Mapping[str, Any],
    state: RecordDict | None = None,
    *,
    steps: int | None = None,
) -> dict[str, float | int]:
    """Return what the clock and AutoRank need beside a client's own metrics.

    Parameters
    ----------
    model : nn.Module
        Its ``seconds`` run from ``apply_adapter`` or ``receive_parameters`` to this call.
    config : Mapping[str, Any]
        The received config; says whether a profile is wanted.
    state : RecordDict, optional
        Where the profile is.
    steps : int, optional
        Local optimiser steps.
    """
    found: dict[str, float | int] = {}
    if (started := getattr(model, "fedlora_started", None)) is not None:
        found[TRAIN_SECONDS_KEY] = time.perf_counter() - started
    if steps is not None:
        found[STEPS_KEY] = steps
    if state is not None and profile_wanted(config):
        found |= profiled(state)
    return found


def _record(records: Mapping[str, Record], key: str | None, kind: str) -> Record:
    """Return the record of that key, or the only one."""
    if key is None and len(records) == 1:
        return next(iter(records.values()))
    if key is not None and key in records:
        return records[key]
    raise ValueError(
        f"expected {'one' if key is None else repr(key)} {kind} record in the message, got "
        f"{', '.join(map(repr, records)) or 'none'}; name it as the strategy does"
    )


def _in_received_order(record: ArrayRecord, message: Message) -> ArrayRecord:
    for received in message.content.array_records.values():
        if received.keys() == record.keys():
            return ArrayRecord({name: record[name] for name in received})
    return record
