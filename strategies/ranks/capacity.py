"""``CapacityRank``: as much rank as a node can train, by what it measures of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from strategies.capacity import (
    CAPACITY_KEY,
    ECHO_KEY,
    Capacity,
    RankCost,
    checked_capacity,
    largest_rank,
)
from strategies.clients import Client
from strategies.listing import listed
from strategies.ranks.base import Explanation, RankPolicy, Settings, at_least_one
from strategies.trained import Trained

#: Bytes that go to a node and come back, so that the server can time its link.
ECHO_BYTES = 262_144


class CapacityRank(RankPolicy):
    """The largest rank a node can train within memory and time, or another policy capped by it.

    A node measures once, when it appears: its free memory (host and accelerator), with the model
    loaded, and the seconds of a training step. The server times 256 KiB to it and back. With
    what a rank costs, counted on the model, follows the largest rank that fits
    (``strategies.capacity.largest_rank``), between ``min_rank`` and ``max_rank``. Nothing needs to
    be typed by hand; a ``max-rank`` in the node config **takes the place** of what is measured. A
    node that does not answer, or answers nonsense, gets ``fallback``; one that cannot train even
    ``min_rank`` by its own numbers gets that. Published nowhere [D].

    The link's time includes what Flower takes to hand on a message, and in a simulation the wait
    for a core, so what is measured is a lower bound of its speed: it matters under ``seconds``.

    Parameters
    ----------
    max_rank : int, optional
        Default: that of ``within``, or 32.
    within : RankPolicy, optional
        Chooses the ranks, knowing each node's limit, so that a budget is divided among those who
        can use it; so does a sampler that plans. (default: everyone has its limit)
    min_rank : int (default: 1)
    fallback : int, optional
        Limit of a node that was not measured (default: ``min_rank``).
    memory_share : float (default: 0.5)
        Of the free memory that training may take, in (0, 1].
    seconds : float (default: 0.0)
        What a round of a client may take, training and link; 0: any.
    cost : RankCost, optional
        Counted on the model by the app; in code give it, or set ``policy.cost`` before the run.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "capacity"
    profiles = True
    profiles_everyone = True
    asks_identity = True
    counts_bytes = True

    def __init__(
        self,
        max_rank: int | None = None,
        *,
        within: RankPolicy | None = None,
        min_rank: int = 1,
        fallback: int | None = None,
        memory_share: float = 0.5,
        seconds: float = 0.0,
        cost: RankCost | None = None,
    ) -> None:
        self._max_rank = max_rank or (32 if within is None else within.max_rank)
        self.min_rank = at_least_one("min_rank", min_rank)
        self.fallback = min_rank if fallback is None else at_least_one("fallback", fallback)
        if not max(min_rank, self.fallback) <= self._max_rank:
            raise ValueError(
                f"min_rank ({min_rank}) and fallback ({self.fallback}) must not exceed max_rank "
                f"({self._max_rank})"
            )
        if not 0 < memory_share <= 1:
            raise ValueError(f"memory_share: expected a number in (0, 1], got {memory_share!r}")
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds: expected 0 or more, got {seconds!r}")
        self.within, self.cost = within, cost
        self.memory_share, self.seconds = memory_share, seconds
        if within is not None:
            self.metrics = within.metrics
            self.needs_counts, self.reads_loss = within.needs_counts, within.reads_loss
        self._asked: set[int] = set()  # all by client index
        self._known: dict[int, Capacity] = {}
        self._moved = 0.0, 0.0
        self._caps: dict[int, int] = {}
        self._notes: list[str] = []

    @property
    def core(self) -> RankPolicy:
        """The policy that is capped, or this one."""
        return self if self.within is None else self.within.core

    @property
    def max_rank(self) -> int:
        """The largest rank a client can get."""
        return self._max_rank

    @property
    def judges(self) -> bool:
        """Whether the policy that is capped looks at whole adapters."""
        return self.within is not None and self.within.judges

    # ----- what nodes are asked, and answer ----------------------------------------------

    def to_profile(self, clients: Sequence[Client], server_round: int) -> list[Client]:
        """Return the clients that were never asked, by this policy or the one within."""
        wanted = {client.index for client in clients} - self._asked
        if self.within is not None:
            wanted |= {client.index for client in self.within.to_profile(clients, server_round)}
        return [client for client in clients if client.index in wanted]

    def profile_settings(self) -> Settings:
        """Return the request, with the text that is to come back."""
        asked = self.within.profile_settings() if self.within is not None else {}
        return {**asked, CAPACITY_KEY: True, ECHO_KEY: "x" * ECHO_BYTES}

    def learn(self, client: Client, answer: Mapping[str, Any] | None, server_round: int) -> None:
        """Keep what a node measured."""
        self._asked.add(client.index)
        try:
            if answer is not None:
                self._known[client.index] = checked_capacity(answer, "x" * ECHO_BYTES)
        finally:
            if self.within is not None and self.within.profiles:
                self.within.learn(client, answer, server_round)

    def learn_cost(self, fixed: float, per_rank: float) -> None:
        """Remember what a rank moves."""
        self._moved = fixed, per_rank
        if self.within is not None and self.within.counts_bytes:
            self.within.learn_cost(fixed, per_rank)

    def train_settings(self, client: Client, server_round: int) -> Settings:
        """Return what the policy within adds."""
        return {} if self.within is None else self.within.train_settings(client, server_round)

    def observe(self, trained: Trained) -> None:
        """Let the policy within look."""
        if self.within is not None:
            self.within.observe(trained)

    def serves(self, client: Client) -> bool:
        """Return whether the policy within has a rank for it."""
        return self.within is None or self.within.serves(client)

    def forget(self, index: int) -> None:
        """Forget what was measured: whoever has the place is asked."""
        self._asked.discard(index)
        self._known.pop(index, None)
        if self.within is not None:
            self.within.forget(index)

    # ----- the ranks ---------------------------------------------------------------------

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the limits, or the ranks within them.

        Raises
        ------
        ValueError
            If it was not said what a rank costs.
        """
        if self.cost is None:
            raise ValueError(
                "capacity: expected what a rank costs before the first round; give cost = "
                "RankCost(…), or set policy.cost"
            )
        cost = replace(self.cost, fixed_moved=self._moved[0], rank_moved=self._moved[1])
        self._caps, silent, weak = {}, [], []
        for client in clients:
            own = self._measured(client.index, cost)
            if client.max_rank is not None:  # the operator knows better
                limit = client.max_rank
            elif own is None:
                limit = self.fallback
                silent.append(client.name)
            else:
                limit = max(own, self.min_rank)
                if own < self.min_rank:
                    weak.append(client.name)
            self._caps[client.index] = min(limit, self.max_rank)
        self._notes = [
            f"{text}, so rank {rank} at most: {listed(names)}"
            for text, rank, names in (
                ("no usable measurement", self.fallback, silent),
                ("by their own numbers they can train no rank at all", self.min_rank, weak),
            )
            if names
        ]
        if self.within is None:
            return [self._caps[client.index] for client in clients]
        limited = [replace(client, max_rank=self._caps[client.index]) for client in clients]
        chosen = self.within.choose(limited, server_round)
        return [min(rank, c.max_rank or rank) for rank, c in zip(chosen, limited, strict=True)]

    def _measured(self, index: int, cost: RankCost) -> int | None:
        """Return the largest rank by what a node measured; None where it did not."""
        if index not in self._known:
            return None
        found = largest_rank(
            self._known[index], cost, memory_share=self.memory_share, seconds=self.seconds
        )
        return self.max_rank if found is None else min(found, self.max_rank)

    def explain(self) -> Explanation:
        """Return what each node measured, its limit, and what the policy within says."""
        inner = self.within.explain() if self.within is not None else Explanation()
        told: dict[int, dict[str, float | None]] = {}
        for index, limit in sorted(self._caps.items()):
            known = self._known.get(index)
            free = None
            if known is not None:
                device = known.device_free_bytes
                free = known.free_bytes if device is None else device
            told[index] = {
                **inner.clients.get(index, {}),
                "free-gb": None if free is None else free / 1e9,
                "step-seconds": known.step_seconds if known else None,
                "link-mb": known.link / 1e6 if known and known.link else None,
                "limit": float(limit),
            }
        return Explanation(told, inner.weights, [*inner.notes, *self._notes])

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, by client index, and the state of the policy within."""
        return {
            "asked": sorted(self._asked),
            "known": {
                str(i): [c.free_bytes, c.device_free_bytes, c.step_seconds, c.rank, c.link]
                for i, c in sorted(self._known.items())
            },
            "within": {} if self.within is None else self.within.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._asked = {int(i) for i in state["asked"]}
        self._known = {int(i): Capacity(*values) for i, values in state["known"].items()}
        if self.within is not None:
            self.within.load_state_dict(state["within"])

    def summary(self) -> str:
        """Return the settings in one line."""
        time = f", {self.seconds:g} s a round" if self.seconds else ""
        memory = f"{self.memory_share:.0%} of the free memory"
        own = f"{self.name} ({memory}{time}, up to {self.max_rank})"
        return own if self.within is None else f"{self.within.summary()}, within {own}"
