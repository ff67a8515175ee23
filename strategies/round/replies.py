"""The replies of a round before anybody has read them: their order, and how much they count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from strategies.clients import Roster
from strategies.guard import Guard
from strategies.messages import Protocol, Reply

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]


class Replies:
    """What training and evaluation have in common in how replies are taken.

    Parameters
    ----------
    protocol : Protocol
    roster : Roster
    guard : Guard
    weighted_by : str
        The metric by which a reply counts.
    """

    def __init__(self, protocol: Protocol, roster: Roster, guard: Guard, weighted_by: str) -> None:
        self.protocol = protocol
        self.roster = roster
        self.guard = guard
        self.weighted_by = weighted_by
        #: Whether counts are numbers of rows, comparable with those of other rounds.
        self.by_rows = weighted_by == "num-examples"

    def in_order(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Return the replies in a lasting order, the counts of a few seen beforehand."""
        if not isinstance(replies, Iterator):  # a stream comes in order, a collection may not
            replies = sorted(replies, key=self._place)
        return self.guard.look_ahead(replies, self._count_of, lasting=self.by_rows)

    def aggregate(
        self, replies: Sequence[Reply], aggregate: MetricsAggregation, hidden: Collection[str]
    ) -> MetricRecord | None:
        """Return the metrics of replies as one record; None without any.

        Parameters
        ----------
        replies : Sequence[Reply]
        aggregate : callable
            As in Flower's ``FedAvg``.
        hidden : Collection[str]
            Metrics that are no one's business but the rank policy's.
        """
        if not replies:
            return None
        # Flower's average takes it that every reply has the same metrics.
        shared = set.intersection(*(set(reply.metrics) for reply in replies))
        shared -= {*hidden, self.weighted_by}
        records = []
        for reply in replies:
            metrics: dict[str, Any] = {k: v for k, v in reply.metrics.items() if k in shared}
            metrics[self.weighted_by] = reply.weight
            records.append(RecordDict({"metrics": MetricRecord(metrics)}))
        return aggregate(records, self.weighted_by)

    def _place(self, message: Message) -> tuple[int, int]:
        """Return where a reply stands in the lasting order."""
        node_id = message.metadata.src_node_id
        client = self.roster.clients.get(node_id)
        return (client.index, node_id) if client else (len(self.roster.clients), node_id)

    def _count_of(self, message: Message) -> tuple[int, float] | None:
        """Return the client of a reply and how much it counts, if it is one and says so."""
        client = self.roster.clients.get(message.metadata.src_node_id)
        try:
            return None if client is None else (client.index, self.protocol.count(message))
        except (ValueError, KeyError, TypeError):
            return None
