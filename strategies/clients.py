"""Who the clients are: what the server knows of each node, in an order that lasts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MOST = 2**53  # up to here a float holds every whole number


@dataclass(frozen=True)
class Client:
    """One node as the server knows it.

    Parameters
    ----------
    node_id : int
        Flower's id; in a simulation it differs from run to run.
    index : int
        The client's place in every seeded choice: its partition id where the node names
        one, else its place in the order of joining.
    max_rank : int, optional
        The largest LoRA rank its device can hold (``max-rank`` in its node config).
    num_examples : int, optional
        Its number of training examples, once it is known.
    named : bool (default: True)
        Whether the node names its partition, so that it is known again under another id.
    """

    node_id: int
    index: int
    max_rank: int | None = None
    num_examples: int | None = None
    named: bool = True

    @property
    def name(self) -> str:
        """How logs and errors call it."""
        return f"client {self.index} (node {self.node_id})"


@dataclass
class Roster:
    """All nodes seen so far. Order and indices do not depend on Flower's random node ids.

    That holds where nodes report their partition id. Others are numbered as they join,
    by node id among those that join together.
    """

    clients: dict[int, Client] = field(default_factory=dict)
    #: Nodes that name the partition of another that is connected, with it; as of the last ``join``.
    doubles: dict[int, int] = field(default_factory=dict)
    #: Places of nameless nodes that another has now; what was learned there may be another's.
    #: For whoever forgets it to empty.
    handed_on: set[int] = field(default_factory=set)

    def unknown(self, node_ids: Iterable[int]) -> list[int]:
        """Return the ids not seen before, sorted."""
        return sorted(set(node_ids) - self.clients.keys())

    def join(
        self,
        properties: Mapping[int, Mapping[str, object]],
        *,
        present: Iterable[int] | None = None,
    ) -> None:
        """Add nodes with what they report of themselves.

        A node that comes back under a new id, because its process was restarted, takes the
        place of the one that is gone, if both name the same partition. While the old id is still
        connected the new one is not added: nobody takes the place of another that may be alive.
        Nodes that name no partition take the places of such nodes that are gone, then new ones.

        Parameters
        ----------
        properties : Mapping[int, Mapping[str, object]]
            By node id; read are ``partition-id``, ``max-rank`` and ``num-examples``, each
            optional. What is not a whole number in range counts as not reported.
        present : Iterable[int], optional
            All nodes that are connected (default: everyone known).
        """
        here = set(self.clients if present is None else present) | properties.keys()
        gone = {c.index: node_id for node_id, c in self.clients.items() if node_id not in here}
        before: dict[int, Client] = {}
        taken = {client.index for client in self.clients.values()}
        waiting = []
        self.doubles = {}
        named = {c.index for n, c in self.clients.items() if n in here and c.named}
        for node_id in sorted(properties):
            index = whole(properties[node_id].get("partition-id"), low=0)
            if index in gone:
                taken.discard(index)
                former = self.clients.pop(gone.pop(index))
                if former.named:
                    before[index] = former
                else:
                    self.handed_on.add(index)
            if index is None:
                waiting.append(node_id)
                continue
            if index in taken:
                if index in named:
                    self.doubles[node_id] = index
                else:  # one without a name has it: a place is kept, whoever comes later
                    waiting.append(node_id)
                continue
            named.add(index)
            taken.add(index)
            self._add(node_id, index, properties[node_id], before.get(index))
        left = deque(sorted(i for i, n in gone.items() if not self.clients[n].named))
        free = 0
        for node_id in waiting:
            if left:
                index = left.popleft()
                self.clients.pop(gone[index])
                self.handed_on.add(index)
            else:
                while free in taken:
                    free += 1
                index = free
            taken.add(index)
            self._add(node_id, index, properties[node_id], named=False)

    def _add(
        self,
        node_id: int,
        index: int,
        reported: Mapping[str, object],
        before: Client | None = None,
        *,
        named: bool = True,
    ) -> None:
        """Add a node; what it does not report is as it was ``before``."""
        max_rank = whole(reported.get("max-rank"), low=1)
        count = whole(reported.get("num-examples"), low=1)
        if before is not None:
            max_rank, count = max_rank or before.max_rank, count or before.num_examples
        self.clients[node_id] = Client(node_id, index, max_rank, count, named)

    def update(self, node_id: int, reported: Mapping[str, object]) -> None:
        """Take what a node that is known says anew; its place stays as it is."""
        client = self.clients[node_id]
        self.clients[node_id] = replace(
            client,
            max_rank=whole(reported.get("max-rank"), low=1),
            num_examples=client.num_examples or whole(reported.get("num-examples"), low=1),
        )

    def observe(self, node_id: int, num_examples: int | None) -> None:
        """Remember how many examples a client trained on; None: forget it."""
        self.clients[node_id] = replace(self.clients[node_id], num_examples=num_examples)

    def state_dict(self) -> dict[str, Any]:
        """Return everyone known, as JSON can hold it."""
        return {"clients": [list(vars(client).values()) for client in self.clients.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        known = (Client(*values) for values in state["clients"])
        self.clients = {client.node_id: client for client in known}

    def present(self, node_ids: Iterable[int]) -> list[Client]:
        """Return the clients among ``node_ids``, in their lasting order."""
        found = [self.clients[n] for n in node_ids if n in self.clients]
        return sorted(found, key=lambda client: client.index)


def whole(value: object, low: int) -> int | None:
    """Return what a node says if it is a whole number in range, else None."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)  # a node config may quote its numbers
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST:
        return None
    return value
