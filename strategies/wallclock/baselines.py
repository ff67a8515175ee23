"""Sampling probabilities of the field: what a plan is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.wallclock.waterfill import water_fill

Array = NDArray[np.float64]


def uniform_q(n: int, expected: float) -> Array:
    """Return the same probability for each of `n` clients.

    Parameters
    ----------
    n : int
        Number of clients, ≥ 1.
    expected : float
        Expected number of participants, in (0, n].

    Returns
    -------
    ndarray, shape (n,)
        Probabilities with sum `expected`.

    Raises
    ------
    ValueError
        If `expected` is out of range.
    """
    return _proportional("weights", np.ones(n), expected, 0.0)


def weighted_q(a: ArrayLike, expected: float, *, q_min: float = 0.0) -> Array:
    """Return probabilities in proportion to the data weights, ``q ∝ a``, where that is ≤ 1.

    Parameters
    ----------
    a : array_like, shape (n,)
        Data weights, ≥ 0; their scale does not matter.
    expected : float
        Expected number of participants, in (0, n].
    q_min : float
        Least probability of a client. (default: 0)

    Returns
    -------
    ndarray, shape (n,)
        Probabilities with sum `expected`.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, or `expected` cannot be met.
    """
    return _proportional("a", a, expected, q_min)


def statistical_q(
    a: ArrayLike, gradient_norms: ArrayLike, expected: float, *, q_min: float = 0.0
) -> Array:
    """Return probabilities in proportion to the size of the updates, ``q ∝ a G``, up to 1.

    Parameters
    ----------
    a : array_like, shape (n,)
        Data weights, ≥ 0; their scale does not matter.
    gradient_norms : array_like, shape (n,)
        ``G``: norm of each client's gradient or last update, ≥ 0.
    expected : float
        Expected number of participants, in (0, n].
    q_min : float
        Least probability of a client; a norm of 0 makes it matter. (default: 0)

    Returns
    -------
    ndarray, shape (n,)
        Probabilities with sum `expected`.

    Raises
    ------
    ValueError
        If a value is negative or not finite, the shapes differ, or `expected` cannot be met.
    """
    weights, norms = np.asarray(a, np.float64), np.asarray(gradient_norms, np.float64)
    if weights.shape != norms.shape:
        raise ValueError(
            f"a and gradient_norms must have one shape, got {weights.shape} and {norms.shape}"
        )
    for name, values in (("a", weights), ("gradient_norms", norms)):
        _check(name, values)
    # Scaled apart, so that the products neither overflow nor vanish.
    scales = [max(v.max(initial=0.0), np.finfo(np.float64).tiny) for v in (weights, norms)]
    return _proportional("a · G", weights / scales[0] * (norms / scales[1]), expected, q_min)


def _proportional(name: str, weights: ArrayLike, expected: float, q_min: float) -> Array:
    values = np.asarray(weights, np.float64)
    _check(name, values)
    if not (0 <= q_min <= 1 and 0 < expected <= values.size and values.size * q_min <= expected):
        raise ValueError(
            f"expected participants must lie in ({max(0.0, values.size * q_min):g}, "
            f"{values.size}] for {values.size} clients and q_min={q_min!r}, got {expected!r}"
        )
    low, high = np.full(values.shape, q_min), np.ones(values.shape)
    return water_fill(values, expected, low, high)


def _check(name: str, values: Array) -> None:
    bad = ~(np.isfinite(values) & (values >= 0))
    if values.ndim != 1 or bad.any():
        raise ValueError(f"{name} must be a list of finite numbers ≥ 0, got {values.tolist()}")
