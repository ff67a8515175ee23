"""Rank policies: which LoRA rank each client trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from strategies.clients import Client
from strategies.trained import Trained

Settings = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Explanation:
    """Why the ranks are what they are; all of it can go into JSON.

    Parameters
    ----------
    clients : Mapping[int, Mapping[str, float or None]]
        By client index, what its rank was derived from.
    weights : Mapping[str, float]
        How much each of those numbers counts.
    notes : Sequence[str]
        What could not be done as asked, and why.
    """

    clients: Mapping[int, Mapping[str, float | None]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


class RankPolicy(ABC):
    """Say which rank every client trains; the device's ``max-rank`` caps every policy.

    A policy needs ``max_rank`` and ``choose`` alone. One that learns from the clients also
    overrides some of the methods below them, which do nothing here: what it asks before
    training (``to_profile``, ``learn``), what it adds to a client's training message
    (``train_settings``) and what it takes from each good reply (``observe``).
    """

    name: ClassVar[str] = ""
    #: Whether the policy lives on what nodes say of themselves, so that they must be asked.
    asks_identity: ClassVar[bool] = False
    #: Whether a reply may have another rank than the one assigned.
    accepts_other_ranks: ClassVar[bool] = False
    #: Whether the policy asks clients for a profile, and so wants to know who they are.
    profiles: ClassVar[bool] = False
    #: Whether it asks everyone for a profile at the start, whoever they are, so that the server may
    #: ask both with one query.
    profiles_everyone: ClassVar[bool] = False
    #: Whether it divides a budget of rank (``ranks.budget``) over the clients.
    divides_budget: ClassVar[bool] = False
    #: Whether it needs the clients' numbers of rows before they have trained.
    needs_counts: bool = False
    #: Whether it lives on the training losses that clients report.
    reads_loss: bool = False
    #: Whether ``learn_cost`` is to be called before each round.
    counts_bytes: bool = False
    #: Metrics of a reply that are meant for the policy and not for averages over clients.
    metrics: tuple[str, ...] = ()

    @property
    @abstractmethod
    def max_rank(self) -> int:
        """The largest rank the policy can give: the rank of the global adapter."""

    @abstractmethod
    def choose(self, clients: Sequence[Client], server_round: int) -> Sequence[int]:
        """Return one rank a client, before the cap by its device."""

    def assign(self, clients: Sequence[Client], server_round: int) -> dict[int, int]:
        """Return the rank of every client in this round, by node id.

        Raises
        ------
        ValueError
            If a rank is below 1.
        """
        ranks = {}
        for client, rank in zip(clients, self.choose(clients, server_round), strict=True):
            if rank < 1:
                raise ValueError(f"{self.name}: rank {rank} for {client.name}; expected 1 or more")
            ranks[client.node_id] = min(rank, client.max_rank or rank)
        return ranks

    def serves(self, client: Client) -> bool:
        """Return whether the policy has a rank for a client that joins a run under way."""
        return True

    def to_profile(self, clients: Sequence[Client], server_round: int) -> list[Client]:
        """Return the clients to send a profiling query to before this round."""
        return []

    def profile_settings(self) -> Settings:
        """Return what the config of a profiling query holds."""
        return {}

    def learn(  # noqa: B027
        self, client: Client, answer: Mapping[str, Any] | None, server_round: int
    ) -> None:
        """Take a client's answer to a profiling query; None: it did not answer in time.

        Raises
        ------
        ValueError
            If the answer cannot be used; the client then counts as not having answered.
        """

    def learn_cost(self, fixed: float, per_rank: float) -> None:  # noqa: B027
        """Take the bytes a client moves in a round: ``fixed + per_rank · rank``."""

    def train_settings(self, client: Client, server_round: int) -> Settings:
        """Return what to add to the config of a client's training message."""
        return {}

    def observe(self, trained: Trained) -> None:  # noqa: B027
        """Look at a good reply before it is dropped.

        Raises
        ------
        ValueError
            If the policy cannot use what the reply says; its training counts all the same.
        """

    def forget(self, index: int) -> None:  # noqa: B027
        """Forget what was learned of a client: its place may be another's now.

        So it is where a node that does not name itself takes the place of one that is gone.
        """

    def explain(self) -> Explanation:
        """Return what the last choice was derived from."""
        return Explanation()

    def state_dict(self) -> dict[str, Any]:
        """Return what the policy has learned, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Put back what ``state_dict`` returned."""

    @property
    def core(self) -> RankPolicy:
        """The policy that decides, where this one only sets limits to it."""
        return self

    @property
    def may_differ(self) -> bool:
        """Whether clients may get different ranks, device limits aside."""
        return True

    @property
    def judges(self) -> bool:
        """Whether the policy looks at whole trained adapters, here on the server."""
        return False

    def summary(self) -> str:
        """Return the policy and its settings in one line."""
        return f"{self.name} (up to {self.max_rank})"


def at_least_one(what: str, rank: int) -> int:
    """Return a rank, or refuse it with its name."""
    if rank < 1:
        raise ValueError(f"{what}: expected a rank of at least 1, got {rank}")
    return rank


def mean_between(mean: float, min_rank: int, max_rank: int) -> float:
    """Return a mean rank, or refuse one that is not within the limits."""
    if not min_rank <= mean <= max_rank:
        raise ValueError(
            f"mean: expected a number from min_rank ({min_rank}) to max_rank ({max_rank}), "
            f"got {mean!r}"
        )
    return mean


class UniformRank(RankPolicy):
    """The same rank for every client.

    Parameters
    ----------
    rank : int (default: 8)
    """

    name = "uniform"

    def __init__(self, rank: int = 8) -> None:
        self.rank = at_least_one("uniform", rank)

    @property
    def max_rank(self) -> int:
        """The rank of every client."""
        return self.rank

    @property
    def may_differ(self) -> bool:
        """False."""
        return False

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the one rank for all."""
        return [self.rank] * len(clients)


class ListRank(RankPolicy):
    """Explicit ranks by client index, once or repeated round-robin.

    Parameters
    ----------
    ranks : Sequence[int]
        Rank of client 0, 1, …; FLoRA's experiments use 64, 32, 16, 16, 8, 8, 4, 4, 4, 4.
    cycle : bool (default: False)
        Start over when there are more clients than ranks; otherwise that is an error.
    """

    name = "list"

    def __init__(self, ranks: Sequence[int], *, cycle: bool = False) -> None:
        if not ranks:
            raise ValueError("ranks: expected at least one rank, got none")
        self.ranks = [at_least_one("ranks", r) for r in ranks]
        self.cycle = cycle

    @property
    def max_rank(self) -> int:
        """The largest of the ranks."""
        return max(self.ranks)

    @property
    def may_differ(self) -> bool:
        """Whether the list holds different ranks."""
        return len(set(self.ranks)) > 1

    def serves(self, client: Client) -> bool:
        """Return whether there is a rank at the client's index."""
        return self.cycle or client.index < len(self.ranks)

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the rank at each client's index.

        Raises
        ------
        ValueError
            If there is no rank for a client and ``cycle`` is off.
        """
        over = [client.name for client in clients if client.index >= len(self.ranks)]
        if over and not self.cycle:
            raise ValueError(
                f"{len(self.ranks)} ranks are listed, but there is {over[0]}; "
                "list one rank a client or use ranks = 'cycle'"
            )
        return [self.ranks[client.index % len(self.ranks)] for client in clients]

    def summary(self) -> str:
        """Return the ranks in one line."""
        listed = ", ".join(map(str, self.ranks))
        return f"{'cycle' if self.cycle else 'list'} ({listed})"


class ReportedRank(RankPolicy):
    """The rank each node names as ``max-rank`` in its node config.

    Parameters
    ----------
    max_rank : int (default: 32)
        Nobody gets more than this; also the rank of the global adapter.
    fallback : int (default: 4)
        Rank of a node that names none.
    """

    name = "reported"
    accepts_other_ranks = True
    asks_identity = True

    def __init__(self, max_rank: int = 32, *, fallback: int = 4) -> None:
        self._max_rank = at_least_one("max_rank", max_rank)
        self.fallback = at_least_one("fallback", fallback)
        if fallback > max_rank:
            raise ValueError(f"fallback ({fallback}) must not exceed max_rank ({max_rank})")

    @property
    def max_rank(self) -> int:
        """The largest rank a node can get."""
        return self._max_rank

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return what each node reported, or the fallback."""
        return [min(client.max_rank or self.fallback, self.max_rank) for client in clients]
