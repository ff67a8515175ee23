"""What happened in one round: the records behind logs, metrics files and plots."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strategies.clients import Client
from strategies.messages import Reply
from strategies.packing import Parcel


@dataclass
class Assignment:
    """What one client was given to do in a round."""

    client: Client
    parcel: Parcel

    @property
    def rank(self) -> int:
        """The rank it trains; 0 where only the head is trained."""
        return self.parcel.rank

    @property
    def bytes_down(self) -> int:
        """Bytes of the arrays it was sent."""
        return self.parcel.nbytes


@dataclass
class Round:
    """The book of one round, filled in as it goes."""

    number: int
    total_clients: int = 0
    assignments: dict[int, Assignment] = field(default_factory=dict)
    accepted: int = 0
    rejected: int = 0
    bytes_up: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    train_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    evaluation: dict[str, float] = field(default_factory=dict)
    clients_evaluation: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def bytes_down(self) -> int:
        """Bytes of the arrays sent to all clients for training."""
        return sum(a.bytes_down for a in self.assignments.values())

    @property
    def loss(self) -> float | None:
        """The clients' weighted mean training loss, if they reported one."""
        return self.loss_sum / self.weight_sum if self.weight_sum else None

    def record(self) -> dict[str, Any]:
        """Return the round as one JSON-able record."""
        ranks = [a.rank for a in self.assignments.values()]
        return {
            "kind": "round",
            "round": self.number,
            "clients": len(ranks),
            "clients_total": self.total_clients,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "ranks": ranks,
            "train_loss": self.loss,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "train_seconds": round(self.train_seconds, 3),
            "aggregate_seconds": round(self.aggregate_seconds, 4),
            "seconds": round(time.perf_counter() - self.started, 3),
            **{f"server_{k}": v for k, v in self.evaluation.items()},
            **{f"clients_{k}": v for k, v in self.clients_evaluation.items()},
        }

    def line(self, num_rounds: int, seconds_left: float) -> str:
        """Return the round as the one line of the log."""
        ranks = sorted({a.rank for a in self.assignments.values() if a.rank})
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else "-"
        width = len(str(num_rounds))
        parts = [
            f"round {self.number:>{width}}/{num_rounds}",
            f"{self.accepted}/{len(self.assignments)} clients, ranks {span}",
            f"loss {self.loss:.3f}" if self.loss is not None else "loss -",
            _scores(self.evaluation),
            f"MB {self.bytes_down / 1e6:.2f} down {self.bytes_up / 1e6:.2f} up",
            f"train {self.train_seconds:.1f} s agg {self.aggregate_seconds:.2f} s",
            f"left {duration(seconds_left)}",
        ]
        return " | ".join(part for part in parts if part)


def spread(replies: Sequence[Reply]) -> dict[str, float]:
    """Return mean (weighted), worst and standard deviation over clients."""
    out: dict[str, float] = {}
    for key, worst in (("loss", max), ("accuracy", min)):
        values = [(r.metrics[key], r.weight) for r in replies if key in r.metrics]
        if values:
            xs, weights = np.array(values, dtype=float).T
            out[key] = float(np.average(xs, weights=weights))
            out[f"{key}_worst"] = float(worst(xs))
            out[f"{key}_spread"] = float(xs.std())
    return out


def _scores(metrics: Mapping[str, float]) -> str:
    """Return the server-side scores, the usual ones first and short."""
    short = (
        {"accuracy": "acc", "macro_f1": "F1"} if "accuracy" in metrics else {"loss": "test loss"}
    )
    shown = [f"{label} {metrics[key]:.3f}" for key, label in short.items() if key in metrics]
    return " ".join(shown)


def duration(seconds: float) -> str:
    """Return ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
