"""Time a run again, on another network, without training again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from strategies.wallclock.clock import RoundTime, Work
from strategies.wallclock.simulated import SimulatedClock

Record = Mapping[str, Any]


def retime(records: Iterable[Record], clock: SimulatedClock) -> list[RoundTime]:
    """Return how long the rounds of a run would have taken by another clock.

    Meant for runs whose choices did not depend on the clock: no planner, no deadline. Whoever
    the new clock calls late is in the result, but took part in the training as recorded.

    Parameters
    ----------
    records : Iterable[Record]
        Those of the run, as in its ``metrics.jsonl``: of kind "round" the ``round`` is used, of
        kind "client" ``round``, ``client``, ``rank``, ``bytes_up``, ``steps`` if the client
        reported them, and ``bytes_planned`` if it is there. A reply that could not be used has
        no ``bytes_up``; without ``bytes_planned`` it counts as large as the largest of its rank.
    clock : SimulatedClock
        A fresh one; a copy of it is used.

    Returns
    -------
    list of RoundTime
        One for each record of kind "round", in their order.

    Raises
    ------
    ValueError
        If a record lacks a field.
    """
    clock = copy.deepcopy(clock)
    rounds: list[int] = []
    clients: list[Record] = []
    for record in records:
        if record.get("kind") == "round":
            rounds.append(_field(record, "round"))
        elif record.get("kind") == "client":
            clients.append(record)
    largest: dict[int, int] = {}
    for record in clients:
        rank = _field(record, "rank")
        largest[rank] = max(largest.get(rank, 0), _field(record, "bytes_up"))
    plans: dict[int, list[Work]] = {}
    works: dict[int, list[Work]] = {}
    for record in clients:
        rank, sent = record["rank"], record["bytes_up"]
        planned = record.get("bytes_planned") or sent or largest[rank]
        plan = Work(_field(record, "client"), rank, planned)
        work = replace(plan, upload_bytes=sent or planned, steps=record.get("steps"))
        plans.setdefault(_field(record, "round"), []).append(plan)
        works.setdefault(record["round"], []).append(work)
    times = []
    for number in rounds:
        clock.forecast(plans.get(number, []), number)
        times.append(clock.finish(works.get(number, []), number))
    return times


def _field(record: Record, name: str) -> int:
    value = record.get(name)
    if not isinstance(value, int):
        raise ValueError(f"expected a whole number {name!r} in a record, got {dict(record)!r}")
    return value
