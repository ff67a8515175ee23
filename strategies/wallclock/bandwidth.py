"""The time of one round when its participants share a band.

A participant computes for ``τ`` seconds and then uploads over its share ``f`` of the band for
``t / f`` seconds, with ``t`` the upload time at one unit of bandwidth. The server waits for the
last one. That the best shares let all finish together, ``f = t / (T − τ)``, is derived and
checked [derived, checked]; units are free as long as they agree (seconds, Hz, seconds·Hz).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Bandwidth = Literal["optimal", "equal"]

_RELATIVE_ERROR = 1e-13
_MAX_STEPS = 200


def allocate_bandwidth(
    compute_seconds: ArrayLike,
    upload_seconds_at_unit_bandwidth: ArrayLike,
    total_bandwidth: float,
) -> tuple[Array, float]:
    """Share the band so that the round is as short as possible.

    The round time ``T`` solves ``Σ t / (T − τ) = total_bandwidth`` and the shares are
    ``t / (T − τ)``: all who upload finish together [derived, checked].

    Parameters
    ----------
    compute_seconds : array_like, shape (n,)
        ``τ``: seconds each participant computes before it uploads, ≥ 0.
    upload_seconds_at_unit_bandwidth : array_like, shape (n,)
        ``t``: seconds each upload would take at bandwidth 1, ≥ 0 (bits / spectral efficiency).
    total_bandwidth : float
        The band to share, > 0, in the unit that `upload_seconds_at_unit_bandwidth` assumes.

    Returns
    -------
    shares : ndarray, shape (n,)
        Bandwidth of each participant; the sum is `total_bandwidth` if anyone uploads at all.
        Where somebody without upload computes longest, all others merely have to be ready by
        then, and the slack is shared in proportion.
    seconds : float
        The time of the round; 0 without participants.

    Raises
    ------
    ValueError
        If a value is negative or not finite, the shapes differ, or there is no bandwidth.
    """
    tau, upload = _checked(compute_seconds, upload_seconds_at_unit_bandwidth, total_bandwidth)
    if tau.size == 0:
        return tau, 0.0
    sends = upload > 0
    shares = np.zeros_like(upload)
    if not sends.any():
        return shares, float(tau.max())
    start = tau[sends].max()
    lag = start - tau[sends]
    wait = _wait(lag[None], upload[None, sends] / total_bandwidth)[0]
    # τ and T may be large beside T − τ: their difference is known better than they are.
    shares[sends] = upload[sends] / (wait + lag)
    shares *= total_bandwidth / shares.sum()
    return shares, float(max(start + wait, tau.max()))


def equal_shares(
    compute_seconds: ArrayLike,
    upload_seconds_at_unit_bandwidth: ArrayLike,
    total_bandwidth: float,
) -> tuple[Array, float]:
    """Give every participant the same share: the baseline to `allocate_bandwidth`.

    Parameters, results and errors are those of `allocate_bandwidth`.
    """
    tau, upload = _checked(compute_seconds, upload_seconds_at_unit_bandwidth, total_bandwidth)
    shares = np.full_like(upload, total_bandwidth / max(upload.size, 1))
    return shares, simulate_round_time(tau, upload, shares)[0]


def simulate_round_time(
    compute_seconds: ArrayLike,
    upload_seconds_at_unit_bandwidth: ArrayLike,
    shares: ArrayLike,
    participants: ArrayLike | None = None,
) -> tuple[float, int | None]:
    """Return how long a round takes under given shares, and who is last.

    Parameters
    ----------
    compute_seconds, upload_seconds_at_unit_bandwidth : array_like, shape (n,)
        As in `allocate_bandwidth`; the shares may have been chosen for other values (yesterday's
        channel).
    shares : array_like, shape (n,)
        Bandwidth of each client, ≥ 0. Without a share an upload never ends.
    participants : array_like of bool, shape (n,), optional
        Who takes part in this round. (default: all)

    Returns
    -------
    seconds : float
        The time of the round: 0 without participants, inf if an upload has no bandwidth.
    bottleneck : int or None
        Index of the (first) participant that finishes last; None without participants.

    Raises
    ------
    ValueError
        If a value is negative or not finite, or the shapes differ.
    """
    tau, upload = _checked(compute_seconds, upload_seconds_at_unit_bandwidth, 1.0)
    width = np.asarray(shares, dtype=np.float64)
    _check_values("shares", width)
    present = np.ones(tau.shape, bool) if participants is None else np.asarray(participants)
    if width.shape != tau.shape or present.shape != tau.shape or present.dtype != np.bool_:
        raise ValueError(
            f"expected {tau.size} shares and a boolean mask of {tau.size} participants, got "
            f"shapes {width.shape} and {present.shape} ({present.dtype})"
        )
    if not present.any():
        return 0.0, None
    sending = np.divide(upload, width, out=np.full_like(upload, np.inf), where=width > 0)
    finish = np.where(present, tau + np.where(upload > 0, sending, 0.0), -np.inf)
    last = int(finish.argmax())
    return float(finish[last]), last


def batch_round_seconds(
    compute_seconds: Array, upload_seconds: Array, masks: Mask, *, idle_seconds: float = 0.0
) -> Array:
    """Return the optimal round time of many sets of participants at once.

    The fast path of the planner: nothing is checked, everything is vectorised.

    Parameters
    ----------
    compute_seconds : ndarray, shape (n,) or (sets, n)
        ``τ`` of every client.
    upload_seconds : ndarray, shape (n,) or (sets, n)
        Upload time of every client alone on the whole band, ``t / total_bandwidth``.
    masks : ndarray of bool, shape (sets, n)
        Who takes part.
    idle_seconds : float
        The time of a round in which nobody takes part. (default: 0)

    Returns
    -------
    ndarray, shape (sets,)
        Seconds of each round.
    """
    counts = masks.sum(axis=1)
    width = int(counts.max(initial=0))
    if width == 0:
        return np.full(len(masks), idle_seconds)
    tau = np.broadcast_to(compute_seconds, masks.shape)
    upload = np.broadcast_to(upload_seconds, masks.shape)
    if width < 0.7 * masks.shape[1]:
        # Only as wide as the largest set: most columns would be idle.
        packed = np.arange(width) < counts[:, None]
        wide = (tau[masks], upload[masks])
        tau, upload = np.zeros(packed.shape), np.zeros(packed.shape)
        tau[packed], upload[packed] = wide
        masks = packed
    upload = np.where(masks, upload, 0.0)
    sends = upload > 0
    start = np.where(sends, tau, 0.0).max(axis=1)
    lag = np.where(sends, start[:, None] - tau, 1.0)
    seconds: Array = np.maximum(start + _wait(lag, upload), np.where(masks, tau, 0.0).max(axis=1))
    return np.where(masks.any(axis=1), seconds, idle_seconds)


def without_whom_soonest(compute_seconds: Array, upload_seconds: Array) -> int:
    """Return the place of the client without whom the others would be done soonest.

    With optimal shares all finish together, so that who is last says nothing.

    Parameters
    ----------
    compute_seconds : ndarray, shape (n,)
        n ≥ 1.
    upload_seconds : ndarray, shape (n,)
        Of each alone on the whole band.
    """
    sends = upload_seconds > 0
    mine = np.arange(compute_seconds.size)

    def without(client: int) -> float:
        masks = (mine != client)[None]
        return float(batch_round_seconds(compute_seconds, upload_seconds, masks)[0])

    # Who computes longest, of all and of those who upload, is tried by itself: without it the
    # others may be done before it would be ready.
    slowest = int(np.where(sends, compute_seconds, -1.0).argmax())
    found = {i: without(i) for i in {0, int(compute_seconds.argmax()), slowest}}
    # Without another one, i, they are done when all shares but its own, u/(T - τ), fit into the
    # band: soonest for whose share is largest just then. Every step is to an earlier T.
    rest = sends & (mine != slowest)
    everybody = np.ones((1, mine.size), bool)
    seconds = float(batch_round_seconds(compute_seconds, upload_seconds, everybody)[0])
    while rest.any():
        left = np.maximum(seconds - compute_seconds, np.finfo(np.float64).tiny)
        client = int(np.where(rest, upload_seconds / left, -1.0).argmax())
        if client in found and found[client] >= seconds:
            break
        found[client] = without(client)
        if found[client] >= seconds:
            break
        seconds = found[client]
    return min(found, key=lambda client: (found[client], client))


def _wait(lag: Array, upload: Array) -> Array:
    """Solve ``Σ upload / (u + lag) = 1`` for ``u > 0`` in every row; 0 in rows without upload.

    ``1 / Σ`` is concave and rises with ``u`` (a parallel connection), so Newton's method on it
    climbs from any point below the root without overshooting: it needs no bracket, and about
    six steps. The start is the largest lower bound that one term alone gives.
    """
    u: Array = np.maximum((upload - lag).max(axis=1), 0.0)
    # Rows whose slowest computer uploads nothing measurable could start at a pole.
    u = np.maximum(u, np.finfo(np.float64).tiny)
    for _ in range(_MAX_STEPS):
        gap = u[:, None] + lag
        terms = upload / gap
        total = terms.sum(axis=1)
        slope = (terms / gap).sum(axis=1)
        step = np.divide((total - 1) * total, slope, out=np.zeros_like(u), where=slope > 0)
        u = np.maximum(u + step, np.finfo(np.float64).tiny)
        if (step <= _RELATIVE_ERROR * u).all():  # a step back can only be rounding
            break
    return np.where(upload.any(axis=1), u, 0.0)


def _checked(compute: ArrayLike, upload: ArrayLike, total: float) -> tuple[Array, Array]:
    tau = np.asarray(compute, dtype=np.float64)
    t = np.asarray(upload, dtype=np.float64)
    if tau.ndim != 1 or tau.shape != t.shape:
        raise ValueError(
            f"compute_seconds and upload_seconds_at_unit_bandwidth must be two equally long "
            f"lists, got shapes {tau.shape} and {t.shape}"
        )
    _check_values("compute_seconds", tau)
    _check_values("upload_seconds_at_unit_bandwidth", t)
    if not (np.isfinite(total) and total > 0):
        raise ValueError(f"total_bandwidth must be finite and > 0, got {total!r}")
    return tau, t


def _check_values(name: str, values: Array) -> None:
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        client = int(np.argmax(bad))
        raise ValueError(f"{name} must be finite and ≥ 0, got {values[client]} for client {client}")
