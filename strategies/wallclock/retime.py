"""Time a run again, on another network, without training again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from strategies.records import ClientRecord, Record
from strategies.wallclock.clock import RoundTime, Work
from strategies.wallclock.simulated import SimulatedClock


def retime(records: Iterable[Mapping[str, Any]], clock: SimulatedClock) -> list[RoundTime]:
    """Return how long the rounds of a run would have taken by another clock.

    Meant for runs whose choices did not depend on the clock: no planner, no deadline. Whoever
    the new clock calls late is in the result, but took part in the training as recorded.

    Parameters
    ----------
    records : Iterable[Mapping]
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
    clients: list[ClientRecord] = []
    for record in cast(list[Record], [r for r in records if "kind" in r]):
        if record["kind"] == "round":
            _check_whole(record, "round")
            rounds.append(record["round"])
        elif record["kind"] == "client":
            _check_whole(record, "round", "client", "rank", "bytes_up")
            clients.append(record)
    largest: dict[int, int] = {}
    for client in clients:
        largest[client["rank"]] = max(largest.get(client["rank"], 0), client["bytes_up"])
    plans: dict[int, list[Work]] = {}
    works: dict[int, list[Work]] = {}
    for client in clients:
        rank, sent = client["rank"], client["bytes_up"]
        planned = client.get("bytes_planned") or sent or largest[rank]
        plan = Work(client["client"], rank, planned)
        work = replace(plan, upload_bytes=sent or planned, steps=client.get("steps"))
        plans.setdefault(client["round"], []).append(plan)
        works.setdefault(client["round"], []).append(work)
    times = []
    for number in rounds:
        clock.forecast(plans.get(number, []), number)
        times.append(clock.finish(works.get(number, []), number))
        clock.now += times[-1].seconds
    return times


def _check_whole(record: Record, *names: str) -> None:
    for name in names:
        if not isinstance(record.get(name), int):
            raise ValueError(f"expected a whole number {name!r} in a record, got {dict(record)!r}")
