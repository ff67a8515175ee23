"""Many criteria into one score (CRITIC, TOPSIS), and scores into LoRA ranks.

AutoRank (arXiv 2412.15553) weighs a few scalars per client with CRITIC, scores the clients
with TOPSIS and maps the scores to ranks. TOPSIS is as in the authors' code [P]; that CRITIC
is used is [R], and it is implemented after its standard definition (Diakoulaki, Mavrotas and
Papayannakis, 1995); the map to ranks is min-max [R], linear and rounded [D]; all rules for
degenerate input are [D].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.wallclock.waterfill import water_fill

Array = NDArray[np.float64]
Ranks = NDArray[np.int64]

# Differences below this share of the size of the numbers are rounding noise: min-max
# scaling would blow them up to the whole of [0, 1].
_NOISE = 1e-12


def critic_weights(x: ArrayLike) -> Array:
    """Weigh criteria by how much they vary and how little they agree (CRITIC).

    With ``z`` the min-max scaled columns, ``σ_j`` their standard deviations and ``ρ`` their
    Pearson correlations, ``w_j ∝ σ_j Σ_l (1 − ρ_jl)``.

    That AutoRank uses CRITIC is [R]; the formula is the standard definition. Decided here
    [D]: a constant column (to 1e-12 of its size) weighs 0 and is left out of the
    correlations; when no information is left to compare (all columns constant, or the varying
    ones agree perfectly, as a single one does with itself) the weights are equal over all, or
    over the varying columns.

    Parameters
    ----------
    x : array_like, shape (n_clients, n_criteria)
        One row a client, one column a criterion; larger is better in every column.

    Returns
    -------
    ndarray, shape (n_criteria,)
        Weights ≥ 0 with sum 1.

    Raises
    ------
    ValueError
        If `x` is not a matrix, is empty, or holds a value that is not finite.
    """
    x = _scaled(x)
    spread = np.ptp(x, axis=0)
    varies = spread > 0
    weights: Array = np.zeros(x.shape[1])
    if not varies.any():
        return np.full_like(weights, 1 / weights.size)
    z = (x[:, varies] - x[:, varies].min(axis=0)) / spread[varies]
    centred = z - z.mean(axis=0)
    deviation = np.sqrt((centred**2).mean(axis=0))
    unit = centred / (deviation * np.sqrt(len(z)))
    disagreement = 1 - unit.T @ unit
    disagreement[disagreement < _NOISE] = 0
    information = deviation * disagreement.sum(axis=0)
    if not information.any():
        information = np.ones_like(information)
    weights[varies] = information / information.sum()
    return weights


def topsis_scores(x: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Score clients by their closeness to the ideal client (TOPSIS).

    Columns are divided by their Euclidean norm and multiplied by the weights; with ``d⁺`` and
    ``d⁻`` the distances to the best and to the worst value of every column, the score is
    ``d⁻ / (d⁺ + d⁻)``: as in the AutoRank authors' code [P]. Where all clients are equal, or
    there is only one, every score is 0.5, the middle [D].

    Parameters
    ----------
    x : array_like, shape (n_clients, n_criteria)
        One row a client, one column a criterion; larger is better in every column.
    weights : array_like, shape (n_criteria,), optional
        Weights ≥ 0, not all 0; their scale does not matter. (default: `critic_weights` of `x`)

    Returns
    -------
    ndarray, shape (n_clients,)
        Scores in [0, 1], larger = closer to the ideal.

    Raises
    ------
    ValueError
        If `x` is not a finite, non-empty matrix or `weights` do not fit it.
    """
    x = _scaled(x)
    w = critic_weights(x) if weights is None else _checked_weights(weights, x.shape[1])
    norm = np.sqrt((x**2).sum(axis=0))
    y = x / np.where(norm > 0, norm, 1) * w
    best, worst = y.max(axis=0), y.min(axis=0)
    scale = (best - worst).max()
    if scale == 0:
        return np.full(len(x), 0.5)
    # In units of the widest gap: the squares of tiny weights must not underflow to "all equal".
    to_best = np.linalg.norm((best - y) / scale, axis=1)
    to_worst = np.linalg.norm((y - worst) / scale, axis=1)
    scores: Array = to_worst / (to_best + to_worst)
    return scores


def scores_to_ranks(
    scores: ArrayLike, min_rank: int, max_rank: int, caps: ArrayLike | None = None
) -> Ranks:
    """Map scores linearly to ranks: the lowest to `min_rank`, the highest to `max_rank`.

    ``r = round(min + (C − min C)/(max C − min C) · (max − min))``. Min-max is [R]; that the
    map is linear, that halves round up and that equal scores give the middle rank is [D].

    Parameters
    ----------
    scores : array_like, shape (n_clients,)
        Finite scores, larger = more rank.
    min_rank, max_rank : int
        The range of ranks, ``1 ≤ min_rank ≤ max_rank``.
    caps : array_like of int, shape (n_clients,), optional
        The largest rank each device can hold, ≥ 1. It wins over `min_rank`. (default: none)

    Returns
    -------
    ndarray of int, shape (n_clients,)

    Raises
    ------
    ValueError
        If an argument is out of range or the shapes disagree.
    """
    values = _checked_scores(scores)
    _, high = _limits(len(values), min_rank, max_rank, caps)
    if values.size == 0:
        return np.zeros(0, dtype=np.int64)
    size = max(np.abs(values).max(), np.finfo(np.float64).tiny)
    values = values / size
    spread = np.ptp(values)
    place = (values - values.min()) / spread if spread > _NOISE else np.full(len(values), 0.5)
    ranks = np.floor(min_rank + place * (max_rank - min_rank) + 0.5).astype(np.int64)
    return np.minimum(ranks, high)


def ranks_for_budget(
    scores: ArrayLike, total: int, min_rank: int, max_rank: int, caps: ArrayLike | None = None
) -> Ranks:
    """Divide a total of rank over the clients in the proportions of their scores [D].

    Water-filling finds real ranks ``clip(level · score, min, max)`` with the right sum; they
    are rounded down and the rest goes to the largest remainders (ties: the higher score, then
    the first client). Where the limits are equal, a higher score never gets a smaller rank.

    Parameters
    ----------
    scores : array_like, shape (n_clients,)
        Finite scores ≥ 0. Clients of score 0 get more than the minimum only when all others
        are full; if all are 0 the division is equal.
    total : int
        The sum of all ranks.
    min_rank, max_rank : int
        The range of ranks, ``1 ≤ min_rank ≤ max_rank``.
    caps : array_like of int, shape (n_clients,), optional
        The largest rank each device can hold, ≥ 1. It wins over `min_rank`. (default: none)

    Returns
    -------
    ndarray of int, shape (n_clients,)
        Ranks whose sum is exactly `total`.

    Raises
    ------
    ValueError
        If no ranks within the limits have this sum, a score is negative, or an argument is
        out of range.
    """
    values = _checked_scores(scores)
    if (values < 0).any():
        client = int(np.argmax(values < 0))
        raise ValueError(
            f"scores must be ≥ 0 to share a budget, got {values[client]} for client {client}"
        )
    low, high = _limits(len(values), min_rank, max_rank, caps)
    if not low.sum() <= total <= high.sum() or total != int(total):
        raise ValueError(
            f"a total rank of {total!r} cannot be divided over {len(values)} clients: their limits "
            f"(min_rank={min_rank}, max_rank={max_rank}, caps) allow whole numbers from "
            f"{low.sum()} to {high.sum()}"
        )
    if values.size == 0:
        return low
    exact = water_fill(values, float(total), low.astype(np.float64), high.astype(np.float64))
    exact = exact.round(9)  # 2.9999999999 is 3, not 2 and a large remainder
    ranks = np.floor(exact).astype(np.int64)
    order = np.lexsort((np.arange(len(values)), -values, ranks - exact))
    ranks[order[: int(total) - int(ranks.sum())]] += 1
    return ranks


def _scaled(x: ArrayLike) -> Array:
    """Check `x` and divide its columns by their largest magnitude (so 1e300 can be squared)."""
    matrix = np.asarray(x, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"expected a matrix (n_clients, n_criteria) with at least one of each, "
            f"got shape {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(
            f"criteria must be finite, got {matrix[row, column]} "
            f"at row (client) {row}, column (criterion) {column}"
        )
    size = np.abs(matrix).max(axis=0)
    scaled: Array = matrix / np.where(size > 0, size, 1)
    constant = np.ptp(scaled, axis=0) <= _NOISE
    scaled[:, constant] = scaled[0, constant]
    return scaled


def _checked_weights(weights: ArrayLike, n_criteria: int) -> Array:
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (n_criteria,):
        raise ValueError(f"expected {n_criteria} weights, one a criterion, got shape {w.shape}")
    if not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise ValueError(f"weights must be finite, ≥ 0 and not all 0, got {w.tolist()}")
    scaled: Array = w / w.max()
    return scaled


def _checked_scores(scores: ArrayLike) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"expected one score a client, got shape {values.shape}")
    if not np.isfinite(values).all():
        client = int(np.argmax(~np.isfinite(values)))
        raise ValueError(f"scores must be finite, got {values[client]} for client {client}")
    return values


def _limits(
    n_clients: int, min_rank: int, max_rank: int, caps: ArrayLike | None
) -> tuple[Ranks, Ranks]:
    """Return the smallest and the largest rank of each client."""
    if not 1 <= min_rank <= max_rank:
        raise ValueError(
            f"expected 1 ≤ min_rank ≤ max_rank, got min_rank={min_rank}, max_rank={max_rank}"
        )
    high = np.full(n_clients, max_rank, dtype=np.int64)
    if caps is not None:
        limit = np.asarray(caps)
        if limit.shape != (n_clients,) or not np.issubdtype(limit.dtype, np.integer):
            raise ValueError(
                f"caps must be {n_clients} integers, one a client, "
                f"got shape {limit.shape} of {limit.dtype}"
            )
        if (limit < 1).any():
            client = int(np.argmax(limit < 1))
            raise ValueError(f"client {client} can hold no rank: its cap is {limit[client]}")
        high = np.minimum(high, limit.astype(np.int64))
    return np.minimum(min_rank, high), high
