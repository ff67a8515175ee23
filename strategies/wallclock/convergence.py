"""How many rounds a sampling needs to reach a target loss.

With ``s = Σ a² φ / q`` the variance of the sampled update, the number of rounds has the shape
``R = α / (β − s)`` while ``β > s``. The shape is [P] from the code of a predecessor (arXiv
2402.10097); ``φ = R_max / k`` for sketched adapters, and how α and β are fitted, are [D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Pilots whose numbers of rounds differ by less than this share cannot be told apart.
_MIN_GAP = 0.05
# Beyond these the averages of a fit describe nothing: see ConvergenceEstimate.reliable.
_MAX_SPREAD = 0.5
_MAX_RESIDUAL = 0.2


def sampling_variance(q: ArrayLike, a: ArrayLike, phi: ArrayLike) -> float:
    """Return ``s = Σ a² φ / q``.

    Parameters
    ----------
    q : array_like, shape (n,)
        Probability of each client to join a round, in (0, 1].
    a : array_like, shape (n,)
        Data weights, ≥ 0, with sum 1.
    phi : array_like, shape (n,) or ()
        What compression adds to the variance of a client's update, ≥ 0 (1 = none).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If a value is out of range or the shapes do not fit.
    """
    values = np.asarray(q, np.float64), np.asarray(a, np.float64), np.asarray(phi, np.float64)
    try:
        probability, weight, factor = np.broadcast_arrays(*values)
    except ValueError:
        shapes = ", ".join(str(v.shape) for v in values)
        raise ValueError(f"q, a and phi must have one shape, got {shapes}") from None
    if not ((probability > 0) & (probability <= 1)).all():
        raise ValueError(f"every q must lie in (0, 1], got {values[0].tolist()}")
    for name, value in (("a", weight), ("phi", factor)):
        if not (np.isfinite(value) & (value >= 0)).all():
            raise ValueError(f"every {name} must be finite and ≥ 0, got {value.tolist()}")
    return float((weight**2 * factor / probability).sum())


def rounds_to_target(
    q: ArrayLike, a: ArrayLike, phi: ArrayLike, alpha: float, beta: float
) -> float:
    """Return the expected number of rounds, ``α / (β − Σ a² φ / q)``.

    The shape is [P], its constants are fitted (`estimate_convergence`).

    Parameters
    ----------
    q, a, phi : array_like, shape (n,)
        As in `sampling_variance`.
    alpha : float
        α > 0, in rounds times variance.
    beta : float
        β > 0: the sampling variance at which the target is just out of reach.

    Returns
    -------
    float
        Rounds, not rounded to a whole number.

    Raises
    ------
    ValueError
        If the variance reaches β, so that no number of rounds is enough, or a value is out of
        range.
    """
    if not (np.isfinite(alpha) and alpha > 0 and np.isfinite(beta) and beta > 0):
        raise ValueError(f"alpha and beta must be finite and > 0, got {alpha!r} and {beta!r}")
    variance = sampling_variance(q, a, phi)
    if variance >= beta:
        raise ValueError(
            f"this sampling never reaches the target: its variance Σ a² φ / q = {variance:.6g} "
            f"is not below beta = {beta:.6g}; raise q (or the ranks), or fit beta again"
        )
    return alpha / (beta - variance)


@dataclass(frozen=True)
class Pilot:
    """A short training run with a known sampling.

    Parameters
    ----------
    variance : float
        Its ``s``, from `sampling_variance`.
    losses : sequence of float
        Global loss before the first round, after one round, after two, and so on.
    """

    variance: float
    losses: Sequence[float]


@dataclass(frozen=True)
class ConvergenceEstimate:
    """α and β as fitted from pilots, and how far to trust them.

    Parameters
    ----------
    alpha, beta : float
        The constants of ``R = α / (β − s)``.
    reliable : bool
        False where the pilots could not tell, and `reason` says why.
    reason : str
        Empty if reliable.
    targets : ndarray, shape (losses,)
        The losses at which the pilots were compared.
    rounds : ndarray, shape (losses, pilots)
        Rounds each pilot needed, interpolated.
    alphas, betas : ndarray, shape (losses,)
        Estimates from each loss; NaN where it says nothing.
    spread : float
        Standard deviation of `betas` over their mean.
    residual : float
        Root mean square relative error of the rounds that the common β predicts for one pilot
        from the others.
    """

    alpha: float
    beta: float
    reliable: bool
    reason: str
    targets: Array
    rounds: Array
    alphas: Array
    betas: Array
    spread: float
    residual: float

    def summary(self) -> str:
        """Return the estimate as a few lines of text."""
        lines = [
            f"R = {self.alpha:.4g} / ({self.beta:.4g} - s), "
            + ("reliable" if self.reliable else f"NOT reliable: {self.reason}"),
            f"beta over the losses varies by {self.spread:.1%}, rounds fit to {self.residual:.1%}",
        ]
        rows = zip(self.targets, self.rounds, self.alphas, self.betas, strict=True)
        for loss, rounds, alpha, beta in rows:
            needed = ", ".join(f"{r:.1f}" for r in rounds)
            lines.append(f"  loss {loss:.4g}: rounds {needed}; alpha {alpha:.4g}, beta {beta:.4g}")
        return "\n".join(lines)


def estimate_convergence(pilots: Sequence[Pilot], n_targets: int = 10) -> ConvergenceEstimate:
    """Fit α and β to pilots that trained the same model under different sampling [D].

    For `n_targets` losses that all pilots reach, the rounds each needed are read off the running
    minimum of its curve (so a loss that jumps does no harm), with linear interpolation. Two
    pilots give ``β = (R1 s1 − R2 s2)/(R1 − R2)`` and ``α = R1 (β − s1)`` per loss; more are
    fitted by least squares in relative rounds. α and β are the means over the losses, α being
    specific to how deep these losses lie.

    Where the pilots needed (nearly) the same rounds, or the noisier one needed fewer, the data
    bound β from below only. If most losses are of that kind, the estimate is marked unreliable
    and falls back to that bound: the smallest β for which the effect of the sampling could have
    stayed hidden in a difference of 5 %, so that a planner samples rather too many clients
    than too few.

    Parameters
    ----------
    pilots : sequence of Pilot
        Two or more, with different variances.
    n_targets : int
        At how many losses to compare them. (default: 10)

    Returns
    -------
    ConvergenceEstimate

    Raises
    ------
    ValueError
        If there are fewer than two pilots, their variances are equal or impossible, a curve is
        not finite, or no loss is reached by all of them.
    """
    _check(pilots, n_targets)
    s = np.array([pilot.variance for pilot in pilots])
    curves = [np.minimum.accumulate(np.asarray(p.losses, np.float64)) for p in pilots]
    top, bottom = min(c[0] for c in curves), max(c[-1] for c in curves)
    if not bottom < top:
        raise ValueError(
            f"the pilots have no loss in common to compare: one starts at {top:.6g}, another "
            f"never gets below {bottom:.6g}; let them run longer"
        )
    targets = np.linspace(top, bottom, n_targets + 1)[1:]
    rounds = np.array([[_rounds_until(curve, loss) for curve in curves] for loss in targets])
    fits = [_fit(row, s) for row in rounds]
    alphas, betas = (np.array(column) for column in zip(*fits, strict=True))
    valid = np.isfinite(betas)
    if 2 * valid.sum() < n_targets:
        low, high = s.min(), s.max()
        beta = float(high + (high - low) / _MIN_GAP)
        reason = (
            f"at {n_targets - valid.sum()} of {n_targets} losses the rounds of the pilots do not "
            f"grow with their variance; beta is the smallest that a difference below "
            f"{_MIN_GAP:.0%} allows: repeat with variances further apart"
        )
        alpha, spread = float((rounds * (beta - s)).mean()), np.nan
    else:
        alpha, beta = float(alphas[valid].mean()), float(betas[valid].mean())
        spread, reason = float(betas[valid].std() / beta), ""
    scaled = rounds * (beta - s)  # α, as each pilot sees it: equal in a row if the shape is right
    residual = float(np.sqrt(np.mean((scaled / scaled.mean(axis=1, keepdims=True) - 1) ** 2)))
    if not reason and (beta <= s.max() or spread > _MAX_SPREAD or residual > _MAX_RESIDUAL):
        reason = (
            f"the losses disagree: beta varies by {spread:.0%}, rounds are off by {residual:.0%}"
        )
    return ConvergenceEstimate(
        alpha, beta, not reason, reason, targets, rounds, alphas, betas, spread, residual
    )


def _rounds_until(curve: Array, loss: float) -> float:
    """Return the (interpolated) round at which a falling curve reaches a loss below its start."""
    after = int(np.argmax(curve <= loss))
    if after == 0:
        return 0.0
    return after - 1 + float((curve[after - 1] - loss) / (curve[after - 1] - curve[after]))


def _fit(rounds: Array, s: Array) -> tuple[float, float]:
    """Fit ``R (β − s) / α = 1``, linear in β/α and 1/α; NaN where that means nothing."""
    if rounds.min() <= 0 or rounds.max() < (1 + _MIN_GAP) * rounds.min():
        return np.nan, np.nan
    design = np.column_stack([rounds, -rounds * s])
    (ratio, inverse), *_ = np.linalg.lstsq(design, np.ones(len(s)))
    # 1/α ≤ 0 says that more variance needs fewer rounds; β ≤ s that a pilot which did arrive
    # could not.
    if inverse <= 0 or ratio / inverse <= s.max():
        return np.nan, np.nan
    return float(1 / inverse), float(ratio / inverse)


def _check(pilots: Sequence[Pilot], n_targets: int) -> None:
    if len(pilots) < 2:
        raise ValueError(f"two pilots or more are needed to fit alpha and beta, got {len(pilots)}")
    if n_targets < 1:
        raise ValueError(f"n_targets must be ≥ 1, got {n_targets}")
    for i, pilot in enumerate(pilots):
        if not (np.isfinite(pilot.variance) and pilot.variance >= 0):
            raise ValueError(f"the variance of pilot {i} must be ≥ 0, got {pilot.variance!r}")
        curve = np.asarray(pilot.losses, np.float64)
        if curve.ndim != 1 or curve.size < 2 or not np.isfinite(curve).all():
            raise ValueError(
                f"the losses of pilot {i} must be finite, one before the first round and one "
                f"after each, at least two"
            )
    s = np.array([pilot.variance for pilot in pilots])
    if np.ptp(s) <= 1e-9 * s.max():
        raise ValueError(
            f"the pilots must differ in their variance Σ a² φ / q, all have {s[0]:.6g}: "
            f"run them with different q"
        )
