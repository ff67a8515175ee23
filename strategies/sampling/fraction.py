"""A fixed share or number of the clients in every round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.clients import Client
from strategies.sampling.base import Sampler, register


@register
class FractionSampling(Sampler):
    """A seeded share or number of the clients, uniformly and without replacement.

    Parameters
    ----------
    fraction : float (default: 1.0)
        In (0, 1]; the number of clients is rounded to the nearest whole one.
    min_clients : int (default: 1)
        At least this many, as far as there are.
    clients : int (default: 0)
        Exactly this many, as far as there are, whatever the other two say; 0: as they say.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "fraction"
    blind = clock_blind = True

    def __init__(self, fraction: float = 1.0, *, min_clients: int = 1, clients: int = 0) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        if min_clients < 1:
            raise ValueError(f"min_clients: expected at least 1, got {min_clients!r}")
        if clients < 0:
            raise ValueError(f"clients: expected 0 (by fraction) or more, got {clients!r}")
        self.fraction = fraction
        self.min_clients = min_clients
        self.clients = clients

    def sample(
        self, clients: Sequence[Client], server_round: int, rng: np.random.Generator
    ) -> list[Client]:
        """Return the chosen clients."""
        size = self.size(len(clients))
        if size >= len(clients):
            return list(clients)
        chosen = rng.choice(len(clients), size=size, replace=False)
        return [clients[i] for i in sorted(chosen)]

    def size(self, present: int) -> int:
        """Return how many of so many clients join a round."""
        wanted = self.clients or max(self.min_clients, round(self.fraction * present))
        return min(wanted, present)

    def summary(self) -> str:
        """Return the share or number in one line."""
        if self.clients:
            return f"fraction ({self.clients} clients)"
        return f"fraction {self.fraction:g} (at least {self.min_clients})"
