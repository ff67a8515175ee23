"""What a message means for a PEFT model, and what it sends back: ``receive`` and ``send``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from strategies.client.peft_model import (
    adapter_parameters,
    adapter_state,
    check_mergeable,
    load_adapter,
    merge_into_base,
    refuse_frozen,
)
from strategies.clients import whole
from strategies.lora import factor_of
from strategies.lora.algebra import resize
from strategies.messages import (
    MERGES_KEY,
    NAMES_KEY,
    RANK_KEY,
    SCALE_KEY,
    SEND_KEY,
    TRAIN_KEY,
    from_record,
    to_record,
)
from strategies.model import GlobalModel
from strategies.privacy import Privacy
from strategies.wire import WIRE_KEY, decode, encode

# Where a client keeps the factors that never leave it, in its Flower state.
KEPT_KEY = "fedlora.kept"


def receive(
    model: nn.Module,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    state: RecordDict | None = None,
    *,
    adapter_name: str = "default",
) -> None:
    """Make a PEFT model what the server says it is, in place.

    Parameters
    ----------
    model : nn.Module
        What ``peft.get_peft_model`` returned; of any rank.
    arrays : Mapping[str, Tensor]
        The received arrays by name, as ``strategies.messages.from_record`` gives them.
    config : Mapping[str, Any]
        The received config.
    state : RecordDict, optional
        The client's Flower state (``context.state``); rules that keep a factor on the
        client (fedsa) need it.
    adapter_name : str (default: "default")

    Raises
    ------
    ValueError
        If the arrays do not fit the model, a factor that was not sent cannot be found in
        ``state``, a factor to train is frozen in the model, or the rule merges into the frozen
        weights and this model's cannot be merged into.
    """
    if WIRE_KEY in config:
        tensors = decode(arrays, str(config[WIRE_KEY]))
    else:  # the global arrays themselves, of whatever type the server's model is
        tensors = {name: tensor.float() for name, tensor in arrays.items()}
    tensors.update(_kept_factors(model, tensors, state, adapter_name))
    received = GlobalModel.from_tensors(tensors, float(config.get(SCALE_KEY, 1.0)))
    if TRAIN_KEY in config and not getattr(model, "fedlora_ready", False):
        refuse_frozen(model, str(config[TRAIN_KEY]), adapter_name=adapter_name)
    if config.get(MERGES_KEY):  # before the first merge, which comes after the first round
        check_mergeable(model, adapter_name=adapter_name)
    merge_into_base(model, received.merged, adapter_name=adapter_name)
    load_adapter(model, received.adapter, adapter_name=adapter_name)
    trained = str(config.get(TRAIN_KEY, "AB"))
    for key, parameter in adapter_parameters(model, adapter_name, all_parameters=False):
        factor = factor_of(key)
        if factor is not None:
            parameter.requires_grad_(factor in trained)
    model.fedlora_ready = True  # type: ignore[assignment]
    # A private update is clipped by how far it moved from here.
    model.fedlora_received = tensors if Privacy.asked(config) else None  # type: ignore[assignment]


class RankLimitError(ValueError):
    """A message's rank is above what the node says it can hold.

    An app that keeps the texts of its errors to itself may send ``told`` to the server: nothing in
    it comes from the data.
    """

    @property
    def told(self) -> str:
        """The whole text."""
        return str(self)


def check_limit(config: Mapping[str, Any], node: Mapping[str, Any]) -> None:
    """Refuse a message whose rank is above what this node says it can hold.

    The server asks a node for its limit again after such an error, and follows it.

    Raises
    ------
    RankLimitError
        With both ranks.
    """
    limit, rank = whole(node.get("max-rank"), low=1), whole(config.get(RANK_KEY), low=1)
    if limit is not None and rank is not None and rank > limit:
        raise RankLimitError(
            f"the server sends rank {rank}, but this node's max-rank is {limit}: it is asked for "
            "again before the next round, if its app answers queries (register_identity(app); a "
            "NumPyClient: get_properties)"
        )


def send(
    model: nn.Module,
    config: Mapping[str, Any],
    state: RecordDict | None = None,
    *,
    adapter_name: str = "default",
    node: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Return the arrays of the reply, by name and in the order of the received ones.

    Clipped and noised if the message asks for it (``strategies.privacy``).

    Parameters
    ----------
    model, config, state, adapter_name
        As in ``receive``. A trained factor that is not sent back is put into ``state``.
    node : Mapping[str, Any], optional
        The node config (``context.node_config``), in which a node may insist on a least
        ``dp-noise-multiplier`` and a largest ``dp-clip``.

    Raises
    ------
    ValueError
        If ``receive`` was not called with this model, ``state`` is needed and missing, or the
        message asks for less privacy than the node.
    """
    if not getattr(model, "fedlora_ready", False):
        raise ValueError(
            "this model never got the global adapter: call apply_adapter(model, message) (a "
            "NumPyClient: receive_parameters) before it is trained, and reply with the same model"
        )
    sent, trained = str(config.get(SEND_KEY, "AB")), str(config.get(TRAIN_KEY, "AB"))
    out: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for key, tensor in adapter_state(model, adapter_name=adapter_name).items():
        factor = factor_of(key)
        if factor is None or factor in sent:
            out[key] = tensor
        elif factor in trained:
            kept[key] = tensor
    if kept:
        if state is None:
            raise ValueError("this rule keeps a factor on the client; pass context.state")
        state[KEPT_KEY] = to_record(kept)
    if privacy := Privacy.asked(config, node):
        out = privacy.apply(model.fedlora_received, out)  # type: ignore[arg-type]
    out = _in_order_of(str(config.get(NAMES_KEY, "[]")), out)
    return encode(out, str(config.get(WIRE_KEY, "float32")))


def _in_order_of(names: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the order of a JSON list of names, what it does not name last.

    A ``NumPyClient``'s arrays travel without names, and a model has an order of its own: DoRA
    magnitudes and biases between the factors, layers by number where a file has them by
    letter.
    """
    first = [name for name in json.loads(names) if name in tensors]
    return {name: tensors[name] for name in (*first, *(n for n in tensors if n not in set(first)))}


def _kept_factors(
    model: nn.Module, tensors: Mapping[str, Tensor], state: RecordDict | None, adapter_name: str
) -> dict[str, Tensor]:
    """Return the partners of factors that came alone: kept ones, or zeros at first."""
    alone = {
        partner: tensor.shape[0]
        for key, tensor in tensors.items()
        if factor_of(key) == "A" and (partner := _partner(key)) not in tensors
    }
    if not alone:
        return {}
    if state is None:
        raise ValueError("this rule keeps a factor on the client; pass context.state")
    kept = from_record(state[KEPT_KEY]) if KEPT_KEY in state else {}  # type: ignore[arg-type]
    own = adapter_state(model, adapter_name=adapter_name)
    return {
        key: resize(kept[key] if key in kept else torch.zeros_like(own[key]).cpu(), 1, rank)
        for key, rank in alone.items()
        if key in own
    }


def _partner(key: str) -> str:
    head, _, tail = key.rpartition("_A")
    return f"{head}_B{tail}"
