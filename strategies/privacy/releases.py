"""What a round gives away of a client, in the terms that accounting has for it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gaussian:
    """A release without secrecy of who takes part.

    Parameters
    ----------
    multiplier : float
        Standard deviation of the noise over the sensitivity.
    """

    multiplier: float


@dataclass(frozen=True)
class Fixed:
    """A release about ``sample`` of ``clients``, drawn in secret without replacement.

    Parameters
    ----------
    multiplier : float
        Standard deviation of the noise over the sensitivity to *replacing* one client,
        which is twice the norm it is clipped to.
    clients, sample : int
    """

    multiplier: float
    clients: int
    sample: int


@dataclass(frozen=True)
class Poisson:
    """A release about clients of whom each joined by a secret coin of its own.

    Parameters
    ----------
    multiplier : float
        Standard deviation of the noise, the same whoever joins, over the sensitivity to
        *removing* the client in question, which is its weight times the norm.
    rate : float
        Its probability to join.
    """

    multiplier: float
    rate: float


Release = Gaussian | Fixed | Poisson


def check_delta(delta: float) -> None:
    """Refuse a δ outside (0, 1)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta!r}")


def check_release(release: Release) -> None:
    """Refuse a release whose numbers are out of range."""
    if not (math.isfinite(release.multiplier) and release.multiplier >= 0):
        raise ValueError(
            f"noise multiplier: expected a finite number of 0 or more, got {release.multiplier!r}"
        )
    if isinstance(release, Poisson) and not 0 <= release.rate <= 1:
        raise ValueError(f"probability: expected 0 to 1, got {release.rate!r}")
    if isinstance(release, Fixed) and not 1 <= release.sample <= release.clients:
        raise ValueError(
            f"sample: expected 1 to the number of clients ({release.clients}), "
            f"got {release.sample!r}"
        )
