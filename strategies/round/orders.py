"""What goes out to the chosen clients of a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from flwr.app import ConfigRecord, Message

from strategies.clients import Client
from strategies.messages import MODEL_ROUND_KEY, PROXIMAL_KEY, Protocol
from strategies.packing import Packing
from strategies.privacy import NoPrivacy, PrivateRun
from strategies.ranks import RankPolicy
from strategies.rounds import Assignment, Round


class Orders:
    """Gives each chosen client its own slice of the adapter, and the settings to train it by.

    Parameters
    ----------
    protocol : Protocol
    policy : RankPolicy
    privacy : PrivateRun or NoPrivacy
    proximal_mu : float (default: 0.0)
        FedProx's weight; 0: no word of it.
    """

    def __init__(
        self,
        protocol: Protocol,
        policy: RankPolicy,
        privacy: PrivateRun | NoPrivacy,
        proximal_mu: float = 0.0,
    ) -> None:
        self.protocol = protocol
        self.policy = policy
        self.privacy = privacy
        self.proximal_mu = proximal_mu

    def place(
        self,
        chosen: Sequence[tuple[Client, int]],
        book: Round,
        packing: Packing,
        config: ConfigRecord,
        model_round: int,
        rng: Callable[..., np.random.Generator],
    ) -> Iterator[Message]:
        """Note in the book who is given what; return the messages, made one after the other.

        Parameters
        ----------
        chosen : sequence of (Client, int)
            Each with the rank it is to train.
        book : Round
        packing : Packing
        config : ConfigRecord
            The user's settings for clients.
        model_round : int
            How many rounds will have made the model.
        rng : callable
            Returns the generator of a round and purpose.
        """
        placed: list[Assignment] = []
        for client, rank in chosen:
            parcel = packing.train(rank, partial(rng, book.number, 2, client.index))
            settings = packing.config(config, client, parcel, rank)
            settings[MODEL_ROUND_KEY] = model_round
            settings.update(self.policy.train_settings(client, book.number))
            settings.update(self.privacy.settings())
            if self.proximal_mu:
                settings[PROXIMAL_KEY] = float(self.proximal_mu)
            order = Assignment(client, parcel, packing, settings, asked=book.number)
            book.assignments[client.node_id] = order
            placed.append(order)
        return map(self.message, placed)

    def message(self, order: Assignment) -> Message:
        """Return the message of an order, with its arrays."""
        if order.settings is None:
            raise RuntimeError("an order without settings was placed by no round")
        content = self.protocol.train(order.parcel.sent().record, order.settings)
        order.sent_at = time.perf_counter()
        return Message(content, order.client.node_id, "train")
