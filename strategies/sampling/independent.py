"""Every client joins a round by its own coin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import get_args

import numpy as np
from flwr.common import log

from strategies.clients import Client
from strategies.sampling.base import Array, Estimator, Outlook, Sampler, register


class BernoulliSampling(Sampler):
    """Toss one coin a client, ``I_n ~ Bernoulli(q_n)`` [P]; what ``q`` is, subclasses say.

    A client's coin depends on the round and its index alone, not on who else is present: it
    falls the same way when others come and go. Nobody may join, which is a legal round.

    Parameters
    ----------
    estimator : "auto", "unbiased" or "ratio" (default: "auto")
        How updates are summed: see ``Sampler.estimator``.
    server_rate : float (default: 1.0)
        Factor on the aggregated displacement; only with ``estimator`` "unbiased" or "auto".

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, *, estimator: Estimator = "auto", server_rate: float = 1.0) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(
                f"estimator: expected one of {', '.join(get_args(Estimator))}; got {estimator!r}"
            )
        if not (math.isfinite(server_rate) and server_rate > 0):
            raise ValueError(f"server_rate: expected a number above 0, got {server_rate!r}")
        if estimator == "ratio" and server_rate != 1:
            raise ValueError(
                f"server_rate: expected 1 with estimator = 'ratio', a mean of models, got "
                f"{server_rate!r}; use estimator = 'unbiased'"
            )
        self.estimator = estimator
        self.server_rate = server_rate
        self._q: dict[int, float] = {}  # by client index

    def probabilities(self, clients: Sequence[Client]) -> Array:
        """Return each client's probability to join, shape (n,).

        Raises
        ------
        ValueError
            If there is none for a client.
        """
        for client in clients:
            if client.index not in self._q:
                raise ValueError(self._unknown(client))
        return np.array([self._q[client.index] for client in clients], np.float64)

    def _unknown(self, client: Client) -> str:
        return f"{self.name}: no probability for {client.name}; call prepare before each round"

    def sample(
        self, clients: Sequence[Client], server_round: int, rng: np.random.Generator
    ) -> list[Client]:
        """Return the clients whose coin says so; possibly none."""
        seed = int(rng.integers(2**63))
        q = self.probabilities(clients)
        return [
            client
            for client, chance in zip(clients, q, strict=True)
            if np.random.default_rng([seed, client.index]).random() < chance
        ]


@register
class IndependentSampling(BernoulliSampling):
    """Given probabilities, one for all or one a client.

    Parameters
    ----------
    q : float, Sequence[float] or Mapping[int, float] (default: 0.1)
        Probability to join a round, in (0, 1]: for everyone, or by client index, which is the
        partition id where nodes name one. A client that appears later without one joins with
        the mean of the others (this project's decision).
    estimator, server_rate
        As in `BernoulliSampling`.

    Raises
    ------
    ValueError
        If a probability or another argument is out of range.
    """

    name = "independent"
    blind = clock_blind = True

    def __init__(
        self,
        q: float | Sequence[float] | Mapping[int, float] = 0.1,
        *,
        estimator: Estimator = "auto",
        server_rate: float = 1.0,
    ) -> None:
        super().__init__(estimator=estimator, server_rate=server_rate)
        self.q: float | None = None
        self._began = False
        if isinstance(q, Mapping):
            self._q = {int(index): float(value) for index, value in q.items()}
        elif isinstance(q, int | float):
            self.q = float(q)
        else:
            self._q = {index: float(value) for index, value in enumerate(q)}
        if self.q is not None and not 0 < self.q <= 1:
            raise ValueError(f"q: expected a number in (0, 1], got {q!r}")
        if self.q is None and not self._q:
            raise ValueError("q: expected one probability a client, got none")
        for index, value in self._q.items():
            if not 0 < value <= 1:
                raise ValueError(f"q: expected numbers in (0, 1], got {value!r} for client {index}")

    def probabilities(self, clients: Sequence[Client]) -> Array:
        """Return each client's probability to join, shape (n,).

        Raises
        ------
        ValueError
            If there is none for a client.
        """
        if self.q is not None:
            return np.full(len(clients), self.q)
        for client in clients:
            if self._began and client.index not in self._q:
                self._q[client.index] = float(np.mean(list(self._q.values())))
                log(WARNING, "%s; it joins with the mean of those given, %.3g",
                    self._unknown(client), self._q[client.index])  # fmt: skip
        return super().probabilities(clients)

    def prepare(self, outlook: Outlook) -> None:
        """Note that the run has begun: who appears from now on must not end it."""
        self._began = self._began or outlook.server_round > 1

    def _unknown(self, client: Client) -> str:
        return (
            f"q has {len(self._q)} probabilities, up to client {max(self._q)}, but none for "
            f"{client.name}; give one for each client index, or one number for all"
        )

    def summary(self) -> str:
        """Return the probabilities in one line."""
        if self.q is not None:
            return f"independent, q = {self.q:g}"
        low, high = min(self._q.values()), max(self._q.values())
        return f"independent, q = {low:g} to {high:g}"
