"""What a round is like beside who joins it: shares, a deadline, fades, and who goes away [D].

Where all that is looked at, the planner judges rounds by simulating them: `Luck` holds the fades
and departures of some hundred rounds, the same for every plan that is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.wallclock.bandwidth import Bandwidth, Mask, batch_round_seconds

Array = NDArray[np.float64]
FromChance = Callable[[Array], Array]
Places = NDArray[np.int64] | slice

# A client that was long away counts at its return at most so many times: unbiased weights would be
# as many as it missed, and one of them moves the model by all of these at once.
MOST_MADE_UP = 5.0
_HALVINGS = 6


@dataclass(frozen=True)
class Conditions:
    """What a round is like beside who joins it.

    Parameters
    ----------
    bandwidth : "optimal" or "equal"
        How participants share the band. (default: "optimal")
    deadline : float
        Seconds after which a round ends without who is late; 0: none. (default: 0)
    there : array_like, shape (n,) or ()
        Share of the time that each client is there, in (0, 1]; who is away cannot join. Clients
        are taken to come and go independently of each other. (default: 1)
    slower : callable, optional
        Maps chances in (0, 1), shape (sets, n), to what a fade multiplies each client's upload by,
        of mean 1. (default: no fades)
    left : callable, optional
        Maps chances in (0, 1), shape (sets, n), to the seconds that a client which is there stays.
        (default: nobody goes away midway)
    """

    bandwidth: Bandwidth = "optimal"
    deadline: float = 0.0
    there: ArrayLike = 1.0
    slower: FromChance | None = None
    left: FromChance | None = None

    @property
    def loses(self) -> bool:
        """Whether a client that joins may be late, or go away before it is done."""
        return self.deadline > 0 or self.left is not None


class Luck:
    """Fades and departures of so many rounds.

    Parameters
    ----------
    conditions : Conditions
    sets : int
        How many rounds.
    n : int
        How many clients.
    rng : numpy.random.Generator
    """

    def __init__(self, conditions: Conditions, sets: int, n: int, rng: np.random.Generator) -> None:
        self.conditions = conditions
        self.slower, self.left = np.ones((1, n)), None
        if conditions.slower is not None:
            self.slower = conditions.slower(stratified(sets, n, rng))
        if conditions.left is not None:
            self.left = conditions.left(stratified(sets, n, rng))

    def rounds(
        self, tau: Array, upload: Array, masks: Mask, rows: Places, columns: Places
    ) -> tuple[Array, Mask]:
        """Return how long rounds take, 0 where nobody joins, and whose replies come in time.

        As `SimulatedClock` has it. Whoever goes away first is the first that is not waited for;
        the others then share the band anew, unless shares are equal.

        Parameters
        ----------
        tau, upload : ndarray, shape (n,)
            Seconds that each client computes, and uploads alone on the whole band on average.
        masks : ndarray of bool, shape (sets, n)
            Who joins.
        rows, columns
            Which of the rounds, and clients, these are.
        """
        c = self.conditions
        upload = upload * self._of(self.slower, rows, columns)
        left = None if self.left is None else self._of(self.left, rows, columns)
        deadline = c.deadline or np.inf
        whole, done = self._done(tau, upload, masks)
        kept = masks
        if c.deadline and c.bandwidth == "equal":
            kept = masks & (done <= deadline)
        elif c.deadline:
            need = needs(tau, upload, deadline)
            in_time = (need <= room(need, masks)) | (whole <= deadline)[:, None]
            kept = masks & in_time
        if left is None:
            return np.minimum(whole, deadline), kept
        if c.bandwidth == "equal":
            gone = kept & (left < done)
        else:
            gone = self._gone(tau, upload, kept, left)
        gone = gone | (masks & ~kept & (left < deadline))
        kept = kept & ~gone
        if c.bandwidth == "equal":
            rest = np.where(kept, done, 0.0).max(axis=1, initial=0.0)
        else:
            rest = batch_round_seconds(tau, upload, kept)
        slow = (masks & ~kept & ~gone).any(axis=1)
        seconds = np.maximum(rest, np.where(gone, left, 0.0).max(axis=1, initial=0.0))
        return np.maximum(seconds, np.where(slow, deadline, 0.0)), kept

    def _done(self, tau: Array, upload: Array, masks: Mask) -> tuple[Array, Array]:
        """Return the time of each round without deadline, and when each client is done in it."""
        if self.conditions.bandwidth == "equal":
            done = tau + upload * masks.sum(axis=1)[:, None]
            return np.where(masks, done, 0.0).max(axis=1, initial=0.0), done
        whole = batch_round_seconds(tau, upload, masks)
        return whole, np.broadcast_to(whole[:, None], masks.shape)

    def _gone(self, tau: Array, upload: Array, masks: Mask, left: Array) -> Mask:
        """Return who goes away before it is done, with optimal shares.

        By bisection for when the last of them goes: the more are gone, the sooner the others are
        done.
        """
        gone = np.zeros_like(masks)
        some = np.flatnonzero((masks & (left < self._done(tau, upload, masks)[1])).any(axis=1))
        masks, left = masks[some], left[some]
        upload = upload[some] if len(upload) > 1 else upload
        low, high = np.zeros(some.size), batch_round_seconds(tau, upload, masks)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            late = batch_round_seconds(tau, upload, masks & (left >= middle[:, None])) > middle
            low, high = np.where(late, middle, low), np.where(late, high, middle)
        gone[some] = masks & (left < high[:, None])
        return gone

    def answers(self, tau: Array, upload: Array, masks: Mask, tables: tuple[Array, Array]) -> Array:
        """Return how likely each client that joins is to answer in time, shape (n, options).

        Parameters
        ----------
        tau, upload, masks
            Of the others, as in ``rounds``, in all of the rounds.
        tables : tuple of ndarray, shape (n, options)
            Its own seconds at each of its ranks.
        """
        c = self.conditions
        slower = self.fades(len(masks))
        left = np.inf if self.left is None else self.left[: len(masks)]
        others = masks.sum(axis=1)[:, None] - masks
        band = upload * slower
        whole = batch_round_seconds(tau, band, masks)[:, None] if c.bandwidth == "optimal" else 0.0
        own = needs(tau, band, c.deadline) if c.deadline and c.bandwidth == "optimal" else None
        most = None if own is None else room(own, masks)
        chances = np.empty(tables[0].shape)
        for option in range(tables[0].shape[1]):
            mine, sends = tables[0][:, option], tables[1][:, option] * slower
            if c.bandwidth == "equal":
                done = mine + sends * (others + 1)
            else:
                done = np.maximum(whole, mine + sends)
            stays = left >= (np.minimum(done, c.deadline) if own is not None else done)
            if own is not None and most is not None:
                need = needs(mine, sends, c.deadline)
                stays = stays & ((need <= most) | (masks & (own <= most) & (need <= own)))
            elif c.deadline:
                stays = stays & (done <= c.deadline)
            chances[:, option] = np.broadcast_to(stays, masks.shape).mean(axis=0)
        return chances

    def fades(self, sets: int) -> Array:
        """Return what fades multiply uploads by in the first so many rounds, shape (sets, n)."""
        return self._of(self.slower, slice(sets), slice(None))

    def _of(self, numbers: Array, rows: Places, columns: Places) -> Array:
        return (numbers if len(numbers) == 1 else numbers[rows])[:, columns]


def stratified(sets: int, n: int, rng: np.random.Generator) -> Array:
    """Return numbers in (0, 1), shape (sets, n): each client's evenly spread over the sets."""
    strata = rng.permuted(np.tile(np.arange(sets), (n, 1)), axis=1).T
    numbers: Array = (strata + rng.random((sets, n))) / sets
    return numbers


def needs(tau: Array, upload: Array, deadline: float) -> Array:
    """Return which share of the band each client needs to be done by a deadline; inf: none does."""
    spare = np.broadcast_to(deadline - tau, upload.shape)
    need = np.full(upload.shape, np.inf)
    np.divide(upload, spare, out=need, where=spare > 0)
    return need


def room(need: Array, masks: Mask) -> Array:
    """Return the largest need that is still met in each set, shape (sets, 1).

    Who needs least is kept for as long as the band suffices, so that no set is larger.
    """
    ordered = np.sort(np.where(masks, need, np.inf), axis=1)
    used = np.pad(np.cumsum(ordered, axis=1), ((0, 0), (1, 0)))
    following = np.concatenate([ordered, np.full((len(ordered), 1), np.inf)], axis=1)
    spare = np.where(np.isfinite(used), 1 - used, -np.inf)
    most: Array = np.minimum(spare, following).max(axis=1, keepdims=True)
    return most
