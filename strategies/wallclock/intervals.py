"""Clients that are there at given times, as in a recorded trace [D]."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from strategies.wallclock.availability import Array, Availability, Presence

_COLUMNS = ("client", "start", "end")


class Intervals(Availability):
    """There at given times, as in a recorded trace; who is in none of them is always there.

    Parameters
    ----------
    times : Mapping[int, Sequence[tuple of float]]
        By client index, ``(start, end)`` in seconds of the clock, 0 ≤ start < end. Those that
        touch or overlap are one.
    repeat : float (default: 0)
        All begins again after so many seconds, at least the last end; 0: never, and who was
        there last is gone for good.

    Raises
    ------
    ValueError
        If a time is not as described.
    """

    name = "intervals"

    def __init__(
        self, times: Mapping[int, Sequence[tuple[float, float]]], *, repeat: float = 0.0
    ) -> None:
        ends = [end for spans in times.values() for _, end in spans]
        for client, spans in times.items():
            for start, end in spans:
                if not (0 <= start < end < math.inf):
                    raise ValueError(
                        f"expected 0 ≤ start < end, in seconds, got {start!r} and {end!r} for "
                        f"client {client}"
                    )
        if repeat and not (math.isfinite(repeat) and repeat >= max(ends, default=0.0)):
            raise ValueError(
                f"repeat must be 0 or at least the last end, {max(ends, default=0.0):g} s, got "
                f"{repeat!r}"
            )
        self.repeat = repeat
        self._whole = repeat or max(ends, default=1.0)
        self._times = {client: _joined(spans) for client, spans in times.items()}

    @classmethod
    def from_csv(cls, path: str | Path, **options: Any) -> Intervals:
        """Read intervals from a CSV file with the columns ``client``, ``start`` and ``end``.

        A line is one time that a client, by its index, is there, in seconds of the clock. Empty
        lines and lines that begin with ``#`` are skipped.

        Parameters
        ----------
        path : str or Path
            The file, UTF-8.
        **options
            ``repeat``.

        Raises
        ------
        ValueError
            If the file is not as described; the message names every line.
        OSError
            If it cannot be read.
        """
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
        rows = [
            (number, [cell.strip() for cell in next(csv.reader([line]))])
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        header = rows[0][1] if rows else []
        if sorted(header) != sorted(_COLUMNS):
            raise ValueError(
                f"{path}: expected a header of the columns {', '.join(_COLUMNS)}, got "
                f"{', '.join(header) or 'nothing'}"
            )
        times: dict[int, list[tuple[float, float]]] = {}
        problems = []
        for number, cells in rows[1:]:
            try:
                row = dict(zip(header, cells, strict=True))
                client, span = int(row["client"]), (float(row["start"]), float(row["end"]))
                if client < 0 or not 0 <= span[0] < span[1] < math.inf:
                    raise ValueError
            except ValueError:
                problems.append(
                    f"line {number}: expected a client and 0 ≤ start < end, got {cells}"
                )
            else:
                times.setdefault(client, []).append(span)
        if problems:
            raise ValueError(f"{path}: " + "; ".join(problems))
        return cls(times, **options)

    def look(self, clients: Sequence[int], seconds: float) -> Presence:
        """Return who is there at a second."""
        turn = math.floor(seconds / self.repeat) if self.repeat else 0
        if self.repeat and seconds < turn * self.repeat:  # by rounding
            turn -= 1
        base = turn * self.repeat
        seen = [self._look(int(client), seconds, base) for client in clients]
        return Presence(
            np.array([here for here, _ in seen], bool), np.array([end for _, end in seen], float)
        )

    def _look(self, client: int, seconds: float, base: float) -> tuple[bool, float]:
        if client not in self._times:
            return True, math.inf
        borders = self._times[client]
        # Borders in turn: comes, goes, comes. Those of the next turn may be met by this one's.
        places = [base + border for border in borders]
        if self.repeat:
            places += [base + self.repeat + border for border in borders]
        place = bisect_right(places, seconds)
        here = place % 2 == 1
        while place < len(places) - 1 and places[place] == places[place + 1]:
            place += 2
        return here, places[place] if place < len(places) else math.inf

    def share(self, clients: Sequence[int]) -> Array:
        """Return the share of a turn, or of the time up to the last end of all."""
        return np.array([self._lengths(c).sum() / self._whole for c in clients], float)

    def stays(self, clients: Sequence[int], seconds: ArrayLike) -> Array:
        """Return how likely clients are to stay for so many seconds."""
        lasting = np.broadcast_to(np.asarray(seconds, np.float64), (len(clients),))
        chances = np.ones(len(clients))
        for row, (client, wait) in enumerate(zip(clients, lasting, strict=True)):
            if client in self._times:
                lengths = self._lengths(client)
                total = lengths.sum()
                chances[row] = np.maximum(lengths - wait, 0).sum() / total if total else 0.0
        return chances

    def left(self, clients: Sequence[int], chances: ArrayLike) -> Array:
        """Return for how long clients stay at least, with a chance."""
        wanted = np.asarray(chances, np.float64)
        seconds = np.full(wanted.shape, np.inf)
        for column, client in enumerate(clients):
            if client in self._times:
                # ``stays`` is a line between the lengths of the times there.
                lengths = self._lengths(client)
                ends = np.unique([0.0, *lengths])
                stays = [np.maximum(lengths - end, 0).sum() / lengths.sum() for end in ends]
                seconds[..., column] = np.interp(wanted[..., column], stays[::-1], ends[::-1])
        return seconds

    def _lengths(self, client: int) -> Array:
        if client not in self._times:
            return np.array([self._whole])
        borders = self._times[client]
        return np.subtract(borders[1::2], borders[::2])

    def summary(self) -> str:
        """Return how many clients have times of their own."""
        again = f", again every {self.repeat:g} s" if self.repeat else ""
        return f"{self.name} of {len(self._times)} clients{again}"


def _joined(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Return when a client comes, goes, comes and so on."""
    borders: list[float] = []
    for start, end in sorted(spans):
        if borders and start <= borders[-1]:
            borders[-1] = max(borders[-1], end)
        else:
            borders += [start, end]
    return borders
