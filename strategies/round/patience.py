"""How long it is reasonable to wait for a reply, from what was seen [D].

All numbers here are this project's decision.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flwr.app import Message

from strategies.transport import WINDOW, Until
from strategies.wallclock.clock import RoundTime

#: A deadline of its own accord is so many times what the slowest is expected to need.
MARGIN = 2.0
#: Whoever is silent for so many times that long, and so many seconds at least, is taken for dead.
DEAD, DEAD_SECONDS = 10.0, 60.0
#: After so many deadlines missed, one after the other, a client is no longer expected.
MISSES = 5


class Reasonable(Until):
    """Waits for all, but no longer than is reasonable by those who have answered."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0
        self._seen: list[float] = []

    def sent(self, message_id: str, message: Message) -> None:
        """Count a message."""
        self._asked += 1

    def arrived(self, message: Message, seconds: float | None) -> None:
        """Learn how long a reply took, if that is known."""
        self._seen += [] if seconds is None else [seconds]

    def left(self, waited: float) -> float:
        """Return for how many more seconds it is reasonable to wait, after so many."""
        return Patience().limit(self._seen, min(self._asked, WINDOW), auto=False) - waited


class Patience:
    """Learns how long the clients of a round are expected to need.

    A client that missed a deadline is expected to need at least as long as it was waited for, so
    that the next one is later, until it has answered or missed five, one after the other.
    """

    def __init__(self) -> None:
        self._missed: dict[int, tuple[int, float]] = {}  # times in a row, seconds waited
        self._expected = math.nan

    def expect(self, time: RoundTime, clients: Collection[int]) -> None:
        """Take what the clock expects of a round's clients, by index; NaN seconds: nothing yet."""
        needed = [
            max(self._needed(time, i), self._missed.get(i, (0, 0.0))[1])
            for i in clients
            if self._missed.get(i, (0, 0.0))[0] < MISSES
        ]
        known = [seconds for seconds in needed if not math.isnan(seconds)]
        self._expected = max(known) if known and len(known) == len(needed) else math.nan

    def limit(self, seen: Iterable[float], asked: int, *, auto: bool) -> float:
        """Return after how many seconds a round has waited long enough; inf: nobody knows yet.

        Parameters
        ----------
        seen : iterable of float
            Seconds in which clients of this round have answered.
        asked : int
            How many were asked; what is seen tells once half of them have answered.
        auto : bool
            Whether a deadline is wanted, or the end of reason alone.
        """
        if auto and not math.isnan(self._expected):
            return MARGIN * self._expected
        seen = list(seen)
        usual = max(seen, default=math.nan) if 2 * len(seen) >= asked else math.nan
        known = [seconds for seconds in (usual, self._expected) if not math.isnan(seconds)]
        return max(DEAD_SECONDS, DEAD * max(known)) if known else math.inf

    def answered(self, client: int) -> None:
        """Note that a client has answered, be it late."""
        self._missed.pop(client, None)

    def missed(self, client: int, seconds: float) -> None:
        """Note that a client was waited for in vain for so many seconds."""
        times = self._missed.get(client, (0, 0.0))[0]
        self._missed[client] = times + 1, seconds

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, as JSON can hold it."""
        return {"missed": {str(i): list(found) for i, found in self._missed.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned; nothing is known to an older checkpoint."""
        found = state.get("missed", {}).items()
        self._missed = {int(i): (int(times), float(s)) for i, (times, s) in found}

    @staticmethod
    def _needed(time: RoundTime, client: int) -> float:
        if client not in time.compute_seconds:
            return math.nan
        return time.compute_seconds[client] + time.upload_seconds.get(client, 0.0)
