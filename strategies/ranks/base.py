"""Rank policies: which LoRA rank each client trains."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from strategies.clients import Client


class RankPolicy(ABC):
    """Say which rank every client trains; the device's ``max-rank`` caps every policy."""

    name: ClassVar[str] = ""
    #: Whether a reply may have another rank than the one assigned.
    accepts_other_ranks: ClassVar[bool] = False

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

    def summary(self) -> str:
        """Return the policy and its settings in one line."""
        return f"{self.name} (up to {self.max_rank})"


def _at_least_one(what: str, rank: int) -> int:
    if rank < 1:
        raise ValueError(f"{what}: expected a rank of at least 1, got {rank}")
    return rank


class UniformRank(RankPolicy):
    """The same rank for every client.

    Parameters
    ----------
    rank : int (default: 8)
    """

    name = "uniform"

    def __init__(self, rank: int = 8) -> None:
        self.rank = _at_least_one("uniform", rank)

    @property
    def max_rank(self) -> int:
        """The rank of every client."""
        return self.rank

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
        self.ranks = [_at_least_one("ranks", r) for r in ranks]
        self.cycle = cycle

    @property
    def max_rank(self) -> int:
        """The largest of the ranks."""
        return max(self.ranks)

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

    def __init__(self, max_rank: int = 32, *, fallback: int = 4) -> None:
        self._max_rank = _at_least_one("max_rank", max_rank)
        self.fallback = _at_least_one("fallback", fallback)
        if fallback > max_rank:
            raise ValueError(f"fallback ({fallback}) must not exceed max_rank ({max_rank})")

    @property
    def max_rank(self) -> int:
        """The largest rank a node can get."""
        return self._max_rank

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return what each node reported, or the fallback."""
        return [min(client.max_rank or self.fallback, self.max_rank) for client in clients]


RANK_POLICIES: dict[str, Callable[..., RankPolicy]] = {
    "uniform": UniformRank,
    "list": ListRank,
    "cycle": lambda ranks: ListRank(ranks, cycle=True),
    "reported": ReportedRank,
}


def make_rank_policy(name: str, **options: Any) -> RankPolicy:
    """Return the policy registered as ``name``.

    Raises
    ------
    ValueError
        If there is no such policy; the message lists those that exist.
    """
    if name not in RANK_POLICIES:
        close = difflib.get_close_matches(name, list(RANK_POLICIES), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"expected one of {', '.join(RANK_POLICIES)}; got {name!r}{hint}")
    return RANK_POLICIES[name](**options)
