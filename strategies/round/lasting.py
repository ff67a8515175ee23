"""Orders in a checkpoint: who was asked for what, from which model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ConfigRecord
from flwr.common import log
from torch import Tensor

from strategies.clients import Client
from strategies.packing import Packing
from strategies.round.models import Models
from strategies.round.outstanding import Outstanding
from strategies.round.patience import Patience
from strategies.round.waiting import Waiting
from strategies.rounds import Assignment
from strategies.transport import Until

Rng = Callable[..., np.random.Generator]

_BYTES = "$bytes"


def seeded(seed: int, *purpose: int) -> np.random.Generator:
    """Return the generator of a round and purpose.

    Not one of a strategy's methods: who keeps that keeps the strategy, and a run's lock with it.
    """
    return np.random.default_rng([seed, *purpose])


def saved(order: Assignment) -> dict[str, Any]:
    """Return an order as JSON can hold it; its model is saved beside it, once a round."""
    settings = {} if order.settings is None else dict(order.settings)
    return {
        "number": order.number,
        "client": order.client.index,
        "asked": order.asked,
        "rank": order.parcel.rank,
        "weight": order.weight,
        "began": order.began,
        "status": order.status,
        "told": order.told,
        "settings": {
            key: {_BYTES: value.hex()} if isinstance(value, bytes) else value
            for key, value in settings.items()
        },
    }


def restored(row: dict[str, Any], client: Client, packing: Packing, rng: Rng) -> Assignment:
    """Return the order that was saved, for its client as it is known now.

    Parameters
    ----------
    row : dict
        As ``saved`` returned it.
    client : Client
    packing : Packing
        Of the model it started from.
    rng : callable
        Returns the generator of a round and purpose.
    """
    settings = {
        key: bytes.fromhex(value[_BYTES]) if isinstance(value, dict) else value
        for key, value in row["settings"].items()
    }
    parcel = packing.train(row["rank"], partial(rng, row["asked"], 2, client.index))
    return Assignment(
        client, parcel, packing, ConfigRecord(settings),
        asked=row["asked"], weight=row["weight"], began=row["began"], number=row["number"],
        status=row["status"], told=row["told"], message_id=f"order-{row['number']}",
    )  # fmt: skip


class LastingOrders(Until):
    """The orders under way and what was learned of waiting, as they last in a checkpoint.

    Parameters
    ----------
    waiting : Waiting
    rng : callable
        Returns the generator of a round and purpose.
    """

    def __init__(self, waiting: Waiting, rng: Rng) -> None:
        super().__init__()
        self.waiting = waiting
        self.rng = rng
        self.outstanding = Outstanding()
        self.patience = Patience()
        #: Orders of a run that was resumed, to be sent again.
        self.revived: list[Assignment] = []
        self._wanted = waiting.busy  # clients that train at a time, where rounds overlap
        self._number = 0  # of the last order
        self._saved: list[dict[str, Any]] = []
        self._old_models: dict[str, Tensor] = {}

    def parts(self) -> dict[str, Any]:
        """Return what has a state that must last, by its name in a checkpoint."""
        return {"waiting": self} if self.waiting.closes or self.outstanding.orders else {}

    def under_way(self) -> list[Assignment]:
        """Return all orders that have no answer yet, in the order they were placed."""
        return sorted(self.outstanding.orders.values(), key=lambda order: order.number)

    def state_dict(self) -> dict[str, Any]:
        """Return what must last, as JSON can hold it."""
        return {
            "patience": self.patience.state_dict(),
            "wanted": self._wanted,
            "number": self._number,
            "orders": [saved(order) for order in self.under_way()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned; orders, once it is known who is there."""
        self.patience.load_state_dict(state.get("patience", {}))
        self._wanted, self._number = state.get("wanted", 0), state.get("number", 0)
        self._saved = state.get("orders", [])

    @property
    def models(self) -> dict[str, Tensor]:
        """The models that orders under way started from, by round."""
        packings = {o.asked: o.packing for o in self.under_way() if o.packing is not None}
        return {
            f"{asked}.{key}": tensor
            for asked, packing in packings.items()
            for key, tensor in packing.model.to_tensors().items()
        }

    @models.setter
    def models(self, tensors: Mapping[str, Tensor]) -> None:
        self._old_models = dict(tensors)

    def revive(self, clients: Iterable[Client], models: Models) -> None:
        """Make the orders of a run that was resumed again, for those that are there.

        A resumed run has another id, and the SuperLink drops what was sent for the one before. So
        the same work is asked for again, from the same model.
        """
        rows, self._saved = self._saved, []
        known = {client.index: client for client in clients} if rows else {}
        packings: dict[int, Packing] = {}
        for row in rows:
            asked, client = row["asked"], known.get(row["client"])
            if client is None:
                log(WARNING, "resume: client %s is not there, and its order of round %s is dropped",
                    row["client"], asked)  # fmt: skip
                self.dropped(row["number"])
                continue
            if asked not in packings:
                start = f"{asked}."
                found = {k.removeprefix(start): t for k, t in self._old_models.items()
                         if k.startswith(start)}  # fmt: skip
                packings[asked] = models.packing(found, asked)
            self.revived.append(restored(row, client, packings[asked], self.rng))
        self._old_models = {}
        for order in list(self.revived):
            if order.message_id not in self.outstanding.orders:
                self.outstanding.orders[order.message_id] = order
                self.restart(order)

    def restart(self, order: Assignment) -> None:
        """Go on with an order of a run that was resumed."""

    def dropped(self, number: int) -> None:
        """Learn that an order of before is not made again."""
