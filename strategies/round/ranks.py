"""The book of ranks: who trains which in this round, and what was told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.common import log

from strategies.clients import Client
from strategies.ranks import RankPolicy
from strategies.ranks.report import rank_record, rank_table
from strategies.records import RankRecord


class RankBook:
    """Asks the rank policy, once a round for each client, and tells of what is new.

    Parameters
    ----------
    policy : RankPolicy
    """

    def __init__(self, policy: RankPolicy) -> None:
        self.policy = policy
        self.ranks: dict[int, int] = {}  # of the round in progress, by node id
        self.told: list[Any] = []

    def begin(self) -> None:
        """Begin a round: everybody's rank may be another."""
        self.ranks = {}

    def served(self, clients: Sequence[Client], server_round: int) -> list[Client]:
        """Return whom the policy has a rank for; who joins without one does not end the run."""
        for client in clients:
            if not self.policy.serves(client):
                log(WARNING, "round %s: %s is left out: the rank policy %s has no rank for it",
                    server_round, client.name, self.policy.summary())  # fmt: skip
        return [client for client in clients if self.policy.serves(client)]

    def assign(
        self, clients: list[Client], server_round: int, tell: Callable[[RankRecord], None]
    ) -> Mapping[int, int]:
        """Return the ranks by node id; who has one keeps it until the next round begins.

        Parameters
        ----------
        clients : list of Client
        server_round : int
        tell : callable
            Gets the record of an assignment that is new.
        """
        if all(client.node_id in self.ranks for client in clients):
            return self.ranks
        ranks = {**self.policy.assign(clients, server_round), **self.ranks}
        self.ranks = ranks
        record = rank_record(self.policy, clients, ranks, server_round)
        # Numbers of examples come in with the replies of every round: no reason to tell it all.
        entries = [{**entry, "samples": None} for entry in record["clients"]]
        news = [record["weights"], record["notes"], entries]
        if news != self.told:
            self.told = news
            tell(record)
            for line in rank_table(record):
                log(INFO, "%s", line)
            for note in record["notes"]:
                log(WARNING, "ranks: %s", note)
        return ranks
