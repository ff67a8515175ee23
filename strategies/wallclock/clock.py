"""The clock of a run: how long each round took, for whom, and who was the bottleneck."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from strategies.wallclock.objective import ClientProfiles


@dataclass(frozen=True)
class Work:
    """What one participant does in a round.

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
    """

    client: int
    rank: int
    upload_bytes: int
    steps: float | None = None
    train_seconds: float | None = None
    elapsed_seconds: float | None = None
    answered: bool = True


@dataclass(frozen=True)
class RoundTime:
    """How long a round takes.

    Parameters
    ----------
    seconds : float
    bottleneck : int, optional
        Index of the client without whom the round would be over soonest; None if nobody took part.
    compute_seconds, upload_seconds : Mapping[int, float]
        By client index.
    late : frozenset of int
        Who misses the deadline.
    """

    seconds: float
    bottleneck: int | None = None
    compute_seconds: Mapping[int, float] = field(default_factory=dict)
    upload_seconds: Mapping[int, float] = field(default_factory=dict)
    late: frozenset[int] = frozenset()


class Clock(ABC):
    """Say how long rounds take, and what the planner may know of the clients."""

    name: ClassVar[str] = ""

    @abstractmethod
    def forecast(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of a round before it is run, as far as it is known: who will be late."""

    @abstractmethod
    def finish(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of a round that is over, and learn from it."""

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

    def state_dict(self) -> dict[str, Any]:
        """Return what the clock has learned, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Put back what ``state_dict`` returned."""

    def summary(self) -> str:
        """Return the clock and its settings in one line."""
        return self.name
