"""The orders that are on their way: of the round in progress, and of rounds before."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message

from strategies.rounds import Assignment, Round


class Outstanding:
    """Knows which reply is to which order; an order is answered once.

    Other loops than ours do not say under which id a message went out: there a reply is known by
    its node.
    """

    def __init__(self) -> None:
        self.orders: dict[str, Assignment] = {}  # on their way, by the id of their message
        self.open: dict[int, Assignment] = {}  # of this round, without an answer yet, by node
        self.unsent: dict[int, Assignment] = {}  # of rounds before, about to be sent, by node

    def begin(self, book: Round) -> None:
        """Begin with a round."""
        self.open = dict(book.assignments)

    def sent(self, message_id: str, message: Message) -> None:
        """Note under which id an order is on its way."""
        node_id = message.metadata.dst_node_id
        if (before := self.unsent.pop(node_id, None)) is not None:
            self.rename(before, message_id)
            return
        order = self.open.get(node_id)
        if order is not None and not order.message_id:
            self.rename(order, message_id)

    def rename(self, order: Assignment, message_id: str) -> None:
        """Give an order the id under which its message is on its way."""
        self.orders.pop(order.message_id, None)
        order.message_id = message_id
        self.orders[message_id] = order

    def claim(self, message: Message) -> Assignment | None:
        """Return the order that a message is the first reply to; None: there is no such order."""
        node_id = message.metadata.src_node_id
        order = self.orders.pop(message.metadata.reply_to_message_id, None)
        if order is None:
            order = self.open.get(node_id)
            if order is None or order.message_id:
                return None
        if self.open.get(order.client.node_id) is order:
            del self.open[order.client.node_id]
        return order

    def of(self, message: Message) -> Assignment | None:
        """Return the order that a message replies to, which stays where it is."""
        order = self.orders.get(message.metadata.reply_to_message_id)
        return order or self.open.get(message.metadata.src_node_id)

    def drop(self, order: Assignment) -> None:
        """Wait no more for an order: a reply to it is nobody's."""
        self.orders.pop(order.message_id, None)
        if self.open.get(order.client.node_id) is order:
            del self.open[order.client.node_id]

    def older(self) -> list[Assignment]:
        """Return the orders of rounds before, in the order they were sent."""
        return [order for order in self.orders.values() if not self._of_this_round(order)]

    @property
    def busy(self) -> Mapping[int, Assignment]:
        """The nodes that are at an order of a round before."""
        return {order.client.node_id: order for order in self.older()}

    def _of_this_round(self, order: Assignment) -> bool:
        return self.open.get(order.client.node_id) is order
