"""Rounds, rounds with a deadline, or none: what a run chooses with ``round.mode = "auto"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from logging import INFO

import numpy as np
from flwr.app import ArrayRecord
from flwr.common import log

from fedlora_app.config.build import Parts
from strategies import FedLoRA
from strategies.clients import Client
from strategies.records import Record
from strategies.round.waiting import Waiting, refuse_waiting
from strategies.sampling import FractionSampling, Outlook, PlannedSampling, Sampler


def settled(
    parts: Parts,
    strategy: FedLoRA,
    arrays: ArrayRecord,
    clients: int,
    tell: Callable[[Record], None] | None = None,
) -> Parts:
    """Return the parts of a run that waits in the way promised to end soonest.

    It is chosen before anybody was asked: as if all had as many rows, and the largest rank that the
    policy gives.

    Parameters
    ----------
    parts : Parts
        With a planned sampler.
    strategy : FedLoRA
        One made of them, on a simulated clock; not used any more.
    arrays : ArrayRecord
        The initial model.
    clients : int
        How many there are.
    tell : callable, optional
        Is told what was chosen.
    """
    rule, planned = parts.rule, parts.sampler
    if not isinstance(planned, PlannedSampling):
        raise TypeError(f"expected a planned sampler, got {type(planned).__name__}")
    packing = strategy.models.packed(arrays, 1)
    full, rank = packing.model.adapter.rank, max(1, parts.policy.max_rank)
    outlook = Outlook(
        1,
        [Client(index, index) for index in range(clients)],
        np.full(clients, 1 / clients),
        [rank] * clients,
        strategy.participation.clock,
        packing.cost(np.random.default_rng(parts.config.seed), upload_only=True),
        sketches=rule.sketches and full > 0,
        full_rank=max(full, rank),
        sketches_cost=rule.sketch_adds_variance,
    )
    counts = parts.waiting.staleness
    late = Waiting(mode="buffered", staleness="auto" if counts == "drop" else counts)
    private = parts.privacy is not None
    refused = refuse_waiting(late, rule, FractionSampling(), private=private)
    chosen = planned.ways(
        outlook,
        staleness=-np.log2(late.discount(1)),
        buffers=[] if refused or counts == "drop" else None,
        largest=True,
    )
    log(INFO, "round.mode = 'auto' for %s clients: %s", clients, chosen.summary())
    sampler: Sampler = planned
    waiting = parts.waiting
    if chosen.way == "deadline":
        waiting = Waiting(deadline=chosen.deadline, staleness="drop")
    elif chosen.buffered is not None:
        sampler = FractionSampling(clients=chosen.buffered.busy)
        waiting = replace(late, buffer=chosen.buffered.buffer, busy=chosen.buffered.busy)
    if tell is not None:
        buffered = waiting.mode == "buffered"
        tell({
            "kind": "way", "round": 0, "way": chosen.way, "deadline": chosen.deadline,
            "buffer": waiting.buffer if buffered else 0, "busy": waiting.busy if buffered else 0,
            "alternatives": chosen.alternatives,
        })  # fmt: skip
    return replace(parts, sampler=sampler, waiting=waiting)
