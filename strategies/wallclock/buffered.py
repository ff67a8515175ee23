"""How fast models come where clients are asked anew as they answer, not round by round [D].

``C`` clients are busy at a time; as one answers, another is chosen uniformly among the idle ones
that are there, and a model is made after every ``K`` replies (FedBuff, arXiv 2106.06639; K = 1 is
the asynchronous mode). Those who upload at a moment share the band equally. An upload then takes
its seconds alone on the band times a stretch, the same for all: one more than the mean number of
uploads that an arriving one meets, by mean value analysis of a network of two stations, computing
and uploading (Reiser and Lavenberg, J. ACM 27, 1980, with the means over the orders [D]).

With everybody there the set of the busy has a product form: it is S with a probability in
proportion to ``Π x`` over S, x the mean seconds of a client's order, whatever their distribution
(detailed balance for exponential orders [derived, checked]). With ``e`` the elementary symmetric
polynomials of all x, replies come at the rate ``(n − C + 1) e_{C−1} / e_C``. Clients that come and
go are counted as if there were very many: each of the idle is asked at one common rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.wallclock.conditions import Conditions, stratified
from strategies.wallclock.objective import ClientProfiles, Phi

Array = NDArray[np.float64]

_SETS = 256
# Its own, as in Expectation: all predictions are made with the same luck.
_SEED = 0x6C6F7261
_STEPS = 200
_TURNS = 30


@dataclass(frozen=True)
class BufferedTime:
    """What is predicted of a buffered run.

    Parameters
    ----------
    buffer, busy : int
        K and C; no more than there are clients are busy.
    round_seconds : float
        Mean seconds from one model to the next; inf where no order is ever done.
    shares : ndarray, shape (n,)
        Share of the replies that come from each client, with sum 1.
    answered : float
        Share of the orders that are answered; the others' clients went away.
    staleness : float
        Mean number of models that are made while an order is under way.
    discount : float
        Mean ``(1 + staleness)^-a`` of the replies.
    rounds, total_seconds : float
        Models, and seconds, to the target; inf where it is out of reach.
    """

    buffer: int
    busy: int
    round_seconds: float
    shares: Array
    answered: float
    staleness: float
    discount: float
    rounds: float
    total_seconds: float

    def summary(self) -> str:
        """Return the prediction in one line."""
        return (
            f"a model after {self.buffer} replies of {self.busy} busy clients: {self.rounds:.1f} "
            f"of {self.round_seconds:.4g} s, {self.staleness:.1f} models late on average: "
            f"{self.total_seconds:.4g} s"
        )


def buffered_time(
    profiles: ClientProfiles,
    k: ArrayLike,
    *,
    buffer: int,
    busy: int,
    alpha: float,
    beta: float,
    phi: Phi | None = None,
    staleness: float = 0.5,
) -> BufferedTime:
    """Predict a buffered run.

    A model of K replies is taken for a round of a sampling with ``q = K/n``, the same for all; its
    variance is ``s = Σ a² φ n / K``. Late replies move the model by their discount ``d``, so that
    its progress is ``d (β − d s)/α``: what staleness costs beyond that is not known here.

    Parameters
    ----------
    profiles : ClientProfiles
        The clients. A deadline in their conditions means nothing here.
    k : array_like of int, shape (n,)
        The rank that each trains.
    buffer, busy : int
        K ≥ 1 and C ≥ 1.
    alpha, beta : float
        Constants of the number of rounds, as of ``plan``.
    phi : callable, optional
        As of ``plan``.
    staleness : float
        a of the discount ``(1 + s)^-a``, ≥ 0. (default: 0.5)

    Returns
    -------
    BufferedTime

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    n = len(profiles)
    for name, value, least in (
        ("buffer", buffer, 1),
        ("busy", busy, 1),
        ("staleness", staleness, 0),
    ):
        if not (np.isfinite(value) and value >= least):
            raise ValueError(f"{name} must be finite and ≥ {least}, got {value!r}")
    ranks = np.broadcast_to(np.asarray(k, np.float64), (n,))
    a = np.asarray(profiles.weights, np.float64)
    busy = min(busy, n)
    conditions = profiles.conditions or Conditions()
    there = np.broadcast_to(np.asarray(conditions.there, np.float64), (n,))
    rng = np.random.default_rng(_SEED)
    upload = np.broadcast_to(profiles.upload_seconds(ranks), (_SETS, n))
    if conditions.slower is not None:
        upload = upload * conditions.slower(stratified(_SETS, n, rng))
    left = np.full((1, n), np.inf)
    if conditions.left is not None:
        left = conditions.left(stratified(_SETS, n, rng))
    compute, stretch = profiles.compute_seconds(ranks), 1.0
    for _ in range(_TURNS):
        seconds = compute + stretch * upload
        done = seconds <= left
        success, held = done.mean(axis=0), np.minimum(seconds, left).mean(axis=0)
        starts = _rates(held, there, busy)
        orders = starts / starts.sum()
        # What each order takes of both, also where its client goes away before it is done.
        thinks = float(orders @ np.minimum(compute, left).mean(axis=0))
        sends = float(orders @ (np.minimum(upload * stretch, np.maximum(left - compute, 0))
                                / stretch).mean(axis=0))  # fmt: skip
        # Half way: the longer uploads take, the fewer of them there are.
        stretch = (stretch + _stretch(thinks, sends, float(starts @ held))) / 2
    replies = starts * success
    rate = float(replies.sum())
    if not rate > 0:
        return BufferedTime(buffer, busy, np.inf, np.full(n, 1 / n), 0.0, 0.0, 0.0, np.inf, np.inf)
    round_seconds = buffer / rate
    shares = replies / rate
    # Models that are made meanwhile, of the replies of the others that are busy.
    at_work = float(starts @ held)
    passed = np.where(done, seconds, 0.0) * rate * max(1 - 1 / at_work, 0.0) / buffer
    late = np.where(done, passed, 0.0).sum(axis=0) / np.maximum(done.sum(axis=0), 1)
    worth = np.where(done, _discount(passed, staleness), 0.0).sum(axis=0)
    worth = worth / np.maximum(done.sum(axis=0), 1)
    discount = float(shares @ worth)
    factors = profiles.phi(ranks) if phi is None else np.asarray(phi(ranks), np.float64)
    variance = float((a**2 * factors).sum()) * n / min(buffer, n)
    progress = discount * (beta - discount * variance)
    rounds = alpha / progress if progress > 0 else np.inf
    return BufferedTime(
        buffer, busy, round_seconds, shares, rate / float(starts.sum()),
        float(shares @ late), discount, rounds, rounds * round_seconds,
    )  # fmt: skip


def _stretch(thinks: float, sends: float, busy: float) -> float:
    """Return how many times as long an upload takes as alone, by mean value analysis."""
    uploads, before, stretch = 0.0, 1.0, 1.0
    for count in range(1, math.ceil(busy) + 1):
        before, stretch = stretch, 1 + uploads
        uploads = count * sends * stretch / (thinks + sends * stretch)
    part = busy - math.floor(busy) or 1.0
    return before + part * (stretch - before)


def _discount(passed: Array, power: float) -> Array:
    """Return the mean of ``(1 + s)^-a`` where ``passed`` models are made on average.

    That many come to the nearest whole numbers, since models come at nearly even intervals.
    """
    whole = np.floor(passed)
    part = passed - whole
    mean: Array = (1 - part) * (1 + whole) ** -power + part * (2 + whole) ** -power
    return mean


def _rates(held: Array, there: Array, busy: int) -> Array:
    """Return how many orders a second each client is given, shape (n,).

    Parameters
    ----------
    held : ndarray, shape (n,)
        Mean seconds of its orders, done or not, > 0.
    there : ndarray, shape (n,)
        Share of the time that it is there.
    busy : int
        C ≤ n.
    """
    if (there == 1).all():
        return _product_form(held, busy)
    if there.sum() <= busy:  # whoever is there is busy
        return there / held
    low, high = 0.0, 1 / held.min()
    while (there * high * held / (1 + high * held)).sum() < busy:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = (there * middle * held / (1 + middle * held)).sum() > busy
        low, high = (low, middle) if enough else (middle, high)
    rates: Array = there * high / (1 + high * held)
    return rates


def _product_form(held: Array, busy: int) -> Array:
    """Return the same with everybody there: ``P(busy) / held``, of the product form."""
    n = held.size
    if busy == n:
        return 1 / held
    weights = held / np.exp(np.log(held).mean())  # near 1, so that sums of products stay in range
    # Suffixes first: log e_c of the clients from i on; then prefixes join them one by one.
    after = np.full((n + 1, busy + 1), -np.inf)
    after[:, 0] = 0.0
    logs = np.log(weights)
    for i in range(n - 1, -1, -1):
        after[i, 1:] = np.logaddexp(after[i + 1, 1:], after[i + 1, :-1] + logs[i])
    before = np.full(busy + 1, -np.inf)
    before[0] = 0.0
    chance = np.empty(n)
    for i in range(n):
        without = np.logaddexp.reduce(before[:busy] + after[i + 1, busy - 1 :: -1])
        chance[i] = np.exp(without + logs[i] - after[0, busy])
        before[1:] = np.logaddexp(before[1:], before[:-1] + logs[i])
    rates: Array = chance / held
    return rates
