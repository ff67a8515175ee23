"""The two ways Flower clients talk, and the one place where records become adapters.

``MessageProtocol`` serves Message API apps (``@app.train()``), ``NumPyProtocol`` serves
``NumPyClient``s. Both tell a client the rank and scale of what it gets, and read its
reply into a ``Reply``; what a reply lacks is said in a ``ReplyError``.
"""

from __future__ import annotations

import io
import json
import math
import tokenize
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from strategies.claims import LONGEST_NAME, ReplyError, clean, numbers, weight_of
from strategies.errors import cause

Record = TypeVar("Record")

RANK_KEY = "lora-rank"
SCALE_KEY = "lora-scale"
NAMES_KEY = "array-names"
ROUND_KEY = "server-round"
MODEL_ROUND_KEY = "model-round"  # as server-round, but only rounds that made this model count
CLIENT_KEY = "client-index"
TRAIN_KEY = "lora-train"  # the factors to train: "AB", "A", "B" or "" (head only)
MERGES_KEY = "lora-merges"  # that the rule will merge into the frozen weights
QUALITY_KEY = "report-quality"  # whether the reply must have a metric "quality"
SEND_KEY = "lora-send"  # the factors to send back
PROXIMAL_KEY = "proximal-mu"  # FedProx's weight, as Flower's own strategy calls it
COUNT_KEY = "report-num-examples"  # in a query: the answer is to have "num-examples"
# Metrics of a reply that the clock reads: seconds of local training, those from having the message
# to having the reply, and optimiser steps.
TRAIN_SECONDS_KEY = "seconds"
HELD_SECONDS_KEY = "held-seconds"
STEPS_KEY = "steps"


# A reply may have this many times the bytes that were planned, and so many beside them.
BYTES_FACTOR, BYTES_MORE = 2, 1 << 20


@dataclass(frozen=True)
class Reply:
    """What a client sent back.

    ``weight`` is its aggregation weight, ``metrics`` every finite number it reported,
    ``nbytes`` the size of its arrays on the wire, ``notes`` what was left out of it.
    """

    arrays: Mapping[str, Tensor]
    weight: float
    metrics: Mapping[str, float]
    nbytes: int = 0
    notes: tuple[str, ...] = ()


def training_loss(metrics: Mapping[str, float]) -> float | None:
    """Return the training loss of a reply, if it tells; many apps use Hugging Face's name."""
    return metrics.get("loss", metrics.get("train_loss"))


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as a Flower record, keys kept."""
    return ArrayRecord({name: Array(_numpy(tensor)) for name, tensor in tensors.items()})


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """Return a Flower record as tensors, keys kept.

    Raises
    ------
    ReplyError
        If an array cannot be read.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def content_bytes(content: RecordDict) -> int:
    """Return the size of all arrays of a message on the wire in bytes, whatever they are."""
    return sum(map(record_bytes, content.array_records.values()))


def check_size(content: RecordDict, names: Sequence[str], planned: int) -> None:
    """Refuse a training reply that is far larger than what was asked for, unread.

    Raises
    ------
    ReplyError
        If it has too many bytes, arrays, or names too long.
    """
    size, most = content_bytes(content), BYTES_FACTOR * planned + BYTES_MORE
    if size > most:
        raise ReplyError(
            f"its arrays have {size} bytes, but {planned} were planned and {most} are the most"
        )
    keys = [key for record in content.array_records.values() for key in record]
    if len(keys) > 2 * len(names) + 16:
        raise ReplyError(f"{len(keys)} arrays came back, expected {len(names)}")
    known = set(names)
    longest = max((len(name) for name in names), default=0) + LONGEST_NAME
    for key in keys:
        if len(key) > longest or (key not in known and clean(key, len(key)) != key):
            raise ReplyError(f"an array is named {clean(key, 60)!r} …, which nobody asked for")


def record_bytes(record: ArrayRecord) -> int:
    """Return the size of a record's arrays on the wire in bytes."""
    return sum(len(array.data) for array in record.values())


with warnings.catch_warnings():
    # torch says once a process that memory of a message is read-only. It is meant to be.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(4), np.float32))


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16; float32 holds it exactly
        tensor = tensor.float()
    return tensor.contiguous().numpy()


@lru_cache(maxsize=1024)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and type from a ``.npy`` header.

    Parsing one takes longer than reading a small array, and clients send the same ones.
    """
    stream = io.BytesIO(data)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    return read(stream)


def _tensor(name: str, array: Array) -> Tensor:
    """Return an array as a tensor over the message's own memory: read, never written to."""
    try:
        data = array.data
        size_bytes = 2 if data[6:7] == b"\x01" else 4  # of the header's length, by version
        start = 8 + size_bytes + int.from_bytes(data[8 : 8 + size_bytes], "little")
        shape, fortran, dtype = _header(data[:start])
        if dtype.hasobject:
            raise ValueError(f"expected numbers, got {dtype}")
        size = math.prod(shape)
        if len(data) != start + size * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes do not hold {size} values of {dtype}")
        value = np.frombuffer(data, dtype, size, start)
        # Columns first is how numpy writes a transposed array.
        return torch.from_numpy(value.reshape(shape[::-1]).T if fortran else value.reshape(shape))
    except (ValueError, TypeError, KeyError, EOFError, OSError, SyntaxError, MemoryError,
            RecursionError, tokenize.TokenError) as error:  # fmt: skip
        # numpy parses the header as Python source, with all that may go wrong there.
        raise ReplyError(f"array {name!r} cannot be read ({clean(str(error))})") from error


class Protocol(ABC):
    """Pack what goes to clients and read what comes back."""

    query_type: ClassVar[str]

    @abstractmethod
    def train(self, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Return the content of a training message."""

    @abstractmethod
    def evaluate(self, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Return the content of an evaluation message."""

    @abstractmethod
    def query(self, config: ConfigRecord) -> RecordDict:
        """Return the content of a query."""

    @abstractmethod
    def read_train(self, content: RecordDict, names: list[str]) -> Reply:
        """Read a training reply; ``names`` are the arrays that must come back, in order."""

    @abstractmethod
    def read_evaluate(self, content: RecordDict) -> Reply:
        """Read an evaluation reply."""

    @abstractmethod
    def count(self, message: Message) -> float:
        """Return how much a training or evaluation reply counts, without reading its arrays.

        Raises
        ------
        ValueError
            If it does not say so.
        """

    @abstractmethod
    def read_query(self, content: RecordDict) -> dict[str, Any]:
        """Read the reply to a query."""


@dataclass(frozen=True)
class MessageProtocol(Protocol):
    """Message API clients: one array, one config and one metric record, by key.

    Parameters
    ----------
    arrays_key, config_key : str (default: "arrays", "config")
        Keys of the records that are sent, as in Flower's own strategies.
    weight_key : str (default: "num-examples")
        The metric by which replies are weighted.
    """

    arrays_key: str = "arrays"
    config_key: str = "config"
    weight_key: str = "num-examples"
    query_type: ClassVar[str] = "query"

    def train(self, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Return the arrays and the config."""
        return RecordDict({self.arrays_key: arrays, self.config_key: config})

    evaluate = train

    def query(self, config: ConfigRecord) -> RecordDict:
        """Return the config."""
        return RecordDict({self.config_key: config})

    def read_train(self, content: RecordDict, names: list[str]) -> Reply:
        """Read the one array record and the metrics."""
        if len(content.array_records) != 1:
            if "fitres.parameters" in content.array_records:
                raise ReplyError("the reply is a NumPyClient's; set client_api = 'numpy'")
            raise ReplyError(
                f"expected one array record, got {len(content.array_records)}: "
                f"{clean(', '.join(content.array_records)) or 'none'}"
            )
        (record,) = content.array_records.values()
        metrics, weight, notes = self._metrics(content)
        return Reply(from_record(record), weight, metrics, record_bytes(record), notes)

    def read_evaluate(self, content: RecordDict) -> Reply:
        """Read the metrics."""
        metrics, weight, notes = self._metrics(content)
        return Reply({}, weight, metrics, notes=notes)

    def count(self, message: Message) -> float:
        """Return the metric of ``weight_key``."""
        return weight_of(_all_metrics(message.content), self.weight_key)

    def read_query(self, content: RecordDict) -> dict[str, Any]:
        """Return everything in the reply's config and metric records."""
        answer: dict[str, Any] = {}
        for record in content.config_records.values():
            answer.update(record)
        for metrics in content.metric_records.values():
            answer.update(metrics)
        return answer

    def _metrics(self, content: RecordDict) -> tuple[dict[str, float], float, tuple[str, ...]]:
        return numbers(_all_metrics(content), self.weight_key, SCALE_KEY)


class NumPyProtocol(Protocol):
    """``NumPyClient``s: arrays are a list; their names travel in the config as JSON."""

    query_type: ClassVar[str] = "get_properties"

    def train(self, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Return what ``fit(parameters, config)`` gets."""
        return self._instructions("fitins", arrays, config)

    def evaluate(self, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Return what ``evaluate(parameters, config)`` gets."""
        return self._instructions("evaluateins", arrays, config)

    def query(self, config: ConfigRecord) -> RecordDict:
        """Return what ``get_properties(config)`` gets."""
        return RecordDict({"getpropertiesins.config": config})

    def read_train(self, content: RecordDict, names: list[str]) -> Reply:
        """Read what ``fit`` returned; its arrays have no names, so order and number must fit."""
        self._check_status(content, "fitres")
        record = _part(content.array_records, "fitres.parameters")
        arrays = [array for key, array in record.items() if key != "_empty"]
        if len(arrays) != len(names):
            raise ReplyError(f"{len(arrays)} arrays came back, expected {len(names)}")
        if any(key not in (str(i), "_empty") for i, key in enumerate(record)):
            raise ReplyError(f"arrays came as {clean(', '.join(record))}; expected 0, 1, 2, …")
        named = {name: _tensor(name, a) for name, a in zip(names, arrays, strict=True)}
        metrics, weight, notes = self._metrics(content, "fitres")
        return Reply(named, weight, metrics, record_bytes(record), notes)

    def read_evaluate(self, content: RecordDict) -> Reply:
        """Read what ``evaluate`` returned."""
        self._check_status(content, "evaluateres")
        loss = _part(content.metric_records, "evaluateres.loss").get("loss")
        metrics, weight, notes = self._metrics(content, "evaluateres", loss=loss)
        return Reply({}, weight, metrics, notes=notes)

    def count(self, message: Message) -> float:
        """Return ``num_examples``."""
        records = message.content.metric_records
        (counted,) = (record for key, record in records.items() if key.endswith(".num_examples"))
        return weight_of(counted, "num_examples")

    @staticmethod
    def _metrics(
        content: RecordDict, kind: str, **more: Any
    ) -> tuple[dict[str, float], float, tuple[str, ...]]:
        """Return the numbers of a reply; its count goes by Flower's own name, whatever they say."""
        found = {**_part(content.config_records, f"{kind}.metrics"), **more}
        counted = _part(content.metric_records, f"{kind}.num_examples")
        weight = weight_of(counted, "num_examples")
        metrics, _, notes = numbers({**found, "num_examples": weight}, "num_examples", SCALE_KEY)
        del metrics["num_examples"]
        metrics.setdefault("num-examples", weight)
        return metrics, weight, notes

    def read_query(self, content: RecordDict) -> dict[str, Any]:
        """Read what ``get_properties`` returned; nothing where it is not implemented."""
        return dict(content.config_records.get("getpropertiesres.properties", {}))

    @staticmethod
    def _instructions(kind: str, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        numbered = ArrayRecord({str(i): array for i, array in enumerate(arrays.values())})
        config = ConfigRecord({**config, NAMES_KEY: json.dumps(list(arrays))})
        return RecordDict({f"{kind}.parameters": numbered, f"{kind}.config": config})

    @staticmethod
    def _check_status(content: RecordDict, kind: str) -> None:
        status = content.config_records.get(f"{kind}.status")
        if status is None:
            raise ReplyError(
                f"the reply has no {kind!r} record; a Message API client needs "
                "client_api = 'message'"
            )
        if status.get("code") != 0:
            raise ReplyError(f"the client answered: {clean(str(status.get('message')))}")


def _all_metrics(content: RecordDict) -> dict[str, Any]:
    return {k: v for record in content.metric_records.values() for k, v in record.items()}


def _part(records: Mapping[str, Record], name: str) -> Record:
    if name not in records:
        raise ReplyError(f"the reply has no {name!r} record")
    return records[name]


def reply_error(message: Message) -> str | None:
    """Return why a message holds no content, or None if it does."""
    if not message.has_error():
        return None
    reason = message.error.reason or ""
    hint = ""
    if any(f"{kind}.parameters" in reason for kind in ("fitins", "evaluateins")):
        # Flower's own adapter of NumPyClients looks for what only they are sent.
        hint = "; the client is a NumPyClient: set client_api = 'numpy'"
    return f"error {message.error.code}: {clean(cause(reason))}{hint}"
