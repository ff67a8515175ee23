"""The clock of a run: how long each round took, for whom, and who was the bottleneck."""

from __future__ import annotations

import itertools
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from strategies.wallclock.availability import Always, Availability
from strategies.wallclock.objective import ClientProfiles
from strategies.wallclock.transfers import Estimate


@dataclass(frozen=True)
class Work:
    """What one participant does in a round.

    What clients report is not trusted: steps and seconds that are no number from 0 to 1e9 count as
    not reported.

    Parameters
    ----------
    client : int
        Its index.
    rank : int
        The rank it trains; 0 where only the head is trained.
    upload_bytes : int
        Size of its upload: as planned before the round, the real one after it.
    steps : float, optional
        Local optimiser steps; None: as many as it did last time, or the clock's default.
    train_seconds : float, optional
        What the client reported it took to train; None before the round.
    elapsed_seconds : float, optional
        From sending its message to the arrival of the reply; None before the round.
    answered : bool
        Whether a good reply came. (default: True)
    held_seconds : float, optional
        What the client reported it took from having the message to having the reply, training
        and all around it; None before the round, or where it did not say.
    node : int, optional
        Its node id.
    """

    client: int
    rank: int
    upload_bytes: int
    steps: float | None = None
    train_seconds: float | None = None
    elapsed_seconds: float | None = None
    answered: bool = True
    held_seconds: float | None = None
    node: int | None = None


@dataclass(frozen=True)
class RoundTime:
    """How long a round takes.

    Parameters
    ----------
    seconds : float
    bottleneck : int, optional
        Index of the client without whom the round would be over soonest; None if nobody took part.
    compute_seconds, upload_seconds : Mapping[int, float]
        By client index. Who is late has no upload seconds: its upload is cut off.
    late : frozenset of int
        Whose reply does not come in time: who misses the deadline, or goes away before it is done.
    fixed_seconds : float, optional
        What every reply takes beside both, whatever its size; None where that is not looked at.
    fixed_between : tuple of float
        Ends of its 90 % interval.
    mb_seconds : Mapping[int, Estimate]
        Seconds of each megabyte of upload by client index, as far as they were measured.
    queued : bool
        Whether ``upload_seconds`` are seconds of waiting for a turn, since there is no network.
        (default: False)
    expected : float, optional
        What a measured round was expected to take before it.
    gone : Mapping[int, float]
        Who of these goes away, and how many seconds after the round began.
    """

    seconds: float
    bottleneck: int | None = None
    compute_seconds: Mapping[int, float] = field(default_factory=dict)
    upload_seconds: Mapping[int, float] = field(default_factory=dict)
    late: frozenset[int] = frozenset()
    fixed_seconds: float | None = None
    fixed_between: tuple[float, float] = (0.0, 0.0)
    mb_seconds: Mapping[int, Estimate] = field(default_factory=dict)
    queued: bool = False
    expected: float | None = None
    gone: Mapping[int, float] = field(default_factory=dict)


class Clock(ABC):
    """Say how long rounds take, and what the planner may know of the clients.

    In every round ``forecast`` is called first, then ``finish``, both with the same clients. The
    replies of those that the forecast calls late are not to be used.
    """

    name: ClassVar[str] = ""
    #: Seconds after which a round ends without those still busy; 0: it waits for everybody.
    deadline: float = 0.0
    #: Seconds of a round in which nobody takes part.
    idle_seconds: float = 0.0
    #: Who is there when, by the seconds of this clock.
    availability: Availability = Always()
    #: Seconds of the clock that went by before the round at hand; set by who runs the rounds.
    now: float = 0.0

    def begin(
        self, works: Sequence[Work], server_round: int, *, network: bool, empty: Sequence[float]
    ) -> RoundTime:
        """Return the forecast of a round that is about to be run.

        Parameters
        ----------
        works, server_round
            As in ``forecast``.
        network : bool
            Whether there is one between the server and its clients.
        empty : Sequence[float]
            How long answers without content took, in seconds.
        """
        return self.forecast(works, server_round)

    @abstractmethod
    def forecast(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of a round before it is run, as far as it is known: who will be late.

        Parameters
        ----------
        works : Sequence[Work]
            What is planned, one entry a client.
        server_round : int
            From 1.
        """

    @abstractmethod
    def finish(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of a round that is over, and learn from it.

        Parameters
        ----------
        works : Sequence[Work]
            What was done, by everyone who was asked, late ones included. Whoever the forecast
            of this round called late, stays late.
        server_round : int
        """

    def learn(self, works: Sequence[Work], server_round: int) -> None:  # noqa: B027
        """Learn from work that took longer than its round, whose time it is no part of."""

    @abstractmethod
    def profiles(
        self,
        clients: Sequence[int],
        weights: Sequence[float],
        ranks: Sequence[Sequence[int]],
        upload_bytes: tuple[float, float],
        full_rank: int,
        server_round: int,
    ) -> ClientProfiles:
        """Return what the planner must know, from fresh estimates.

        Parameters
        ----------
        clients : Sequence[int]
            Client indices; ``weights`` (sum 1) and ``ranks`` (those each may train) go with them.
        upload_bytes : tuple of float
            An upload at rank ``k`` has ``fixed + per_rank · k`` bytes.
        full_rank : int
            Rank of the global adapter.
        server_round : int
            The round that is about to start.
        """

    def ends(self) -> tuple[Clock, Clock] | None:
        """Return this clock at both ends of what it is not sure of, the shorter times first.

        Of use for their ``profiles`` alone; None (default) where there is nothing it doubts.
        """
        return None

    def close(self) -> None:  # noqa: B027
        """Let go of whatever was set for the rounds, when a run is over."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the clock has learned, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Put back what ``state_dict`` returned."""

    def summary(self) -> str:
        """Return the clock and its settings in one line."""
        return self.name


# Nobody makes so many steps in a round, or trains for so many seconds: it is thirty years.
_MOST = 1e9


def reported(value: object) -> float | None:
    """Return a number that a client reported, or None if it is none from 0 to what can be."""
    if not isinstance(value, numbers.Real) or value < 0 or not value <= _MOST:  # NaN is neither
        return None
    return float(value)


def by_client(works: Sequence[Work]) -> list[Work]:
    """Return the works by client index, so that their order changes no bit of the result.

    Raises
    ------
    ValueError
        If a client is named twice, or a rank or size is negative.
    """
    ordered = sorted(works, key=lambda work: work.client)
    for before, work in itertools.pairwise(ordered):
        if before.client == work.client:
            raise ValueError(f"expected one work a client, got two of client {work.client}")
    for work in ordered:
        if work.client < 0 or work.rank < 0 or work.upload_bytes < 0:
            raise ValueError(f"client, rank and upload_bytes must be ≥ 0, got {work}")
    return ordered
