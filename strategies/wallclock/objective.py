"""What the planner minimises: the expected time of a round times the number of rounds.

``total(q, k) = E[T(q, k)] · α / (β − Σ a² φ(k) / q)``, where ``T`` is the optimal round time of
`allocate_bandwidth` for the clients that happen to join [D]. Under other `Conditions` it is that
of simulated rounds, and ``φ/q`` grows by what is lost of a client's replies. A client's rank enters
as the index of one of its options, so that time, bits and variance are plain tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.wallclock.bandwidth import Mask, batch_round_seconds
from strategies.wallclock.conditions import Conditions, Luck, stratified

Array = NDArray[np.float64]
Choice = NDArray[np.int64]
Phi = Callable[[Array], Array]

# Whoever alone answers more rarely is lost; nobody is taken to answer more rarely than the second.
_REACHABLE, _LEAST_RATE = 0.02, 0.001


@dataclass(frozen=True)
class ClientProfiles:
    """What the planner must know of the clients. One number stands for all of them.

    Parameters
    ----------
    weights : array_like, shape (n,)
        Data weights ``a``, ≥ 0, with sum 1.
    base_seconds, rank_seconds : array_like, shape (n,) or ()
        ``c0`` and ``c1``: a local step at rank ``k`` takes ``c0 + c1 k`` seconds; both ≥ 0.
    steps : array_like, shape (n,) or ()
        ``H``: local steps a round, ≥ 0.
    bits_per_rank, constant_bits : array_like, shape (n,) or ()
        An upload at rank ``k`` has ``constant_bits + bits_per_rank · k`` bits (the constant part
        is the head and what else does not depend on the rank); ≥ 0, not both 0.
    spectral_efficiency : array_like, shape (n,) or ()
        bit/s/Hz of each client's channel, > 0.
    bandwidth_hz : float
        Uplink band that the participants of a round share (Hz), > 0.
    ranks : sequence of int, or one such sequence per client
        The ranks that may be sent.
    max_ranks : array_like of int, shape (n,) or (), optional
        The largest rank each client can hold. (default: no limit)
    full_rank : int, optional
        ``R``, the rank of the global adapter. (default: the largest of `ranks`)
    conditions : Conditions, optional
        What rounds are like. (default: optimal shares, no deadline, everybody there)

    Raises
    ------
    ValueError
        If a shape or value does not fit, or a client can hold none of its ranks.
    """

    weights: ArrayLike
    base_seconds: ArrayLike
    rank_seconds: ArrayLike
    steps: ArrayLike
    bits_per_rank: ArrayLike
    constant_bits: ArrayLike
    spectral_efficiency: ArrayLike
    bandwidth_hz: float
    ranks: Sequence[int] | Sequence[Sequence[int]]
    max_ranks: ArrayLike | None = None
    full_rank: int | None = None
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        a = np.asarray(self.weights, np.float64)
        if a.ndim != 1 or a.size == 0:
            raise ValueError(f"weights must be a list, one a client, got shape {a.shape}")
        for name in ("base_seconds", "rank_seconds", "steps", "bits_per_rank", "constant_bits"):
            self._column(name, a.size)
        self._column("weights", a.size)
        efficiency = self._column("spectral_efficiency", a.size)
        if abs(a.sum() - 1) > 1e-6:
            raise ValueError(f"weights must have sum 1, got {a.sum():.6g}: divide by their sum")
        if not (efficiency > 0).all():
            client = int(np.argmin(efficiency))
            raise ValueError(
                f"spectral_efficiency must be > 0, got {efficiency[client]} for client {client}"
            )
        if not (np.isfinite(self.bandwidth_hz) and self.bandwidth_hz > 0):
            raise ValueError(f"bandwidth_hz must be finite and > 0, got {self.bandwidth_hz!r}")
        options = self.options()
        if not (self.upload_seconds(options) > 0).all():
            raise ValueError(
                "every client must upload something: bits_per_rank and constant_bits are both 0"
            )
        if self.full_rank is not None and self.full_rank < self._largest_rank():
            raise ValueError(
                f"full_rank must be at least the largest rank {self._largest_rank()}, "
                f"got {self.full_rank}"
            )

    def __len__(self) -> int:
        return len(np.asarray(self.weights))

    def options(self) -> Array:
        """Return the allowed ranks, shape (n, options), ascending.

        Shorter lists are filled up with their largest rank.
        """
        n, lists = len(self), self._rank_lists()
        if self.max_ranks is None:
            caps = np.full(n, np.inf)
        else:
            caps = _broadcast("max_ranks", self.max_ranks, n)
        allowed = [r[r <= cap] for r, cap in zip(lists, caps, strict=True)]
        for client, (ranks, kept) in enumerate(zip(lists, allowed, strict=True)):
            if kept.size == 0:
                raise ValueError(
                    f"client {client} can hold no rank: it is limited to {caps[client]:g} and the "
                    f"ranks are {ranks.tolist()}"
                )
        width = max(map(len, allowed))
        return np.array([np.pad(r, (0, width - len(r)), mode="edge") for r in allowed], np.float64)

    def compute_seconds(self, k: Array) -> Array:
        """Return ``τ = H (c0 + c1 k)`` in seconds; `k` of shape (n,) or (n, options)."""
        h, c0, c1 = (
            self._column(name, len(self)).reshape(-1, *[1] * (k.ndim - 1))
            for name in ("steps", "base_seconds", "rank_seconds")
        )
        seconds: Array = h * (c0 + c1 * k)
        return seconds

    def upload_seconds(self, k: Array) -> Array:
        """Return the time of an upload alone on the whole band, shapes as `compute_seconds`."""
        constant, slope, efficiency = (
            self._column(name, len(self)).reshape(-1, *[1] * (k.ndim - 1))
            for name in ("constant_bits", "bits_per_rank", "spectral_efficiency")
        )
        seconds: Array = (constant + slope * k) / efficiency / self.bandwidth_hz
        return seconds

    def phi(self, k: Array) -> Array:
        """Return the variance factors of sketching, ``R / k`` [D]."""
        full = self._largest_rank() if self.full_rank is None else self.full_rank
        factors: Array = full / k
        return factors

    def _largest_rank(self) -> int:
        return max(int(ranks[-1]) for ranks in self._rank_lists())

    def _rank_lists(self) -> list[NDArray[np.int64]]:
        n = len(self)
        nested = any(np.ndim(ranks) > 0 for ranks in self.ranks)
        lists = [np.unique(r) for r in self.ranks] if nested else [np.unique(self.ranks)] * n
        if len(lists) != n:
            raise ValueError(
                f"ranks must be one list, or {n} lists for {n} clients, got {len(lists)}"
            )
        for client, ranks in enumerate(lists):
            if ranks.size == 0 or not np.issubdtype(ranks.dtype, np.integer) or ranks[0] < 1:
                raise ValueError(
                    f"ranks must be whole numbers ≥ 1, got {ranks.tolist()} for client {client}"
                )
        return lists

    def _column(self, name: str, n: int) -> Array:
        values = _broadcast(name, getattr(self, name), n)
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            client = int(np.argmax(bad))
            raise ValueError(
                f"{name} must be finite and ≥ 0, got {values[client]} for client {client}"
            )
        return values


class Objective:
    """Scores sampling probabilities and ranks over a fixed collection of participant sets.

    Either all ``2^n`` sets with their probabilities (exact), or sets drawn by common random
    numbers: a client is in a set if its number is below ``q``, so that two plans are compared on
    the same luck, and each client's numbers are stratified over the sets.

    Parameters
    ----------
    profiles : ClientProfiles
        The clients.
    alpha, beta : float
        Constants of the number of rounds.
    phi : callable, optional
        Maps ranks to variance factors. (default: ``full_rank / k``)
    idle_seconds : float
        Time of a round in which nobody takes part.
    sets : int, optional
        How many sets to draw; None enumerates them all.
    rng : numpy.random.Generator
        Source of the sets.
    """

    def __init__(
        self,
        profiles: ClientProfiles,
        alpha: float,
        beta: float,
        phi: Phi | None,
        idle_seconds: float,
        sets: int | None,
        rng: np.random.Generator,
    ) -> None:
        n = len(profiles)
        self.n, self.alpha, self.beta, self.idle_seconds = n, alpha, beta, idle_seconds
        self.a = np.asarray(profiles.weights, np.float64)
        self.options = profiles.options()
        if phi is None:
            factors = profiles.phi(self.options)
        else:
            factors = np.asarray(phi(self.options), np.float64)
        if factors.shape != self.options.shape or not (
            np.isfinite(factors).all() and (factors > 0).all()
        ):
            raise ValueError("phi must return a finite factor > 0 for every rank")
        self.phi = factors
        self.conditions = profiles.conditions
        self.there = np.ones(n)
        if self.conditions is not None:
            self.there = _broadcast("there", self.conditions.there, n)
            if not ((self.there > 0) & (self.there <= 1)).all():
                raise ValueError(f"there must lie in (0, 1], got {self.there.tolist()}")
        self.tau = profiles.compute_seconds(self.options)
        self.upload = profiles.upload_seconds(self.options)
        self.reachable = np.ones(n, bool)
        self.exact = sets is None
        self._rows = np.arange(n)
        if sets is None:
            self._subsets = (np.arange(2**n)[:, None] >> self._rows) & 1 == 1
        else:
            self._numbers = stratified(sets, n, rng)
        self.luck: Luck | None = None
        if self.conditions is not None:
            if sets is None:
                raise ValueError("conditions are judged by drawn sets; give their number")
            self.luck = Luck(self.conditions, sets, n, rng)
            nobody, first = np.zeros((sets, n), bool), np.zeros(n, np.int64)
            tables = self.tau[:, :1], self.upload[:, :1]
            alone = self.luck.answers(self.at(self.tau, first), self.at(self.upload, first),
                                      nobody, tables)  # fmt: skip
            self.reachable = alone[:, 0] >= _REACHABLE
        self._answered(np.broadcast_to(self.there[:, None], factors.shape))

    @property
    def latest(self) -> float:
        """Seconds that no round is longer than."""
        return (self.conditions.deadline if self.conditions else 0.0) or np.inf

    def _answered(self, rate: Array) -> None:
        """Take which share of the rounds it was to join each client answers, at each rank.

        Whoever would not answer even if nobody else took part is lost whatever the plan: it adds
        its share of the data and nothing to wait for. Nobody else is ever taken for lost, or it
        would pay to crowd the band until everybody is.
        """
        answers = 1 / np.maximum(rate, _LEAST_RATE)
        self.variance = np.where(
            self.reachable[:, None], self.a[:, None] ** 2 * self.phi * answers, 0.0
        )
        self.lost = np.where(self.reachable, 0.0, 2 * self.a**2)

    def look(self, q: Array, choice: Choice) -> None:
        """Take what is lost of replies, where a deadline or departures make it depend on a plan."""
        if self.luck is not None and self.luck.conditions.loses:
            tau, upload = self.at(self.tau, choice), self.at(self.upload, choice)
            masks = self.sets(q)[0]
            rate = self.luck.answers(tau, upload, masks, (self.tau, self.upload))
            self._answered(rate * self.there[:, None])

    def at(self, table: Array, choice: Choice) -> Array:
        """Return each client's entry of a table (n, options)."""
        entries: Array = table[self._rows, choice]
        return entries

    def bracket(self, q: Array, choice: Choice) -> float:
        """Return ``β − Σ a² φ / q``; a plan is feasible where it is positive."""
        variance = self.at(self.variance, choice) / q
        if self.conditions is not None:
            variance = variance + self.lost
        return self.beta - float(variance.sum())

    def sets(self, q: Array) -> tuple[Mask, Array]:
        """Return participant sets (sets, n) and their probabilities (sets,)."""
        if self.exact:
            return self._subsets, np.where(self._subsets, q, 1 - q).prod(axis=1)
        return self._numbers < q * self.there, np.full(len(self._numbers), 1 / len(self._numbers))

    def set_seconds(self, masks: Mask, choice: Choice) -> Array:
        """Return the round time of each set, shape (sets,); under conditions, of the first ones."""
        tau, upload = self.at(self.tau, choice), self.at(self.upload, choice)
        if self.luck is not None:
            seconds = self.luck.rounds(tau, upload, masks, slice(len(masks)), slice(None))[0]
            return np.where(masks.any(axis=1), seconds, self.idle_seconds)
        return batch_round_seconds(tau, upload, masks, idle_seconds=self.idle_seconds)

    def round_seconds(self, q: Array, choice: Choice) -> float:
        """Return the expected time of a round."""
        masks, probability = self.sets(q)
        return float(probability @ self.set_seconds(masks, choice))

    def total(self, q: Array, choice: Choice) -> float:
        """Return the expected time to the target; inf where it is out of reach."""
        bracket = self.bracket(q, choice)
        if bracket <= 0:
            return np.inf
        return self.round_seconds(q, choice) * self.alpha / bracket

    def score(self, q: Array, choice: Choice) -> float:
        """Return the same, with what this very plan loses of replies."""
        self.look(q, choice)
        return self.total(q, choice)


def _broadcast(name: str, values: ArrayLike, n: int) -> Array:
    array = np.asarray(values, np.float64)
    if array.shape not in ((), (n,)):
        raise ValueError(f"{name} must be one number or {n} of them, got shape {array.shape}")
    return np.broadcast_to(array, (n,))
