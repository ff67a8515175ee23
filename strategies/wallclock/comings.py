"""Clients that come and go by chance, at the same hours or at any, as functions of the seed [D]."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.wallclock.availability import Array, Availability, Mask, Presence, register

Words = NDArray[np.uint64]

_BLOCK = 10  # of so many clients in a row, the same number comes and goes


class _ByChance(Availability):
    """A share of the clients come and go, each on its own; the others are always there.

    Parameters
    ----------
    rng : numpy.random.Generator
        One number is drawn, which stands for the seed.
    share : float (default: 0.5)
        Share of the time that a client that comes and goes is there, in (0, 1).
    seconds : float
        Mean length of a time there and the time away after it, > 0.
    clients : float (default: 1.0)
        Share of the clients that come and go, in [0, 1]: as many of any ten in a row, rounded at
        random.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self, *, rng: np.random.Generator, share: float, seconds: float, clients: float
    ) -> None:
        problems = []
        if not 0 < share < 1:
            problems.append(f"share must lie in (0, 1), got {share!r}; for 1 use 'always'")
        if not (math.isfinite(seconds) and seconds > 0):
            problems.append(f"seconds must be finite and > 0, got {seconds!r}")
        if not 0 <= clients <= 1:
            problems.append(f"clients must lie in [0, 1], got {clients!r}")
        if problems:
            raise ValueError(f"invalid {self.name} availability: " + "; ".join(problems))
        self.there, self.away = share * seconds, (1 - share) * seconds
        self.clients, self._share, self._seconds = clients, share, seconds
        self._key = int(rng.integers(2**63))

    def look(self, clients: Sequence[int], seconds: float) -> Presence:
        """Return who is there at a second."""
        indices = np.asarray(clients, np.int64)
        here, until = np.ones(indices.size, bool), np.full(indices.size, np.inf)
        moves = self._moves(indices)
        here[moves], until[moves] = self._look(indices[moves], float(seconds))
        return Presence(here, until)

    @abstractmethod
    def _look(self, clients: NDArray[np.int64], seconds: float) -> tuple[Mask, Array]:
        """Return the same of clients that do come and go."""

    def share(self, clients: Sequence[int]) -> Array:
        """Return the share of those that come and go, 1 for the others."""
        return np.where(self._moves(np.asarray(clients, np.int64)), self._share, 1.0)

    def stays(self, clients: Sequence[int], seconds: ArrayLike) -> Array:
        """Return how likely clients are to stay for so many seconds."""
        lasting = np.broadcast_to(np.asarray(seconds, np.float64), (len(clients),))
        moves = self._moves(np.asarray(clients, np.int64))
        chance: Array = np.where(moves, self._stays(lasting), 1.0)
        return chance

    @abstractmethod
    def _stays(self, seconds: Array) -> Array:
        """Return the same of clients that do come and go."""

    def left(self, clients: Sequence[int], chances: ArrayLike) -> Array:
        """Return for how long clients stay at least, with a chance."""
        moves = self._moves(np.asarray(clients, np.int64))
        seconds: Array = np.where(moves, self._left(np.asarray(chances, np.float64)), np.inf)
        return seconds

    @abstractmethod
    def _left(self, chances: Array) -> Array:
        """Return the same of clients that do come and go."""

    def _moves(self, clients: NDArray[np.int64]) -> Mask:
        if self.clients == 1:
            return np.ones(clients.size, bool)
        block, place = np.divmod(clients, _BLOCK)
        tickets = _chance(self._key, "who", block[:, None], np.arange(_BLOCK)[None])
        mine = tickets[np.arange(clients.size), place]
        rank = (tickets < mine[:, None]).sum(axis=1)
        moves: Mask = (rank + _chance(self._key, "how many", block)) / _BLOCK < self.clients
        return moves

    def summary(self) -> str:
        """Return the settings in one line."""
        whom = "everybody" if self.clients == 1 else f"{self.clients:.0%} of the clients"
        return f"{self.name}, {whom} there {self._share:.0%} of {self._seconds:g} s"


@register
class Diurnal(_ByChance):
    """There at the same hours of every day, as telephones are that charge at night.

    Parameters
    ----------
    rng, share, clients
        As of all models by chance: the share of the day that a client is there (default: 0.5),
        and of the clients that come and go (default: 1.0).
    seconds : float (default: 86400)
        Length of a day.
    spread : float (default: 1.0)
        Over which part of the day the clients' first hours are spread, evenly, in [0, 1]; 0: all
        come and go together.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "diurnal"

    def __init__(
        self,
        *,
        rng: np.random.Generator,
        share: float = 0.5,
        seconds: float = 86_400.0,
        clients: float = 1.0,
        spread: float = 1.0,
    ) -> None:
        super().__init__(rng=rng, share=share, seconds=seconds, clients=clients)
        if not 0 <= spread <= 1:
            raise ValueError(f"invalid diurnal availability: spread must lie in [0, 1], "
                             f"got {spread!r}")  # fmt: skip
        self.spread = spread

    def _look(self, clients: NDArray[np.int64], seconds: float) -> tuple[Mask, Array]:
        period = self._seconds
        phase = _chance(self._key, "phase", clients) * self.spread * period
        day = np.floor((seconds - phase) / period)
        # By the very sums that the borders are made of, so that rounding skips and repeats none.
        day = np.where(seconds >= (day + 1) * period + phase, day + 1, day)
        day = np.where(seconds < day * period + phase, day - 1, day)
        leaves = day * period + phase + self.there
        here = seconds < leaves
        return here, np.where(here, leaves, (day + 1) * period + phase)

    def _stays(self, seconds: Array) -> Array:
        return np.maximum(1 - seconds / self.there, 0.0)

    def _left(self, chances: Array) -> Array:
        return (1 - chances) * self.there


@register
class Exponential(_ByChance):
    """Comes and goes at any time: times there and away are exponential, whatever was before.

    It is in the long run from the first second on: a client is there at second 0 with the
    probability ``share``.

    Parameters
    ----------
    rng, share, clients
        As of all models by chance (default: 0.5 and 1.0).
    seconds : float (default: 3600)
        Mean length of a time there and the time away after it.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    # Calls to go and calls to come are two Poisson processes, of one call each mean time there
    # and away; a client is where its last call sent it, and a second call to go changes nothing.
    # A Poisson process can be drawn block by block, in any order: that is what makes the state at
    # any second a function of the seed.

    name = "exponential"

    def __init__(
        self,
        *,
        rng: np.random.Generator,
        share: float = 0.5,
        seconds: float = 3600.0,
        clients: float = 1.0,
    ) -> None:
        super().__init__(rng=rng, share=share, seconds=seconds, clients=clients)

    def _look(self, clients: NDArray[np.int64], seconds: float) -> tuple[Mask, Array]:
        went = self._call("go", self.there, clients, seconds, last=True)
        came = self._call("come", self.away, clients, seconds, last=True)
        begins = _chance(self._key, "start", clients) < self._share
        here = np.where(np.maximum(went, came) < 0, begins, came > went)
        until = np.empty(clients.size)
        until[here] = self._call("go", self.there, clients[here], seconds, last=False)
        until[~here] = self._call("come", self.away, clients[~here], seconds, last=False)
        return here, until

    def _call(
        self, what: str, mean: float, clients: NDArray[np.int64], seconds: float, *, last: bool
    ) -> Array:
        """Return the last call up to a second, -1 for none; or the first after it."""
        found = np.full(clients.size, -1.0)
        open_ = np.arange(clients.size)
        block = math.floor(seconds / mean)
        while open_.size and block >= 0:
            times = self._calls(what, mean, clients[open_], block)
            if last:
                best = np.where(times <= seconds, times, -1.0).max(axis=1, initial=-1.0)
            else:
                best = np.where(times > seconds, times, np.inf).min(axis=1, initial=np.inf)
                best[np.isinf(best)] = -1.0
            found[open_] = best
            open_ = open_[best < 0]
            block += -1 if last else 1
        return found

    def _calls(self, what: str, mean: float, clients: NDArray[np.int64], block: int) -> Array:
        """Return the calls in a block of one mean time, in no order, shape (n, most); inf: none."""
        where = np.full(clients.size, block)
        count = np.searchsorted(_POISSON, _chance(self._key, f"{what}, number", clients, where))
        place = np.arange(count.max(initial=0))
        times = _chance(self._key, what, clients[:, None], where[:, None], place[None])
        return np.where(place < count[:, None], (block + times) * mean, np.inf)

    def _stays(self, seconds: Array) -> Array:
        return np.exp(-seconds / self.there)

    def _left(self, chances: Array) -> Array:
        return -np.log(chances) * self.there


# P(N ≤ k) of a Poisson number of mean 1.
_POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(20)])


# Of SplitMix64.
_GOLDEN, _FIRST, _SECOND = map(
    np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_S30, _S27, _S31, _S11, _ONE = map(np.uint64, (30, 27, 31, 11, 1))


def _chance(key: int, purpose: str, *where: NDArray[np.int64]) -> Array:
    """Return a number in [0, 1) for each place, from the seed alone; the shapes broadcast.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), once a coordinate. A
    generator for each client and place would take a thousand times as long.
    """
    words = np.full(
        np.broadcast_shapes(*(places.shape for places in where)),
        key ^ zlib.crc32(purpose.encode()) << 16,
        np.uint64,
    )
    for places in where:
        words = _mixed(words + (places.astype(np.uint64) + _ONE) * _GOLDEN)
    return (words >> _S11).astype(np.float64) * 2.0**-53


def _mixed(words: Words) -> Words:
    words = (words ^ (words >> _S30)) * _FIRST
    words = (words ^ (words >> _S27)) * _SECOND
    mixed: Words = words ^ (words >> _S31)
    return mixed
