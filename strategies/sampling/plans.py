"""What a plan was made for, and how it is told and saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from strategies.clients import Client
from strategies.records import PlanRecord
from strategies.sampling.base import Array, Outlook
from strategies.sampling.refining import Refining
from strategies.wallclock.objective import ClientProfiles
from strategies.wallclock.planner import Plan, expected_seconds


@dataclass(frozen=True)
class Basis:
    """What a plan was made for."""

    server_round: int
    clients: list[int]
    ranks: list[int]
    weights: list[float]

    @classmethod
    def of(cls, outlook: Outlook) -> Basis:
        """Return what a plan would be made for now."""
        return cls(
            outlook.server_round,
            [client.index for client in outlook.clients],
            [int(rank) for rank in outlook.ranks],
            [float(a) for a in outlook.weights],
        )


@dataclass(frozen=True)
class Draw:
    """What the draw of a round is judged by: data weights, probabilities, variance factors."""

    clients: list[int]
    a: Array
    q: Array
    phi: Array

    @classmethod
    def of(cls, outlook: Outlook, q: Mapping[int, float], phi: Array) -> Draw:
        """Return that of a round, with probabilities by index and a factor for each client."""
        clients = [client.index for client in outlook.clients]
        there = outlook.clock.availability.share(clients)
        return cls(clients, outlook.weights, np.array([q[i] for i in clients]) * there, phi)

    def tell(self, book: Refining, server_round: int, chosen: Sequence[Client]) -> None:
        """Tell the book who joined."""
        joined = np.isin(self.clients, [client.index for client in chosen])
        book.learn_draw(server_round, self.a, self.q, self.phi, joined)


def seconds_between(
    outlook: Outlook, made: Plan, profiles: Callable[[Outlook], ClientProfiles], idle_seconds: float
) -> list[float] | None:
    """Return between what the seconds of a planned round lie; None where the clock is sure.

    Parameters
    ----------
    outlook : Outlook
    made : Plan
    profiles : callable
        Returns what the planner is told of the clients.
    idle_seconds : float
    """
    ends = outlook.clock.ends()
    return ends and [
        expected_seconds(
            profiles(replace(outlook, clock=end)), made.q, made.k, idle_seconds=idle_seconds
        )
        for end in ends
    ]


def plan_record(
    basis: Basis,
    made: Plan | None,
    q: Mapping[int, float],
    k: Mapping[int, int],
    **told: Any,
) -> PlanRecord:
    """Return what is told of a plan, JSON-able.

    Parameters
    ----------
    basis : Basis
    made : Plan, optional
        None where there could be none.
    q, k : Mapping
        The probability, and where it is planned the rank, of each client by index.
    **told
        ``cause``, ``reason``, ``between``, ``alpha``, ``beta`` and ``planner_seconds``.
    """
    alternatives = {} if made is None else made.alternatives
    record: Any = {
        "kind": "plan",
        "round": basis.server_round,
        "cause": told["cause"],
        "feasible": made is not None,
        "reason": told["reason"],
        "alpha": told["alpha"],
        "beta": told["beta"],
        "round_seconds": None if made is None else made.round_seconds,
        "round_between": told["between"],
        "rounds": None if made is None else made.rounds,
        "total_seconds": None if made is None else made.total_seconds,
        "alternatives": {name: _finite(total) for name, total in alternatives.items()},
        "clients": [
            {"client": i, "q": q[i], "rank": k.get(i, rank)}
            for i, rank in zip(basis.clients, basis.ranks, strict=True)
        ],
        "planner_seconds": told["planner_seconds"],
    }
    found: PlanRecord = record
    return found


def plan_state(made: Plan | None) -> dict[str, Any] | None:
    """Return a plan as JSON can hold it."""
    if made is None:
        return None
    totals = {name: _finite(total) for name, total in made.alternatives.items()}
    return {**vars(made), "q": made.q.tolist(), "k": made.k.tolist(), "alternatives": totals}


def plan_of(state: Mapping[str, Any] | None) -> Plan | None:
    """Return the plan of a state."""
    if state is None:
        return None
    totals = {n: math.inf if t is None else t for n, t in state["alternatives"].items()}
    q, k = np.array(state["q"], np.float64), np.array(state["k"], np.int64)
    return Plan(**{**state, "q": q, "k": k, "alternatives": totals})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
