"""Water-filling: divide a total in given proportions between per-item limits."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Weights below this share of the largest count as zero: ``high / weight`` must not overflow.
_NEGLIGIBLE = 1e-15


def water_fill(weights: Array, total: float, low: Array, high: Array) -> Array:
    """Return ``x = clip(level · weights, low, high)`` with ``Σ x = total``.

    The sum is piecewise linear in the level, so the level is found exactly between two of its
    breakpoints, not by iteration. Items of weight zero stay at ``low`` until all others are
    full; what is then left is levelled over them equally.

    Parameters
    ----------
    weights : ndarray, shape (n,)
        Proportions, finite and ≥ 0; their scale does not matter.
    total : float
        What to divide. Outside ``[Σ low, Σ high]`` the nearer limit is returned.
    low, high : ndarray, shape (n,)
        Limits of each item, ``0 ≤ low ≤ high``.

    Returns
    -------
    ndarray, shape (n,)
    """
    if total >= high.sum():
        return high.copy()
    if total <= low.sum():
        return low.copy()
    active = weights > _NEGLIGIBLE * weights.max()
    if not active.any():
        weights, active = np.ones_like(weights), np.ones_like(active)
    filled = np.where(active, high, low)
    if filled.sum() < total:
        rest = ~active
        left = total - high[active].sum()
        filled[rest] = water_fill(np.ones(rest.sum()), left, low[rest], high[rest])
        return filled
    share = np.where(active, weights / weights.max(), 0.0)
    levels = np.unique(np.concatenate([low[active] / share[active], high[active] / share[active]]))

    def at(level: float) -> Array:
        return np.clip(level * share, low, high)

    upper = bisect_left(levels, total, lo=1, hi=len(levels) - 1, key=lambda level: at(level).sum())
    start, end = at(levels[upper - 1]), at(levels[upper])
    step = (total - start.sum()) / (end.sum() - start.sum())
    result: Array = start + min(step, 1.0) * (end - start)
    return result
