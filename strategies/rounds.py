"""What happened in one round: the records behind logs, metrics files and plots."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord

from strategies.clients import Client
from strategies.durations import duration
from strategies.messages import (
    HELD_SECONDS_KEY,
    SCALE_KEY,
    STEPS_KEY,
    TRAIN_SECONDS_KEY,
    Reply,
    training_loss,
)
from strategies.packing import Packing, Parcel
from strategies.records import ClientRecord, RoundRecord, RoundWarning
from strategies.scores import LOSS, Score, shown, undeclared
from strategies.wallclock.clock import RoundTime, Work

NO_SCORES = ("num-examples", SCALE_KEY)  # what replies say beside how good a model is
MOST_SCORES = 64  # of a round: clients choose the names, and what few of them have goes first


@dataclass
class Assignment:
    """What one client was given to do in a round, and what came of it, then or later."""

    client: Client
    parcel: Parcel
    #: Of the model it starts from; with the settings it makes the message, and reads the reply.
    packing: Packing | None = None
    settings: ConfigRecord | None = None
    #: The round it was asked in.
    asked: int = 0
    #: How much it counts, where coins decide who joins.
    weight: float | None = None
    #: Its place among all orders of the run, from 1.
    number: int = 0
    #: Whether a record of it was told already, which has its bytes down.
    told: bool = False
    #: Under which its message is on its way; empty: another loop's.
    message_id: str = ""
    #: When it was sent, in seconds of ``time.perf_counter``.
    sent_at: float = field(default_factory=time.perf_counter)
    #: When it began and ended by the clock of the run, where rounds do not wait.
    began: float | None = None
    ended: float | None = None
    computed_seconds: float = 0.0
    #: How many rounds older than the model is what it was trained from.
    staleness: int = 0
    status: str = "no answer"
    reported: Mapping[str, Any] = field(default_factory=dict)
    bytes_up: int = 0
    elapsed_seconds: float | None = None

    @property
    def rank(self) -> int:
        """The rank it trains; 0 where only the head is trained."""
        return self.parcel.rank

    @property
    def bytes_down(self) -> int:
        """Bytes of the arrays it was sent."""
        return self.parcel.nbytes

    def work(self) -> Work:
        """Return what the clock must know of it, as far as it is known."""
        steps, seconds = (self.reported.get(key) for key in (STEPS_KEY, TRAIN_SECONDS_KEY))
        return Work(
            self.client.index,
            self.rank,
            self.bytes_up or self.parcel.upload_bytes,
            steps=steps,
            train_seconds=seconds,
            elapsed_seconds=self.elapsed_seconds,
            answered=self.status == "ok",
            held_seconds=self.reported.get(HELD_SECONDS_KEY),
            node=self.client.node_id,
        )

    def record(self, server_round: int, time: RoundTime) -> ClientRecord:
        """Return it as one JSON-able record; no metric of the client can hide our fields."""
        i = self.client.index
        own: ClientRecord = {
            "kind": "client",
            "round": server_round,
            "client": i,
            "node": str(self.client.node_id),
            "status": self.status,
            "rank": self.rank,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "bytes_planned": self.parcel.upload_bytes,
            "compute_seconds": _rounded(time.compute_seconds.get(i)),
            "upload_seconds": None if time.queued else _rounded(time.upload_seconds.get(i)),
        }
        if time.queued:
            own["queue_seconds"] = _rounded(time.upload_seconds.get(i))
        elif i in time.compute_seconds and time.fixed_seconds is not None:
            own["fixed_seconds"] = _rounded(time.fixed_seconds)
        if (rate := time.mb_seconds.get(i)) is not None:
            own["mb_seconds"] = _rounded(rate.value)
            own["mb_seconds_low"], own["mb_seconds_high"] = _rounded(rate.low), _rounded(rate.high)
        if self.began is not None:  # rounds overlap
            own["asked"], own["staleness"] = self.asked, self.staleness
            own["began"], own["ended"] = _rounded(self.began), _rounded(self.ended)
        if self.told:
            own["bytes_down"] = 0
        self.told = True
        return cast(ClientRecord, {**self.reported, **own})


@dataclass
class Round:
    """The book of one round, filled in as it goes."""

    number: int
    total_clients: int = 0
    assignments: dict[int, Assignment] = field(default_factory=dict)
    accepted: int = 0
    #: Names of those whose updates were taken, in that order.
    taken: list[str] = field(default_factory=list)
    rejected: int = 0
    late: int = 0
    #: Of the late ones, those of whom nobody knows whether they are at it.
    unheard: int = 0
    #: Of those accepted, how many were trained from an older model.
    stale: int = 0
    #: Orders of earlier rounds that were answered in this one.
    older: list[Assignment] = field(default_factory=list)
    last_reason: str = ""
    bytes_up: int = 0
    bytes_rejected: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    train_seconds: float = 0.0
    #: How long it took; None until it is over.
    seconds: float | None = None
    aggregate_seconds: float = 0.0
    evaluation: dict[str, float] = field(default_factory=dict)
    clients_evaluation: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    time: RoundTime | None = None
    clock_total: float = 0.0
    planned_seconds: float | None = None
    privacy: dict[str, float] = field(default_factory=dict)
    warnings: list[RoundWarning] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nobody was asked in it, and nobody of before has answered."""
        return not (self.assignments or self.older)

    @property
    def ranks_differ(self) -> bool:
        """Whether not all train the same rank."""
        return len({assignment.rank for assignment in self.assignments.values()}) > 1

    def works(self) -> list[Work]:
        """Return what the clock must know of everybody."""
        return [assignment.work() for assignment in self.assignments.values()]

    def answered(self) -> list[Assignment]:
        """Return those whose updates are in the aggregate."""
        return [a for a in self.assignments.values() if a.status == "ok"]

    def accept(self, assignment: Assignment, reply: Reply) -> None:
        """Note a good reply."""
        assignment.status, assignment.reported = "ok", reply.metrics
        assignment.bytes_up = reply.nbytes
        self.accepted += 1
        self.stale += assignment.staleness > 0
        self.taken.append(assignment.client.name)
        self.bytes_up += reply.nbytes
        loss = training_loss(reply.metrics)
        if loss is not None:
            self.loss_sum += reply.weight * loss
            self.weight_sum += reply.weight

    def reject(self, assignment: Assignment, reason: str, nbytes: int = 0) -> None:
        """Note a reply that cannot be used, with the bytes it had, or that there was none."""
        assignment.bytes_up = nbytes
        self.bytes_rejected += nbytes
        assignment.status, assignment.reported = "rejected", {"reason": reason}
        self.last_reason = f"{assignment.client.name}: {reason}"
        self.rejected += 1

    def miss(self, assignment: Assignment, reply: Reply) -> None:
        """Note a reply that came after the deadline."""
        assignment.status, assignment.reported = "late", reply.metrics
        assignment.bytes_up = reply.nbytes
        self.late += 1
        self.bytes_up += reply.nbytes

    def wait_for(self, assignment: Assignment, *, alive: bool) -> None:
        """Note that a reply is not there yet, and will count when it comes."""
        assignment.status = "late"
        self.late += 1
        self.unheard += not alive

    @property
    def bytes_down(self) -> int:
        """Bytes of the arrays sent to all clients for training."""
        return sum(a.bytes_down for a in self.assignments.values())

    @property
    def loss(self) -> float | None:
        """The clients' weighted mean training loss, if they reported one."""
        return self.loss_sum / self.weight_sum if self.weight_sum else None

    def over(self) -> float:
        """Return how long it took; from the first time on, that is what it took."""
        if self.seconds is None:
            self.seconds = time.perf_counter() - self.started
        return self.seconds

    def record(self) -> RoundRecord:
        """Return the round as one JSON-able record."""
        ranks = [a.rank for a in self.assignments.values()]
        own: RoundRecord = {
            "kind": "round",
            "round": self.number,
            "clients": len(ranks),
            "clients_total": self.total_clients,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "late": self.late,
            "ranks": ranks,
            "train_loss": self.loss,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "bytes_rejected": self.bytes_rejected,
            "train_seconds": round(self.train_seconds, 3),
            "aggregate_seconds": round(self.aggregate_seconds, 4),
            "seconds": round(self.over(), 3),
            "clock_seconds": _rounded(self.time.seconds if self.time else 0.0),
            "clock_total": _rounded(self.clock_total),
            "bottleneck": self.time.bottleneck if self.time else None,
            "planned_seconds": _rounded(self.planned_seconds),
        }
        if self.time and self.time.fixed_seconds is not None and not self.time.queued:
            own["fixed_seconds"] = _rounded(self.time.fixed_seconds)
            own["expected_seconds"] = _rounded(self.time.expected)
            low, high = self.time.fixed_between
            own["fixed_seconds_low"], own["fixed_seconds_high"] = _rounded(low), _rounded(high)
        if self.stale:
            own["stale"] = self.stale
        if self.warnings:
            own["warnings"] = self.warnings
        scores = {f"server_{k}": v for k, v in self.evaluation.items()}
        scores |= {f"clients_{k}": v for k, v in self.clients_evaluation.items()}
        # Own once more: no metric of the clients can hide our fields.
        return cast(RoundRecord, {**own, **self.privacy, **scores, **own})

    def line(
        self,
        num_rounds: int,
        seconds_left: float,
        *,
        simulated: bool = False,
        scores: Sequence[Score] = (),
    ) -> str:
        """Return the round as the one line of the log; with the clock if that is simulated."""
        ranks = sorted({a.rank for a in self.assignments.values() if a.rank})
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else "-"
        width = len(str(num_rounds))
        parts = [
            f"round {self.number:>{width}}" + (f"/{num_rounds}" if num_rounds else ""),
            f"{self.accepted}/{len(self.assignments)} clients, ranks {span}",
            f"loss {self.loss:.3f}" if self.loss is not None else "loss -",
            shown(scores, self.evaluation) or _of_clients(scores, self.clients_evaluation),
            f"MB {self.bytes_down / 1e6:.2f} down {self.bytes_up / 1e6:.2f} up",
            f"train {self.train_seconds:.1f} s agg {self.aggregate_seconds:.2f} s",
            f"clock {self.clock_total:.1f} s" if simulated else "",
            _guarantees(self.privacy),
            "" if math.isnan(seconds_left) else f"left {duration(seconds_left)}",
        ]
        return " | ".join(part for part in parts if part)


def spread(replies: Sequence[Reply], scores: Sequence[Score] = ()) -> dict[str, float]:
    """Return mean (weighted), worst and standard deviation over clients of all they measured.

    A number that is not declared in ``scores`` is better when higher, but for the loss.
    """
    known = {score.name: score for score in (LOSS, *scores)}
    told = Counter(key for r in replies for key in r.metrics if key not in NO_SCORES)
    names = dict.fromkeys([*known, *(key for key, _ in told.most_common())])
    out: dict[str, float] = {}
    for key in list(names)[:MOST_SCORES]:
        values = [(r.metrics[key], r.weight) for r in replies if key in r.metrics]
        if values:
            xs, weights = np.array(values, dtype=float).T
            score = known.get(key) or undeclared(key)
            out[key] = float(np.average(xs, weights=weights))
            out[f"{key}_worst"] = float(score.worst(xs.tolist()))
            out[f"{key}_spread"] = float(xs.std())
    return out


@dataclass
class Degradation:
    """Sees when a run goes on as another experiment, since most clients fail.

    Parameters
    ----------
    least : float
        The share of the clients asked that must answer; 0: whatever they do.
    patience : int (default: 5)
        Rounds, one after the other, that may have fewer.
    """

    least: float
    patience: int = 5
    _rounds: int = field(default=0, init=False)

    @property
    def over(self) -> bool:
        """Whether it has gone on for too long."""
        return self._rounds >= self.patience

    def see(self, book: Round) -> str:
        """Look at a round that is over; return why the run must end, or nothing."""
        asked = len(book.assignments)
        if not asked:  # nobody's coin fell so
            return ""
        alive = book.accepted + book.late - book.unheard
        self._rounds = self._rounds + 1 if alive < self.least * asked else 0
        if not self.over:
            return ""
        return (
            f"in {self.patience} rounds, one after the other, less than {self.least:.0%} of the "
            f"clients asked sent a good reply; last reason: {book.last_reason}; see to the "
            "clients, then resume, or lower min_answering"
        )


def _of_clients(scores: Sequence[Score], metrics: Mapping[str, float]) -> str:
    """Return the clients' own scores, where the server has none."""
    return f"own data: {text}" if (text := shown(scores, metrics)) else ""


def _rounded(seconds: float | None) -> float | None:
    """Return seconds with as many digits as mean something, whatever their size."""
    return None if seconds is None else float(f"{seconds:.6g}")


def _guarantees(spent: Mapping[str, float]) -> str:
    """Return ε so far: against the server, and against those who see only the models."""
    return " ".join(
        f"ε {spent[key]:.2f} {key.removeprefix('epsilon_')}"
        for key in ("epsilon_local", "epsilon_central")
        if key in spent
    )
