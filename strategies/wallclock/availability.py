"""Who is there when: clients that come and go, on the clock of a simulation [D].

Nothing is drawn ahead and nothing remembered: what a client does at a second is a function of the
seed, its index and that second. So any second may be asked for, in any order, a run that is
resumed finds everybody as before, and ten thousand clients cost no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.naming import Registry

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
AvailabilityT = TypeVar("AvailabilityT", bound="Availability")


@dataclass(frozen=True)
class Presence:
    """Who is there at a second, and how long that lasts.

    Parameters
    ----------
    here : ndarray of bool, shape (n,)
    until : ndarray, shape (n,)
        When the client next goes away, or comes back, in seconds of the clock; always later than
        the second asked for, inf: never.
    """

    here: Mask
    until: Array


class Availability(ABC):
    """Say who is there at each second of the clock.

    A client is there from the first second of a time there up to, but not at, its last. A class of
    one's own is made with ``rng`` and its options.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def look(self, clients: Sequence[int], seconds: float) -> Presence:
        """Return who is there at a second, in the order of ``clients`` (indices, n of them)."""

    @abstractmethod
    def share(self, clients: Sequence[int]) -> Array:
        """Return the share of the time that each client is there in the long run, shape (n,)."""

    @abstractmethod
    def stays(self, clients: Sequence[int], seconds: ArrayLike) -> Array:
        """Return how likely a client that is there is to stay for so many seconds, shape (n,).

        In the long run, whenever in its time there one looks; 1 for 0 seconds.
        """

    @abstractmethod
    def left(self, clients: Sequence[int], chances: ArrayLike) -> Array:
        """Return for how long a client that is there stays at least, with a chance.

        The inverse of ``stays``: the seconds for which that is the chance; inf for ever.

        Parameters
        ----------
        clients : Sequence[int]
            n indices.
        chances : array_like, shape (..., n)
            In (0, 1).
        """

    def summary(self) -> str:
        """Return the model and its settings in one line."""
        return self.name


AVAILABILITIES: Registry[Callable[..., Availability]] = Registry()


def register(cls: type[AvailabilityT]) -> type[AvailabilityT]:
    """Make a model available by its ``name``, in ``make_availability`` and the run config.

    Raises
    ------
    ValueError
        If it has no name, or another has it.
    """
    return AVAILABILITIES.register(cls)


@register
class Always(Availability):
    """Everybody is there all the time."""

    name = "always"

    def __init__(self, *, rng: np.random.Generator | None = None) -> None:
        pass

    def look(self, clients: Sequence[int], seconds: float) -> Presence:
        """Return that all are there, for ever."""
        return Presence(np.ones(len(clients), bool), np.full(len(clients), np.inf))

    def share(self, clients: Sequence[int]) -> Array:
        """Return ones."""
        return np.ones(len(clients))

    def stays(self, clients: Sequence[int], seconds: ArrayLike) -> Array:
        """Return ones."""
        return np.ones(len(clients))

    def left(self, clients: Sequence[int], chances: ArrayLike) -> Array:
        """Return inf."""
        return np.full(np.shape(chances), np.inf)
