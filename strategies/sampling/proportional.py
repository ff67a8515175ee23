"""Probabilities in proportion to the data, or to what clients change: the field's baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from strategies.lora import Adapter
from strategies.sampling.base import Array, Estimator, Outlook, register
from strategies.sampling.independent import BernoulliSampling
from strategies.trained import Trained
from strategies.wallclock.baselines import statistical_q, weighted_q


@register
class WeightedSampling(BernoulliSampling):
    """Ask clients in proportion to their data: ``q ∝ a``, as far as that is at most 1.

    Parameters
    ----------
    fraction : float (default: 0.1)
        Expected share of the clients that join, in (0, 1].
    q_min : float (default: 0.001)
        Least probability of a client, in (0, fraction]: nobody is left out for good [D].
    estimator, server_rate
        As in `BernoulliSampling`.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "weighted"
    clock_blind = True
    needs_weights = True

    def __init__(
        self,
        fraction: float = 0.1,
        *,
        q_min: float = 0.001,
        estimator: Estimator = "auto",
        server_rate: float = 1.0,
    ) -> None:
        super().__init__(estimator=estimator, server_rate=server_rate)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        if not 0 < q_min <= fraction:
            raise ValueError(
                f"q_min: expected a number above 0, at most fraction = {fraction:g}, got {q_min!r}"
            )
        self.fraction = fraction
        self.q_min = q_min

    def prepare(self, outlook: Outlook) -> None:
        """Take the data weights of everyone present."""
        indices = [client.index for client in outlook.clients]
        q = self._choose(outlook) if indices else np.zeros(0)
        # Rounding may leave a value of 1 + 1e-16.
        self._q = dict(zip(indices, np.clip(q, self.q_min, 1.0).tolist(), strict=True))

    def _choose(self, outlook: Outlook) -> Array:
        return weighted_q(outlook.weights, self._expected(outlook), q_min=self.q_min)

    def _expected(self, outlook: Outlook) -> float:
        n = len(outlook.clients)
        # n · q_min may exceed fraction · n by rounding where the two are the same number.
        return max(self.fraction * n, n * self.q_min)

    def summary(self) -> str:
        """Return the settings in one line."""
        return f"{self.name}, {self.fraction:g} of the clients expected"


@register
class StatisticalSampling(WeightedSampling):
    """Ask clients in proportion to their data and to how much they change: ``q ∝ a·G``.

    ``G`` is the norm of the client's displacement: of all differences between the factors and
    dense tensors it sent back and those it started from, the quantity whose square the variance
    of the summed update is made of. So the block of a sketch counts as it is, without
    ``R/k``: it already was trained at the larger scale, and enters the sum as it is [D]. Factors
    of another rank or scale than sent are compared at the scale that was sent, with zeros for
    the entries that one of them lacks [D].

    A new norm moves the old one, ``G ← (1 − smoothing)·G + smoothing·new``; the first counts in
    full. Who has not trained yet is taken for an average client: the mean of the known [D].

    Parameters
    ----------
    fraction, q_min
        As in `WeightedSampling`.
    smoothing : float (default: 0.5)
        Share of the newest norm, in (0, 1].
    estimator, server_rate
        As in `BernoulliSampling`.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "statistical"
    clock_blind = True

    def __init__(
        self,
        fraction: float = 0.1,
        *,
        q_min: float = 0.001,
        smoothing: float = 0.5,
        estimator: Estimator = "auto",
        server_rate: float = 1.0,
    ) -> None:
        super().__init__(fraction, q_min=q_min, estimator=estimator, server_rate=server_rate)
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing: expected a number in (0, 1], got {smoothing!r}")
        self.smoothing = smoothing
        self._norms: dict[int, float] = {}

    def observe(self, trained: Trained) -> None:
        """Take the norm of a client's displacement.

        Raises
        ------
        ValueError
            If it is not finite.
        """
        new = displacement(trained.adapter, trained.sent)
        if not math.isfinite(new):
            raise ValueError(f"{self.name}: the change of the adapter has norm {new}; not counted")
        old = self._norms.get(trained.client.index, new)
        self._norms[trained.client.index] = old + self.smoothing * (new - old)

    def _choose(self, outlook: Outlook) -> Array:
        # The average of everyone ever heard, so that who is away does not move the others.
        usual = float(np.mean(list(self._norms.values()))) if self._norms else 1.0
        norms = np.array([self._norms.get(client.index, usual) for client in outlook.clients])
        if not norms.any():  # nobody changed anything: that says nothing of the next round
            norms = np.ones_like(norms)
        expected = self._expected(outlook)
        return statistical_q(outlook.weights, norms, expected, q_min=self.q_min)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms, by client index."""
        return {"norms": {str(index): norm for index, norm in sorted(self._norms.items())}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._norms = {int(index): float(norm) for index, norm in state["norms"].items()}


def displacement(adapter: Adapter, sent: Adapter) -> float:
    """Return the norm of everything in which an adapter differs from what was sent.

    Tensors that did not come back count as unchanged.
    """
    norms = []
    for module, pair in adapter.pairs.items():
        start = sent.pairs[module]
        pair = pair.with_scale(start.scale)
        if pair.rank != start.rank:
            rank = max(pair.rank, start.rank)
            pair, start = pair.with_rank(rank), start.with_rank(rank)
        norms += [_distance(pair.A, start.A), _distance(pair.B, start.B)]
    norms += [_distance(tensor, sent.dense[key]) for key, tensor in adapter.dense.items()]
    return math.hypot(*norms)


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float() - y.float()))
