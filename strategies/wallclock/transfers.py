"""What of a reply's way is the same for everybody, and what each byte of it takes [D].

A reply is on its way for ``fixed + byte_seconds · bytes`` seconds: pauses of polling and the start
of a process are alike for all nodes and are pooled over them, the link is each node's own. Both are
fitted by least absolute deviations, so that a single late reply moves neither: for a given
``fixed`` the best ``byte_seconds`` is a weighted median of ``(seconds − fixed) / bytes``, and what
is left is convex in ``fixed``. Newer replies weigh a little more. Where a client's two newest both
took longer, or both less, than noise can explain, its link has changed, and all before them is
forgotten; one late reply moves nothing.

The intervals are asymptotic ones for normal errors, 90 %. Where a node's bytes never differ, the
two parts cannot be told apart, and the intervals say so by their width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
End = Literal["low", "high"]

MEMORY = 16  # replies of a client that are looked at
GRID = 33  # values of ``fixed`` that are tried at once; twice
NOISE = 0.3  # seconds, of pauses between 0 and 1: where nothing is left to tell by
LEAST_NOISE = 0.05  # seconds: replies are looked for ten times a second
CHANGED = 2.0, 0.25  # deviations, and share of what was expected: beyond both it has changed
TELLING = 0.25  # of the bytes of a transfer: how many tell how long it takes
WORD = 0.1  # of the empty answers, in replies: for where these say nothing
Z = 1.645  # standard errors either way
MEDIAN_ERROR = 1.2533  # of a median, beside that of a mean
RISE = 1.70  # of the sum of absolute errors, in their deviation: χ²(0.9) / (4 φ(0))


@dataclass(frozen=True)
class Estimate:
    """A number of which more than its value is known.

    Parameters
    ----------
    value : float
    low, high : float
        Ends of its 90 % interval.
    """

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """Return it in another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def at(self, end: End) -> Estimate:
        """Return one end of its interval as its value."""
        return replace(self, value=self.low if end == "low" else self.high)


@dataclass(frozen=True)
class Fit:
    """What transfers say together.

    Parameters
    ----------
    fixed : Estimate
        Seconds of every reply, whatever its size.
    byte_seconds : Mapping[int, Estimate]
        Seconds of each byte, by client.
    """

    fixed: Estimate
    byte_seconds: Mapping[int, Estimate]

    def at(self, end: End) -> Fit:
        """Return it with everything at one end of its interval."""
        return Fit(self.fixed.at(end), {i: e.at(end) for i, e in self.byte_seconds.items()})


class Transfers:
    """The last replies of every client, and what they say together.

    Parameters
    ----------
    smoothing : float
        In (0, 1]: each older reply of a client weighs ``1 − smoothing`` of the one after it.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self._seen: dict[int, deque[tuple[float, float]]] = {}
        self._empty: list[float] = []
        self._fit: Fit | None = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    def add(self, client: int, nbytes: float, seconds: float) -> None:
        """Note that a reply of ``nbytes`` was on its way for ``seconds``."""
        self._seen.setdefault(client, deque(maxlen=MEMORY)).append((nbytes, max(seconds, 0.0)))
        self._fit = None

    def add_empty(self, seconds: Sequence[float]) -> None:
        """Note how long answers without content took, those of every node at once.

        They may also have done some work and fetched the app; so the lower quarter is believed, and
        only as far as replies with content leave it open.
        """
        self._empty, self._fit = list(seconds), None

    def fit(self) -> Fit:
        """Return what the replies say together; zeros without any.

        What was before a change of a link is forgotten here.
        """
        if self._fit is None:
            fit, changed = self._fitted()
            while changed:  # until nothing is left to forget: a resumed run finds the same
                for client in changed:
                    self._seen[client] = deque(list(self._seen[client])[-2:], maxlen=MEMORY)
                fit, changed = self._fitted()
            self._fit = fit
        return self._fit

    def told(self, nbytes: Mapping[int, float]) -> Fit:
        """Return what replies say of those alone who sent enough of what they are to send now.

        A few bytes take as long as noise lets them: that says next to nothing of many.
        """
        fit = self.fit()
        most = {client: max(pair[0] for pair in own) for client, own in self._seen.items()}
        known = {i: e for i, e in fit.byte_seconds.items() if most[i] >= TELLING * nbytes.get(i, 0)}
        return replace(fit, byte_seconds=known)

    def _fitted(self) -> tuple[Fit, list[int]]:
        """Return the fit, and the clients whose two newest replies it does not explain."""
        if not self._seen:
            return Fit(Estimate(0.0, 0.0, 0.0), {}), []
        clients = sorted(self._seen)
        shape = len(clients), max(len(self._seen[c]) for c in clients)
        x, y, w = (np.zeros(shape) for _ in range(3))
        for row, client in enumerate(clients):
            seen = np.array(self._seen[client])[::-1]  # the newest first
            n = len(seen)
            x[row, :n], y[row, :n] = seen.T
            w[row, :n] = (1 - self.smoothing) ** np.arange(n)
        there = w > 0
        prior = float(np.quantile(self._empty, 0.25)) if self._empty else 0.0

        def lost(fixed: Array) -> Array:
            slopes = _slopes(x, y, w, fixed)
            errors = np.abs(y - fixed[:, None, None] - slopes[:, :, None] * x)
            return np.asarray((w * errors).sum(axis=(1, 2)))

        top = float(np.quantile(y[there], 0.5))  # half of them took longer, bytes or not
        tried = np.linspace(0.0, max(top, 1e-9), GRID)
        sums = lost(tried)
        best = int((sums + WORD * np.abs(tried - prior)).argmin())
        near = np.linspace(tried[max(best - 1, 0)], tried[min(best + 1, GRID - 1)], GRID)
        tried, order = np.unique(np.concatenate([tried, near]), return_index=True)
        sums = np.concatenate([sums, lost(near)])[order]
        best = int((sums + WORD * np.abs(tried - prior)).argmin())
        fixed = float(tried[best])
        slope = _slopes(x, y, w, tried[best : best + 1])[0]
        expected = fixed + slope[:, None] * x
        errors = np.where(there, y - expected, 0.0)
        noise = _noise(np.abs(errors[there]), len(clients) + 1)
        within = tried[sums <= sums[best] + RISE * noise]
        low, high = float(within.min()), float(within.max())
        # The less is fixed, the more a byte takes.
        most, least = _slopes(x, y, w, np.array([low, high]))
        mass = np.maximum((w * x * x).sum(axis=1), 1e-300)
        error = Z * MEDIAN_ERROR * noise * np.sqrt((w * w * x * x).sum(axis=1)) / mass
        byte_seconds = {
            client: Estimate(
                float(slope[i]), max(float(least[i] - error[i]), 0.0), float(most[i] + error[i])
            )
            for i, client in enumerate(clients)
            if x[i].any()
        }
        deviations, share = CHANGED
        beyond = np.abs(errors) > np.maximum(deviations * noise, share * expected)
        beyond &= np.sign(errors) == np.sign(errors[:, :1])
        older = there[:, 2:].any(axis=1)  # what there is to forget
        changed = [clients[i] for i in np.flatnonzero(beyond[:, :2].all(axis=1) & older)]
        return Fit(Estimate(fixed, low, high), byte_seconds), changed

    def state_dict(self) -> dict[str, Any]:
        """Return the replies, as JSON can hold them."""
        return {
            "seen": {
                str(client): [list(pair) for pair in own] for client, own in self._seen.items()
            },
            "empty": self._empty,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._seen = {
            int(client): deque(((float(b), float(s)) for b, s in own), maxlen=MEMORY)
            for client, own in state["seen"].items()
        }
        self._empty, self._fit = [float(s) for s in state["empty"]], None


def _slopes(x: Array, y: Array, w: Array, fixed: Array) -> Array:
    """Return the best seconds of a byte, ≥ 0, for each value of ``fixed`` and each client.

    ``Σ w |y − f − s x|`` is least where s is the median of ``(y − f) / x``, weighted by ``w x``.
    """
    ratio = np.divide(
        y - fixed[:, None, None], x, out=np.zeros((len(fixed), *x.shape)), where=x > 0
    )
    weight = np.broadcast_to(w * x, ratio.shape)
    order = ratio.argsort(axis=2)
    ratio = np.take_along_axis(ratio, order, axis=2)
    sums = np.take_along_axis(weight, order, axis=2).cumsum(axis=2)
    half = (sums >= sums[:, :, -1:] / 2 * (1 - 1e-12)).argmax(axis=2)
    found: Array = np.take_along_axis(ratio, half[:, :, None], axis=2)[:, :, 0]
    return np.maximum(found, 0.0)


def _noise(errors: Array, fitted: int) -> float:
    """Return the deviation of errors of which as many as were fitted are zero by themselves."""
    left = np.sort(errors)[fitted:]
    if left.size < 3:
        return NOISE
    return max(float(1.4826 * np.median(left)), LEAST_NOISE)
