"""The clients' own evaluation of the new model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import WARNING
from typing import cast

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.common import log

from strategies.claims import ReplyError, clean
from strategies.clients import Client
from strategies.messages import Reply, reply_error
from strategies.packing import Packing
from strategies.records import ClientEvaluationRecord
from strategies.round.replies import Replies
from strategies.sampling import FractionSampling


class ClientEvaluation:
    """Asks a share of the clients how good the model is on their own data.

    Parameters
    ----------
    share : float
        0: nobody is asked.
    replies : Replies
    """

    def __init__(self, share: float, replies: Replies) -> None:
        self.share = share
        self.sampling = FractionSampling(share) if share > 0 else None
        self.replies = replies
        self._waiting: dict[int, Client] = {}

    def forget(self) -> None:
        """Wait for nobody any more."""
        self._waiting = {}

    def messages(
        self,
        clients: Sequence[Client],
        ranks: Mapping[int, int],
        packing: Packing,
        config: ConfigRecord,
        rng: np.random.Generator,
    ) -> list[Message]:
        """Return one message for each client that is asked, with the model at its own rank."""
        messages = []
        chosen = self.sampling.sample(clients, packing.server_round, rng) if self.sampling else []
        for client in chosen:
            rank = ranks[client.node_id]
            parcel = packing.evaluate(rank)
            self._waiting[client.node_id] = client
            settings = packing.config(config, client, parcel, rank)
            content = self.replies.protocol.evaluate(parcel.sent().record, settings)
            messages.append(Message(content, client.node_id, "evaluate"))
        return messages

    def gather(
        self,
        server_round: int,
        replies: Iterable[Message],
        tell: Callable[[ClientEvaluationRecord], None],
    ) -> list[Reply]:
        """Return the good replies, each told of; a bad one is left out, by name."""
        found: list[Reply] = []
        guard = self.replies.guard
        for message in self.replies.in_order(replies):
            client = self._waiting.pop(message.metadata.src_node_id, None)
            if client is None:  # not asked, or answered before
                continue
            try:
                if reason := reply_error(message):
                    raise ReplyError(reason)
                reply = self.replies.protocol.read_evaluate(message.content)
                if self.replies.by_rows:
                    guard.check_evaluation(client.index, reply.weight)
                else:
                    guard.check_share(client.index, reply.weight, self.replies.weighted_by)
            except (ValueError, KeyError, TypeError) as error:
                log(WARNING, "evaluation of %s left out: %s", client.name, clean(str(error)))
                continue
            found.append(reply)
            own: ClientEvaluationRecord = {
                "kind": "client-evaluation",
                "round": server_round,
                "client": client.index,
                "node": str(client.node_id),
            }
            tell(cast(ClientEvaluationRecord, {**reply.metrics, **own}))
        for client in self._waiting.values():
            log(WARNING, "evaluation of %s left out: no answer", client.name)
        return found
