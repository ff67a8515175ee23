"""A run without privacy, to be treated as one that has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.lora import Adapter

if TYPE_CHECKING:
    from strategies.aggregation import Aggregator
    from strategies.clients import Client
    from strategies.ranks import RankPolicy
    from strategies.sampling import Sampler


class NoPrivacy:
    """What ``PrivateRun`` does, where nothing is private: nothing."""

    #: Whether the server may know and use how many rows a client has.
    rows_known = True
    #: Whether the server adds noise to every round, whoever joined.
    tops_up = False
    #: Standard deviation of the noise in every number that arrives.
    noise = 0.0

    def settings(self) -> dict[str, float]:
        """Return what messages tell clients of it."""
        return {}

    def parts(self) -> dict[str, Any]:
        """Return what has a state that must last, by its name in a checkpoint."""
        return {}

    def check(
        self,
        rule: Aggregator[Any],
        policy: RankPolicy,
        sampler: Sampler,
        *,
        evaluate_fraction: float,
        server_clips: bool,
    ) -> None:
        """Refuse nothing."""

    def seen(self, clients: list[Client]) -> list[Client]:
        """Return clients as the server may know them."""
        return clients

    def rng(self, seeded: np.random.Generator) -> np.random.Generator:
        """Return the generator that draws who joins: that of the run's seed."""
        return seeded

    def begin(
        self,
        clients: Sequence[Client],
        asked: Sequence[Client],
        weights: Mapping[int, float],
        chances: Mapping[int, float],
        *,
        equal_ranks: bool,
    ) -> None:
        """Note nothing."""

    def finish(self, adapter: Adapter, answered: Sequence[int], uploaded: str = "AB") -> Adapter:
        """Return the new global adapter as it is."""
        return adapter

    def spent(self) -> dict[str, float]:
        """Return no ε."""
        return {}
