"""The expected time of a round of many clients, by who is the slowest to compute [D].

The mean over a few random sets of participants misses what a client does that seldom joins and is
very slow. So the sets are split by the slowest computer in them: client i is that with the
probability ``q_i Π (1 - q_j)`` over all j slower than i, and those that are faster still join
by their own coins. Those probabilities are exact; only what is left within each part is a sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.wallclock.bandwidth import batch_round_seconds
from strategies.wallclock.conditions import Conditions, Luck, stratified

Array = NDArray[np.float64]

# Its own, so that all plans are judged on the same luck, and never on that of their search.
_SEED = 0x6C6F7261
_NUMBERS, _MOST_SETS, _FEWEST_SETS = 400_000, 2048, 64
_NEGLIGIBLE = 1e-6
_CELLS = 2_000_000


class Expectation:
    """Judges sampling probabilities by the expected time of a round.

    Parameters
    ----------
    n : int
        Number of clients.
    idle_seconds : float
        Time of a round in which nobody takes part.
    conditions : Conditions, optional
        What rounds are like.
    """

    def __init__(self, n: int, idle_seconds: float, conditions: Conditions | None = None) -> None:
        self.idle_seconds = idle_seconds
        self.sets = int(np.clip(_NUMBERS // n, _FEWEST_SETS, _MOST_SETS))
        rng = np.random.default_rng(_SEED)
        self._numbers = stratified(self.sets, n, rng)
        self._luck = None if conditions is None else Luck(conditions, self.sets, n, rng)

    def seconds(self, tau: Array, upload: Array, q: Array) -> float:
        """Return the expected seconds of a round.

        Parameters
        ----------
        tau, upload : ndarray, shape (n,)
            Seconds that each client computes, and uploads alone on the whole band.
        q : ndarray, shape (n,)
            Its probability to join, and to be there, above 0.
        """
        order = np.argsort(-tau, kind="stable")
        tau, upload, q = tau[order], upload[order], q[order]
        none_slower = np.concatenate([[1.0], np.cumprod(1 - q)])
        nobody = float(none_slower[-1])
        chance = (q * none_slower[:-1])[none_slower[:-1] > _NEGLIGIBLE]
        sets = 1 if (q == 1).all() and self._luck is None else self.sets
        counts = np.ceil(sets * chance).astype(np.int64)
        slowest = np.repeat(np.arange(chance.size), counts)
        weight = (chance / counts)[slowest]
        numbers = self._numbers[:, order]
        total = nobody * self.idle_seconds
        size = max(1, _CELLS // q.size)
        for start in range(0, slowest.size, size):
            first = slowest[start : start + size, None]
            rows = np.arange(start, start + len(first)) % self.sets
            places = np.arange(q.size)
            masks = (numbers[rows] < q) & (places > first) | (places == first)
            if self._luck is None:
                seconds = batch_round_seconds(tau, upload, masks)
            else:
                seconds = self._luck.rounds(tau, upload, masks, rows, order)[0]
            total += weight[start : start + size] @ seconds
        return float(total)
