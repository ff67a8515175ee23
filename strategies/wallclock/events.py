"""What happens when on a simulated clock: clients that start, compute, upload and go away [D].

Whoever uploads shares the band equally with all who upload at the moment: the shares by which all
of a round finish together would have to know who comes when. With ``V(t)`` the integral of the
band over the number of uploads at a time, everyone is done when ``V`` has grown by the size of its
upload, whoever comes and goes meanwhile. So an event costs ``O(log n)``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """Something that the server hears of.

    Parameters
    ----------
    kind : "uploaded" or "gone"
    key : int
        Of the order.
    seconds : float
        Of the clock.
    computed : float
        When it had computed; inf if it never had.
    """

    kind: Literal["uploaded", "gone"]
    key: int
    seconds: float
    computed: float


class Events:
    """A queue of events in the order of the clock; of equal times, of their keys.

    Parameters
    ----------
    band : float
        What all uploads of a moment share, in units of an upload a second, > 0.
    """

    def __init__(self, band: float) -> None:
        self.band = band
        self.now = 0.0
        self._shared = 0.0  # V
        self._orders: dict[int, tuple[float, float, float]] = {}  # computed, upload, gone
        self._computing: list[tuple[float, int]] = []  # heaps; what is no more is skipped
        self._uploading: list[tuple[float, int]] = []
        self._going: list[tuple[float, int]] = []
        self._ends: dict[int, float] = {}  # V at which an upload is done

    def __len__(self) -> int:
        """Return how many orders are under way."""
        return len(self._orders)

    def start(self, key: int, compute: float, upload: float, gone: float = math.inf) -> None:
        """Have a client begin now.

        Parameters
        ----------
        key : int
            Not under way yet.
        compute : float
            Seconds until its upload begins.
        upload : float
            Its size.
        gone : float
            Second of the clock at which it goes away, and all it did is lost. (default: never)
        """
        if key in self._orders:
            raise ValueError(f"order {key} is under way already; every order has a key of its own")
        self._orders[key] = (self.now + compute, upload, gone)
        heapq.heappush(self._computing, (self.now + compute, key))
        if gone < math.inf:
            heapq.heappush(self._going, (gone, key))

    def drop(self, key: int) -> None:
        """Forget an order: its client stops."""
        self._orders.pop(key, None)
        self._ends.pop(key, None)

    def next(self, until: float = math.inf) -> Event | None:
        """Go to the next thing that the server hears of, and return it.

        None if nothing happens up to ``until``, where the clock then stands if it is finite.
        """
        while True:
            computed, ended, gone = self._heads()
            at = min(computed, ended, gone)
            if at > until or math.isinf(at):
                if math.isfinite(until):
                    self._go(max(until, self.now))
                return None
            self._go(at)
            if gone == at:
                key = heapq.heappop(self._going)[1]
                return self._told("gone", key)
            if ended == at:
                self._shared, key = heapq.heappop(self._uploading)
                return self._told("uploaded", key)
            key = heapq.heappop(self._computing)[1]
            self._ends[key] = self._shared + self._orders[key][1]
            heapq.heappush(self._uploading, (self._ends[key], key))

    def soonest(self, count: int) -> list[int]:
        """Return the keys that will be heard of first, about, in that order."""
        left = self.band / max(len(self._ends), 1)
        ends = ((self.now + (end - self._shared) / left, k) for k, end in self._ends.items())
        rest = (
            (computed + upload / left, key)
            for key, (computed, upload, _) in self._orders.items()
            if key not in self._ends
        )
        stay = ((at, key) for both in (ends, rest) for at, key in both if at < self._orders[key][2])
        return [key for _, key in heapq.nsmallest(count, stay)]

    def _heads(self) -> tuple[float, float, float]:
        """Return when the next computes to its end, uploads to its end, and goes away."""
        while self._computing and not self._computes(*self._computing[0]):
            heapq.heappop(self._computing)
        while self._uploading and self._ends.get(self._uploading[0][1]) != self._uploading[0][0]:
            heapq.heappop(self._uploading)
        while (
            self._going and self._orders.get(self._going[0][1], (0, 0, -1))[2] != self._going[0][0]
        ):
            heapq.heappop(self._going)
        ended = math.inf
        if self._uploading:
            ended = self.now + (self._uploading[0][0] - self._shared) * len(self._ends) / self.band
        computed = self._computing[0][0] if self._computing else math.inf
        return computed, max(ended, self.now), self._going[0][0] if self._going else math.inf

    def _computes(self, seconds: float, key: int) -> bool:
        return key not in self._ends and self._orders.get(key, (-1.0,))[0] == seconds

    def _goes(self, seconds: float, key: int) -> bool:
        return key in self._orders and self._orders[key][2] == seconds

    def _go(self, seconds: float) -> None:
        if self._ends:
            self._shared += (seconds - self.now) * self.band / len(self._ends)
        self.now = seconds

    def _told(self, kind: Literal["uploaded", "gone"], key: int) -> Event:
        computed = self._orders[key][0] if key in self._ends else math.inf
        self.drop(key)
        return Event(kind, key, self.now, computed)

    def state_dict(self) -> dict[str, Any]:
        """Return what is under way, as JSON can hold it."""
        return {
            "now": self.now,
            "shared": self._shared,
            "orders": [[key, *order, self._ends.get(key)] for key, order in self._orders.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.now, self._shared = state["now"], state["shared"]
        for key, computed, upload, gone, end in state["orders"]:
            self._orders[key] = (computed, upload, gone)
            if end is None:
                heapq.heappush(self._computing, (computed, key))
            else:
                self._ends[key] = end
                heapq.heappush(self._uploading, (end, key))
            if gone < math.inf:
                heapq.heappush(self._going, (gone, key))
