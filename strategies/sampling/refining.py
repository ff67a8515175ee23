"""How much sampling slows a run down, learned from the run's own losses as it goes [D]."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.sampling.base import Array

# Fewer steps between known losses say nothing, and older ones are of another training.
_FEWEST, _MOST = 10, 60
# What is learned may move 1/(β − s) by so much at most, so that bad luck does little harm.
_TRUST = 4.0


class Refining:
    """The book of a run that began with a guess of β.

    A round's progress is ``(β − x)/α`` with ``x`` the variance of its draw: of who really joined,
    whose mean over the draws is ``s = Σ a² φ / q``. So lucky rounds of one plan tell what pilots
    tell, and cost nothing: the losses' steps are regressed on ``x``, relative to their own smooth
    trend, beside the joined weight ``Σ a I / q``, which is the length of the step.

    The slope ``1/(β − s)`` has a prior about the guess, as wide as it is large, and the noise is
    what the steps vary by. Losses vary much and ``x`` little, so the guess moves only where
    sampling costs very many rounds; it moves by a factor of four at most.

    Parameters
    ----------
    beta : float (default: 1.0)
        The guess.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta
        self._losses: dict[int, float] = {}
        self._draws: dict[int, tuple[float, float]] = {}  # by round: x, and the joined weight

    def learn_draw(
        self, server_round: int, a: Array, q: Array, phi: Array, joined: NDArray[np.bool_]
    ) -> None:
        """Take who joined a round.

        Parameters
        ----------
        server_round : int
        a, q, phi : ndarray, shape (n,)
            Data weights, probabilities, and variance factors of sketches.
        joined : ndarray of bool, shape (n,)
        """
        # E ‖(I/q) C g − g‖² over sketches C, for gradients g of one length; and a² for s itself.
        spread = np.where(joined, phi / q**2 - 2 / q, 0.0) + 2.0
        self._draws[server_round] = float((a**2 * spread).sum()), float((a / q)[joined].sum())
        for old in [r for r in self._draws if r < server_round - _MOST]:
            del self._draws[old]
            self._losses.pop(old - 1, None)

    def learn_loss(self, server_round: int, loss: float) -> None:
        """Take the global loss after a round, or at the start: always of one kind."""
        if math.isfinite(loss):
            self._losses[server_round] = float(loss)

    def estimate(self) -> float:
        """Return β as far as it is known: the guess, until losses say otherwise."""
        steps, trend, excess, weight, mean = self._steps()
        prior = self.beta - mean
        if len(steps) < _FEWEST or not prior > 0:
            return self.beta
        design = trend[:, None] * np.column_stack([weight, -excess])
        expected, precision = np.array([1.0, 1 / prior]), np.diag([1.0, prior**2])
        noise = float(np.mean((steps - trend - design @ expected) ** 2))
        if not noise > 0:
            return self.beta
        _, slope = np.linalg.solve(
            design.T @ design / noise + precision,
            design.T @ (steps - trend) / noise + precision @ expected,
        )
        return mean + 1 / float(np.clip(slope, 1 / prior / _TRUST, _TRUST / prior))

    def _steps(self) -> tuple[Array, Array, Array, Array, float]:
        """Return the steps of the loss, what is usual there, ``x − x̄``, weight − 1, and ``x̄``."""
        # Without a loss of the start they are of the models that rounds began with.
        back = 0 if 0 in self._losses or not self._losses else 1
        known = {r - back: loss for r, loss in self._losses.items()}
        places = sorted(known)[-_MOST:]
        spans = [
            (first, last)
            for first, last in itertools.pairwise(places)
            if all(r in self._draws for r in range(first + 1, last + 1))
        ]
        if len(spans) < _FEWEST:
            empty = np.zeros(0)
            return empty, empty, empty, empty, 0.0
        at = np.array(places, float)
        curve = np.array([known[place] for place in places])
        bend = np.column_stack([np.ones_like(at), at, np.log1p(at)])
        smooth = bend @ np.linalg.lstsq(bend, curve)[0]
        usual = dict(zip(places, smooth.tolist(), strict=True))
        rows = []
        for first, last in spans:
            draws = np.mean([self._draws[r] for r in range(first + 1, last + 1)], axis=0)
            rows.append((known[first] - known[last], usual[first] - usual[last], *draws))
        steps, trend, x, weight = np.array(rows).T
        falls = trend > 0
        if not falls.any():
            return steps[:0], trend[:0], x[:0], weight[:0], 0.0
        mean = float(np.average(x[falls], weights=trend[falls]))
        return steps[falls], trend[falls], x[falls] - mean, weight[falls] - 1, mean

    def state_dict(self) -> dict[str, Any]:
        """Return the guess, losses and draws, by round."""
        return {
            "beta": self.beta,
            "losses": {str(r): loss for r, loss in sorted(self._losses.items())},
            "draws": {str(r): list(draw) for r, draw in sorted(self._draws.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.beta = float(state["beta"])
        self._losses = {int(r): float(loss) for r, loss in state["losses"].items()}
        self._draws = {int(r): (float(x), float(w)) for r, (x, w) in state["draws"].items()}
