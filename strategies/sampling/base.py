"""What a sampler is, and the registry of samplers by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from strategies.clients import Client
from strategies.naming import named


class Sampler(ABC):
    """Say which clients join a round."""

    name: ClassVar[str] = ""

    @abstractmethod
    def sample(
        self, clients: Sequence[Client], server_round: int, rng: np.random.Generator
    ) -> list[Client]:
        """Return the clients of this round, in the order of ``clients``.

        Parameters
        ----------
        clients : Sequence[Client]
            Everyone present, in a lasting order.
        server_round : int
            From 1.
        rng : numpy.random.Generator
            Seeded by the strategy for this round; the only source of chance.
        """

    def summary(self) -> str:
        """Return the sampler and its settings in one line."""
        return self.name


SAMPLERS: dict[str, Callable[..., Sampler]] = {}


def register(cls: type[Sampler]) -> type[Sampler]:
    """Make a sampler available by its ``name``."""
    SAMPLERS[cls.name] = cls
    return cls


def make_sampler(name: str, **options: Any) -> Sampler:
    """Return the sampler registered as ``name``.

    Raises
    ------
    ValueError
        If there is no such sampler; the message lists those that exist.
    """
    return named(SAMPLERS, name)(**options)
