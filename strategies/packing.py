"""What goes into a message for one client, and what comes out of its reply."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from strategies.aggregation import Aggregator, Download
from strategies.clients import Client
from strategies.lora import WRAPPERS, Adapter, AdapterError, factor_of
from strategies.messages import (
    CLIENT_KEY,
    MERGES_KEY,
    QUALITY_KEY,
    RANK_KEY,
    ROUND_KEY,
    SCALE_KEY,
    SEND_KEY,
    TRAIN_KEY,
    Reply,
    record_bytes,
    to_record,
)
from strategies.model import GlobalModel
from strategies.wire import WIRE_KEY, decode, encode

NPY_HEADER = 128  # bytes that numpy's format puts before the values of an array


class Sent(NamedTuple):
    """What a client starts from: the adapter it is to train, and the arrays that travel."""

    download: Download
    record: ArrayRecord


@dataclass(frozen=True)
class Parcel:
    """What one client is sent.

    Parameters
    ----------
    rank : int
        The rank the client trains.
    scale : float
        The scale it is to train with.
    expected : list of str
        Names of the arrays that must come back, in their order.
    upload_bytes : int
        Bytes of those arrays on the wire.
    nbytes : int
        Bytes of the arrays that are sent.
    sent : callable
        Returns the content: the same object each time where clients of one rank share it, else
        made anew, so that the server need not hold one for every client of the round.
    """

    rank: int
    scale: float
    expected: list[str]
    upload_bytes: int
    nbytes: int
    sent: Callable[[], Sent]


class Packing:
    """Turn the global model into parcels and replies into adapters, as the rule says.

    Parameters
    ----------
    rule : Aggregator
        Says which factors are sent, trained and sent back.
    model : GlobalModel
        The model of the round.
    wire : str
        How numbers travel; declared to the client.
    server_round : int
    """

    def __init__(
        self, rule: Aggregator[Any], model: GlobalModel, wire: str, server_round: int
    ) -> None:
        self.rule = rule
        self.model = model
        self.wire = wire
        self.server_round = server_round
        # method "head": without LoRA modules no factor is trained or sent
        has_lora = bool(model.adapter.pairs)
        self.trained = rule.trained() if has_lora else ""
        self.uploaded = rule.uploaded() if has_lora else ""
        # The merges of all rounds are encoded once, whatever the number of clients.
        self._merged = ArrayRecord() if model.start.pairs else self._beside(model.merged)
        self._made: dict[tuple[str, int], Parcel] = {}
        self._names: list[str] = []  # of the arrays of the last parcel; others have the same

    def train(self, rank: int, rng: Callable[[], np.random.Generator]) -> Parcel:
        """Return what a client of ``rank`` trains; made once a rank where the rule allows.

        Parameters
        ----------
        rank : int
        rng : callable
            Returns the generator of this client and round, the same at every call.
        """
        if not self.rule.shares_downloads:
            make = partial(self._train, rank, rng)
            first = make()
            return self._parcel(first, partial(self._again, make, _sum(first.record)))
        key = "train", rank
        if key not in self._made:
            self._made[key] = self._shared(self._train(rank, rng))
        return self._made[key]

    def evaluate(self, rank: int) -> Parcel:
        """Return what a client of ``rank`` evaluates."""
        adapter = self.rule.view(self.model.adapter, rank)
        key = "evaluate", 0 if adapter is self.model.adapter else rank
        if key not in self._made:
            self._made[key] = self._shared(self._sent(Download(adapter)))
        return self._made[key]

    def cost(self, rng: np.random.Generator, *, upload_only: bool = False) -> tuple[float, float]:
        """Return the bytes a client moves in a round as ``(fixed, per_rank)``.

        Parameters
        ----------
        rng : numpy.random.Generator
            For rules that draw what they send.
        upload_only : bool (default: False)
            Count the way up alone.
        """
        high = max(2, self.model.adapter.rank if self.trained else 0)
        parcels = [self._shared(self._train(rank, lambda: rng)) for rank in (1, high)]
        one, most = (p.upload_bytes + (0 if upload_only else p.nbytes) for p in parcels)
        per_rank = (most - one) / (high - 1)
        return one - per_rank, per_rank

    def config(self, base: ConfigRecord, client: Client, parcel: Parcel, rank: int) -> ConfigRecord:
        """Return the settings that go with a parcel; the caller's record is not touched."""
        own: dict[str, int | float | str] = {
            ROUND_KEY: self.server_round,
            CLIENT_KEY: client.index,
            RANK_KEY: parcel.rank or rank,
            SCALE_KEY: parcel.scale,
            TRAIN_KEY: self.trained,
            SEND_KEY: self.uploaded,
            WIRE_KEY: self.wire,
            **({QUALITY_KEY: True} if self.rule.needs_quality else {}),
            **({MERGES_KEY: True} if self.rule.merges_base or self.model.start.pairs else {}),
        }
        return ConfigRecord({**base, **own})

    def read(self, reply: Reply, download: Download, *, any_rank: bool = False) -> Adapter:
        """Return the adapter of a reply, whole: a factor that stayed fixed is as it was sent.

        Raises
        ------
        ValueError
            With everything that does not match what was sent.
        """
        sent = download.adapter
        tensors = decode(reply.arrays, self.wire)
        for key, tensor in sent.to_state_dict().items():
            if self._travels(key, self.uploaded):
                continue
            if key in tensors:
                raise AdapterError(
                    [f"{key!r} came back, but only {self.uploaded or 'the head'} is asked for"],
                    "reply",
                )
            tensors[key] = tensor
        scales = {module: pair.scale for module, pair in sent.pairs.items()}
        scale: float | Mapping[str, float] = scales
        if len(set(scales.values())) <= 1:
            scale = _scale_told(sent)
        self._check_scale(reply, sent)
        adapter = Adapter.from_state_dict(tensors, scale, check_finite=False)
        problems = adapter.differences(sent, None if any_rank else sent.ranks)
        largest = self.model.adapter.ranks
        problems += [
            f"rank {r} for {m!r}, but the global rank is {largest[m]}"
            for m, r in adapter.ranks.items()
            if r > largest.get(m, r)
        ]
        if problems:
            said = _other_model(adapter, sent) + problems + adapter.non_finite()
            raise AdapterError(said, "reply")
        return adapter

    @staticmethod
    def _check_scale(reply: Reply, sent: Adapter) -> None:
        """Refuse a reply that was trained at another scale than the server said.

        It would count by a factor of the client's own choice.
        """
        own, told = reply.metrics.get(SCALE_KEY), _scale_told(sent)
        if own is not None and not math.isclose(own, told, rel_tol=1e-6):
            raise AdapterError(
                [
                    f"{SCALE_KEY} is {own:g}, but the server sets it, and said {told:g}: "
                    "apply_adapter and receive_parameters follow it; a client with an alpha of its "
                    f"own needs alpha = {told:g} · r, or for rsLoRA {told:g} · √r"
                ],
                "reply",
            )

    def _train(self, rank: int, rng: Callable[[], np.random.Generator]) -> Sent:
        return self._sent(self.rule.download(self.model.adapter, rank, rng()))

    def _again(self, make: Callable[[], Sent], expected: int) -> Sent:
        """Return what a client was sent, made once more."""
        sent = make()
        if _sum(sent.record) != expected:
            raise RuntimeError(
                f"{self.rule.name}: download gave something else when it was asked again for the "
                "same client and round, so that its reply cannot be read; draw from the generator "
                "it is given alone, or say shares_downloads = True"
            )
        return sent

    def _sent(self, download: Download) -> Sent:
        """Return a download as it arrives, and as it travels."""
        state = download.adapter.to_state_dict()
        down = {k: t for k, t in state.items() if self._travels(k, self.rule.downloaded())}
        encoded = encode(down, self.wire)
        record = to_record(encoded)
        frozen = self._merged
        if self.model.start.pairs:  # of each rank its own
            frozen = self._beside(self.model.frozen(download.adapter))
        if self.wire != "float32":  # what the client starts from is what arrives
            scales = {m: p.scale for m, p in download.adapter.pairs.items()}
            state |= decode(encoded, self.wire)
            adapter = Adapter.from_state_dict(state, scales, check_finite=False)
            download = Download(adapter, download.entries, download.fixed)
        if download.fixed is not None:  # for a rule whose server merges nothing
            frozen = ArrayRecord({**frozen, **self._beside(download.fixed)})
        return Sent(download, ArrayRecord({**record, **frozen}) if len(frozen) else record)

    def _beside(self, frozen: Adapter) -> ArrayRecord:
        """Return what a client is to merge into its frozen weights, as it travels."""
        return to_record(encode(GlobalModel(Adapter({}), frozen).to_tensors(), self.wire))

    def _shared(self, sent: Sent) -> Parcel:
        """Return a parcel that keeps its content."""
        return self._parcel(sent, lambda: sent)

    def _parcel(self, sent: Sent, make: Callable[[], Sent]) -> Parcel:
        adapter = sent.download.adapter
        state = adapter.to_state_dict()
        wired = encode(
            {k: t for k, t in state.items() if self._travels(k, self.uploaded)}, self.wire
        )
        if list(wired) != self._names:
            self._names = list(wired)
        size = sum(NPY_HEADER + t.numel() * t.element_size() for t in wired.values())
        nbytes = record_bytes(sent.record)
        return Parcel(adapter.rank, _scale_told(adapter), self._names, size, nbytes, make)

    @staticmethod
    def _travels(key: str, factors: str) -> bool:
        factor = factor_of(key)
        return factor is None or factor in factors


def _scale_told(sent: Adapter) -> float:
    """Return the scale that a client is told to train at."""
    return next((pair.scale for pair in sent.pairs.values()), 1.0)


def _other_model(adapter: Adapter, sent: Adapter) -> list[str]:
    """Return in which way the client's model is another than the server's, if it is."""
    unknown = [k for k in (*adapter.pairs, *adapter.dense) if k not in {**sent.pairs, **sent.dense}]
    if not unknown:
        return []
    for wrapper, said in WRAPPERS.items():
        plain = [".".join(part for part in key.split(".") if part != wrapper) for key in unknown]
        if all(key in sent.pairs or key in sent.dense for key in plain):
            return [f"the client's model is wrapped by {said}: let it pass the unwrapped model"]
    return [
        "the client trains another model than the server has (same base, target_modules, "
        "modules_to_save, bias; in PEFT's spelling)"
    ]


def _sum(record: ArrayRecord) -> int:
    """Return a checksum of the arrays of a record."""
    total = 0
    for array in record.values():
        total = zlib.crc32(array.data, total)
    return total
