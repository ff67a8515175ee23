"""Numbers of thousands of clients, of which the usual one is asked for every reply."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping


class Counts:
    """One number a client, kept in order, so that nobody goes through all of them for one.

    Parameters
    ----------
    counts : Mapping[int, float]
        By client; finite numbers. (default: none)
    """

    def __init__(self, counts: Mapping[int, float] | None = None) -> None:
        self._by_client = dict(counts or {})
        self._in_order = sorted(self._by_client.values())

    def __len__(self) -> int:
        """Return how many clients have one."""
        return len(self._in_order)

    def set(self, client: int, count: float) -> None:
        """Take a client's number, in the place of the one it had."""
        old = self._by_client.get(client)
        if old is not None:
            del self._in_order[bisect_left(self._in_order, old)]
        self._by_client[client] = count
        insort(self._in_order, count)

    def median_of_others(self, client: int) -> float | None:
        """Return the median of what all others have; None if there are no others."""
        own = self._by_client.get(client)
        left = len(self) - (own is not None)
        if not left:
            return None
        place = len(self) if own is None else bisect_left(self._in_order, own)

        def at(i: int) -> float:  # as if one's own were not there
            return self._in_order[i if i < place else i + 1]

        return (at((left - 1) // 2) + at(left // 2)) / 2
