"""What a client says of its data for ``AutoRank``: three numbers, and nothing else.

The names are those of the metrics in a message; both sides and both client APIs use them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: In a config: the client is to profile its data.
PROFILE_KEY = "profile"
#: In a config: at most this many rows go through the model; 0: all.
SAMPLES_KEY = "profile-samples"

LOSS_ENTROPY = "loss-entropy"
LABEL_ENTROPY = "label-entropy"
GINI_SIMPSON = "gini-simpson"
METRICS = (LOSS_ENTROPY, LABEL_ENTROPY, GINI_SIMPSON)

# e^50 samples or classes do not exist: what is above is not an entropy.
_LIMITS = {LOSS_ENTROPY: 50.0, LABEL_ENTROPY: 50.0, GINI_SIMPSON: 1.0}


@dataclass(frozen=True)
class Profile:
    """What a client measures of its training samples; unpacks as ``losses, labels``.

    Parameters
    ----------
    losses : array_like, shape (n,)
        Of all of them, or of a seeded choice.
    labels : array_like, shape (m,)
        One a sample, or one a token.
    rows : int
        How many training samples there are, whatever was measured of them.
    """

    losses: ArrayLike
    labels: ArrayLike
    rows: int

    def __iter__(self) -> Iterator[ArrayLike]:
        yield self.losses
        yield self.labels


def profile_metrics(losses: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return the three numbers by which AutoRank (arXiv 2412.15553) compares clients.

    - ``loss-entropy``: ``−Σ_b u_b ln u_b`` with ``u_b = loss_b / Σ loss`` [R; the
      normalisation is this project's decision, D]
    - ``label-entropy``: ``−Σ_c π_c ln π_c`` over the shares of the labels [R]
    - ``gini-simpson``: ``1 − Σ_c π_c²`` [R]

    Decided here [D]: losses that are not finite or not above 0 are left out; when none is
    left, the loss entropy is 0, as it is for a single sample.

    Parameters
    ----------
    losses : array_like, shape (n,)
        Loss of each training sample, or of a seeded choice of them (``profile_rows``).
    labels : array_like, shape (m,)
        Labels of all training samples: they cost no forward pass.
    """
    loss = np.asarray(losses, dtype=np.float64).ravel()
    loss = loss[np.isfinite(loss) & (loss > 0)]
    _, counts = np.unique(np.asarray(labels).ravel(), return_counts=True)
    shares = counts / max(1, counts.sum())
    return {
        LOSS_ENTROPY: _entropy(loss / loss.max()) if loss.size else 0.0,
        LABEL_ENTROPY: _entropy(shares) if shares.size else 0.0,
        GINI_SIMPSON: max(0.0, float(1 - (shares**2).sum())) if shares.size else 0.0,
    }


def profile_rows(count: int, limit: int, seed: int) -> NDArray[np.int64]:
    """Return which of ``count`` rows go through the model: all, or a seeded ``limit`` of them."""
    if limit <= 0 or count <= limit:
        return np.arange(count)
    chosen = np.random.default_rng([seed, count]).choice(count, limit, replace=False)
    return np.sort(chosen)


def checked_profile(answer: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the three numbers of a client's answer, in the order of ``METRICS``.

    Raises
    ------
    ValueError
        If one is missing, no number, not finite, negative or larger than it can be.
    """
    found = []
    for key in METRICS:
        value = answer.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} is {value!r}, expected a number" if key in answer
                             else f"{key} is missing")  # fmt: skip
        if not (math.isfinite(value) and 0 <= value <= _LIMITS[key]):
            raise ValueError(f"{key} is {value!r}, expected 0 to {_LIMITS[key]:g}")
        found.append(float(value))
    return found[0], found[1], found[2]


def _entropy(masses: NDArray[np.float64]) -> float:
    shares = masses / masses.sum()
    shares = shares[shares > 0]  # 0 · ln 0 = 0
    return max(0.0, float(-(shares * np.log(shares)).sum()))
