"""What releases gave away, as sums: to compose is to add, so that no round is reckoned twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.privacy.releases import Fixed, Gaussian, Poisson, Release, check_release

# Whole orders (for sampling without replacement, others are interpolated) and a few halves.
ORDERS = (*(1.5 + i / 2 for i in range(1, 9)), *range(6, 64), 64, 80, 96, 128, 192, 256, 512)


@dataclass(frozen=True, eq=False)
class Spent:
    """What was given away, by each of the two ways to reckon it.

    Parameters
    ----------
    information : float
        ``Σ 1/σ²``, as if nothing hid who took part.
    renyi : ndarray
        The Rényi divergence at each of ``ORDERS``.
    hidden : frozenset of str
        How those who took part were hidden, if they were: ``Fixed``, ``Poisson``.
    """

    information: float
    renyi: NDArray[np.float64]
    hidden: frozenset[str] = frozenset()

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.information + other.information,
            self.renyi + other.renyi,
            self.hidden | other.hidden,
        )

    def or_else(self, other: Spent) -> Spent:
        """Return a bound on both, for whoever has spent one of them and nobody knows which."""
        return Spent(
            max(self.information, other.information),
            np.maximum(self.renyi, other.renyi),
            self.hidden | other.hidden,
        )

    def epsilon(self, delta: float) -> float:
        """Return ε; see ``strategies.privacy.epsilon``."""
        if self.information == 0:
            return 0.0
        if math.isinf(self.information):
            return math.inf
        unsampled = gaussian_epsilon({1.0 / math.sqrt(self.information): 1.0}, delta)
        if not self.hidden:
            return unsampled
        if len(self.hidden) > 1:
            raise ValueError(
                "expected Fixed or Poisson releases, got both: their neighbours differ"
            )
        return min(unsampled, float(_package().compute_epsilon(ORDERS, self.renyi, delta)[0]))

    def state_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it, to the last bit."""
        renyi = dict(zip(map(str, ORDERS), self.renyi.tolist(), strict=True))
        return {"information": self.information, "renyi": renyi, "hidden": sorted(self.hidden)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Spent:
        """Return what ``state_dict`` was taken of."""
        renyi = np.array([state["renyi"][str(order)] for order in ORDERS], dtype=np.float64)
        return cls(float(state["information"]), renyi, frozenset(state["hidden"]))


def total(releases: Mapping[Release, int]) -> Spent:
    """Return what releases gave away, each as often as it was made.

    Raises
    ------
    ValueError
        If a number is out of range.
    ImportError
        If sampling is to be accounted for and ``dp-accounting`` is missing.
    """
    found = NOTHING
    for release, count in releases.items():
        check_release(release)
        # Whoever is never asked gives nothing away.
        if count and not (isinstance(release, Poisson) and release.rate == 0):
            one = _one(release)
            found += Spent(count * one.information, count * one.renyi, one.hidden)
    return found


@lru_cache(maxsize=1024)
def _one(release: Release) -> Spent:
    """Return what one release gives away; with sampling it takes milliseconds to find out."""
    precision = release.multiplier**2
    if precision == 0:
        return Spent(math.inf, np.full(len(ORDERS), math.inf))
    if isinstance(release, Gaussian):
        return Spent(1 / precision, np.array(ORDERS) / (2 * precision))
    package = _package()
    from dp_accounting import NeighboringRelation, dp_event

    # Multipliers here are over the true sensitivity, so they count alike for every
    # relation: dp-accounting does not double the norm for REPLACE_ONE by itself.
    event: Any = dp_event.GaussianDpEvent(release.multiplier)
    if isinstance(release, Fixed):
        relation = NeighboringRelation.REPLACE_ONE
        event = dp_event.SampledWithoutReplacementDpEvent(release.clients, release.sample, event)
    else:
        relation = NeighboringRelation.ADD_OR_REMOVE_ONE
        event = dp_event.PoissonSampledDpEvent(release.rate, event)
    accountant = package.RdpAccountant(ORDERS, relation)
    accountant.compose(event)
    return Spent(1 / precision, accountant.rdp, frozenset({type(release).__name__}))


def _package() -> Any:
    try:
        from dp_accounting import rdp
    except ImportError as error:
        raise ImportError(
            "accounting for sampling needs dp-accounting; pip install 'fedlora[privacy]'"
        ) from error
    return rdp


NOTHING = Spent(0.0, np.zeros(len(ORDERS)))


def gaussian_epsilon(chances: Mapping[float, float], delta: float) -> float:
    """Return ε of a Gaussian mechanism whose multiplier is drawn, and told.

    ``δ(ε) = Σ p_σ [Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ)]``, falling in ε. The part of the
    chances that is not given (to 1) is that nothing is released.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    sigma = np.array(list(chances))
    p: NDArray[np.float64] = np.array(list(chances.values()))

    def excess(value: float) -> float:
        """Return δ at ε = ``value``, less the one that is allowed."""
        over = log_ndtr(0.5 / sigma - value * sigma)
        under = value + log_ndtr(-0.5 / sigma - value * sigma)
        return float(p @ -(np.exp(over) * np.expm1(np.minimum(under - over, 0.0)))) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    root = brentq(excess, 0.0, high, xtol=1e-12, rtol=1e-12)
    return float(np.nextafter(root * (1 + 1e-9), math.inf))  # rounded up, never down
