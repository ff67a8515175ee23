"""What a sampler is, and the registry of samplers by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.clients import Client
from strategies.naming import Registry
from strategies.trained import Trained
from strategies.wallclock.clock import Clock

Array = NDArray[np.float64]
Estimator = Literal["auto", "unbiased", "ratio"]
Restart = Literal["start", "back"]
SamplerT = TypeVar("SamplerT", bound="Sampler")


@dataclass(frozen=True)
class Outlook:
    """What a sampler may know before it chooses the clients of a round.

    Parameters
    ----------
    server_round : int
        From 1.
    clients : Sequence[Client]
        Everyone present, in a lasting order; what follows is in the same order.
    weights : ndarray, shape (n,)
        Data weights ``a``, with sum 1.
    ranks : Sequence[int]
        The rank that the policy gives each client.
    clock : Clock
        What is known of everyone's speed and channel.
    upload_bytes : tuple of float
        An upload at rank ``k`` has ``fixed + per_rank · k`` bytes: ``(fixed, per_rank)``.
    sketches : bool
        Whether a client may be sent fewer entries than its rank (``fslora``, ``fold``).
    full_rank : int
        Rank of the global adapter.
    sketches_cost : bool (default: True)
        Whether fewer entries add to the variance (``fslora``).
    """

    server_round: int
    clients: Sequence[Client]
    weights: Array
    ranks: Sequence[int]
    clock: Clock
    upload_bytes: tuple[float, float]
    sketches: bool
    full_rank: int
    sketches_cost: bool = True


class Sampler(ABC):
    """Say which clients join a round.

    A sampler needs ``sample`` alone. One by which every client joins by its own probability
    also says ``probabilities``; the strategy then weighs updates by ``a / q``.
    """

    name: ClassVar[str] = ""
    #: Whether data weights must be known before a client is ever asked to train.
    needs_weights: ClassVar[bool] = False
    #: Whether ``Outlook.upload_bytes`` is needed; else it is (0, 0).
    needs_cost: ClassVar[bool] = False
    #: Promise (see ``strategies.promises``: not inherited) that nobody's data move anybody's chance
    #: to join, and that the draw is uniform without replacement or, with ``probabilities``, by
    #: these alone: what the privacy that sampling adds rests on.
    blind: ClassVar[bool] = False
    #: Promise that nothing of ``Outlook.clock`` moves who joins.
    clock_blind: ClassVar[bool] = False
    #: How updates are summed, for samplers with ``probabilities``: "unbiased" (divided by the
    #: weight of everybody), "ratio" (by that of the participants), "auto" (what suits the rule).
    estimator: Estimator = "auto"
    #: Factor on the aggregated displacement, with ``estimator = "unbiased"``.
    server_rate: float = 1.0

    def prepare(self, outlook: Outlook) -> None:  # noqa: B027
        """Look at the state of things before a round; called before ``sample``."""

    @abstractmethod
    def sample(
        self, clients: Sequence[Client], server_round: int, rng: np.random.Generator
    ) -> list[Client]:
        """Return the clients of this round, in the order of ``clients``.

        Parameters
        ----------
        clients : Sequence[Client]
            Everyone who can be asked now, in a lasting order: of those that ``prepare`` was told
            of, who is there by the clock and, without ``probabilities``, at no earlier order.
        server_round : int
            From 1.
        rng : numpy.random.Generator
            Seeded by the strategy for this round; the only source of chance.
        """

    def probabilities(self, clients: Sequence[Client]) -> Array | None:
        """Return each client's probability to join, shape (n,).

        None where they do not join independently of each other; updates then keep their data
        weights.
        """
        return None

    def ranks(self, clients: Sequence[Client], ranks: Sequence[int]) -> Sequence[int]:
        """Return the rank each client is to train, at most the one it was given."""
        return ranks

    def observe(self, trained: Trained) -> None:  # noqa: B027
        """Look at a good reply before it is dropped.

        Raises
        ------
        ValueError
            If the sampler cannot use what the reply says; its training counts all the same.
        """

    def learn_loss(self, server_round: int, loss: float) -> None:  # noqa: B027
        """Take the global loss after a round; round 0 is the model at the start."""

    @property
    def wants_loss(self) -> bool:
        """Whether ``learn_loss`` is needed after every round now: a pilot is running."""
        return False

    @property
    def planned_seconds(self) -> float | None:
        """Predicted seconds of a round under the plan in force, if there is one."""
        return None

    def restart(self, server_round: int) -> Restart | None:
        """Return which model this round starts from, where it is not the one at hand.

        "start": the initial model; the one at hand is put aside, in the place of any that was
        there. "back": the one put aside. None: the one at hand. So a strategy holds at most two
        models beside it, and both belong into a checkpoint; it asks once a round, after the
        losses of earlier rounds are learned.
        """
        return None

    def record(self) -> Mapping[str, Any] | None:
        """Return the next decision not told yet, JSON-able, or None; for listeners."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the sampler has learned, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Put back what ``state_dict`` returned."""

    def summary(self) -> str:
        """Return the sampler and its settings in one line."""
        return self.name


SAMPLERS: Registry[Callable[..., Sampler]] = Registry()


def register(cls: type[SamplerT]) -> type[SamplerT]:
    """Make a sampler available by its ``name``, in ``make_sampler`` and the run config.

    Raises
    ------
    ValueError
        If the sampler has no name, or another sampler has it.
    """
    return SAMPLERS.register(cls)


def make_sampler(name: str, **options: Any) -> Sampler:
    """Return the sampler registered as ``name``.

    Raises
    ------
    ValueError
        If there is no such sampler; the message lists those that exist.
    """
    return SAMPLERS.make(name, **options)
