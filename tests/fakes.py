"""Stand-ins for unit tests: adapters with random values, and a grid without a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from threading import Lock

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.compat.common import recorddict_compat as compat
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from strategies.lora import Adapter, LoraPair
from strategies.messages import to_record

SHAPES = {"tall": (9, 4), "wide": (4, 9), "square": (6, 6), "narrow": (3, 5)}


def random_adapter(
    rank: int,
    *,
    seed: int,
    scale: float = 2.0,
    shapes: dict[str, tuple[int, int]] | None = None,
    dense: bool = True,
) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, n, generator=g), torch.randn(m, rank, generator=g), scale)
        for name, (m, n) in (shapes or SHAPES).items()
    }
    head = {"head.weight": torch.randn(3, 4, generator=g), "head.bias": torch.randn(3, generator=g)}
    return Adapter(pairs, head if dense else {})


def same(a: Adapter, b: Adapter) -> bool:
    """Tell whether two adapters are equal to the last bit."""
    x, y = a.to_state_dict(), b.to_state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


Handler = Callable[[Message], RecordDict | Error | None]


class FakeGrid(Grid):
    """Answers every message with ``handler``, in an order shuffled by ``rng``."""

    def __init__(
        self, nodes: Sequence[int], handler: Handler, *, rng: np.random.Generator | None = None
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as in a ServerApp
        self.nodes = list(nodes)
        self.handler = handler
        self.rng = rng
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count()

    def set_run(self, run):
        raise AssertionError("not needed")

    @property
    def run(self):
        raise AssertionError("not needed")

    def create_message(self, *args, **kwargs):
        raise AssertionError("deprecated")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"message-{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.sent.append(message)
            ids.append(message_id)
            content = self.handler(message)
            if content is not None:
                self._replies[message_id] = Message(content, reply_to=message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self._replies.pop(i) for i in message_ids if i in self._replies]
        if self.rng is not None and found:
            # Some now, in any order; the rest at a later look.
            order = self.rng.permutation(len(found))
            now = self.rng.integers(1, len(found) + 1)
            for late in order[now:]:
                reply = found[late]
                self._replies[reply.metadata.reply_to_message_id] = reply
            return [found[i] for i in order[:now]]
        return found

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(list(messages)))


class Nodes:
    """Answers as SuperNodes would: each with a Flower state that lasts."""

    def __init__(self, app: ClientApp, nodes: Sequence[int]) -> None:
        self.app = app
        self.replies: list[tuple[Message, Message]] = []
        self.contexts = {
            node: Context(1, node, {"partition-id": i}, RecordDict(), {})
            for i, node in enumerate(nodes)
        }

    def __call__(self, message: Message) -> RecordDict | Error:
        try:
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower reports it
            return Error(code=0, reason=str(error))
        self.replies.append((message, reply))
        return reply.error if reply.has_error() else reply.content


def message_reply(adapter: Adapter, weight: float = 10, **metrics: float) -> RecordDict:
    """Return what a Message API client sends back."""
    return RecordDict(
        {
            "arrays": to_record(adapter.to_state_dict()),
            "metrics": MetricRecord({"num-examples": weight, "loss": 0.5, **metrics}),
        }
    )


def query_reply(**properties: int) -> RecordDict:
    return RecordDict({"properties": ConfigRecord(dict(properties))})


ALONE = Lock()


class Proxy(ClientProxy):
    """What ``GridClientProxy`` is to a node, without the grid."""

    def __init__(self, cid, node, nodes, fails=()):
        super().__init__(cid)
        self.node, self.nodes, self.fails = node, nodes, fails

    def _send(self, content, kind):
        if kind in self.fails:
            raise RuntimeError(f"{kind} failed")
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        # A real client is a process of its own. In threads of one, CPython 3.11 may lose count
        # while two of them parse the headers of numpy's arrays (SystemError).
        with ALONE:
            answer = self.nodes(Message(content, self.node, kind))
        if isinstance(answer, Error):
            raise RuntimeError(answer.reason)
        return answer

    def get_properties(self, ins, timeout, group_id):
        content = self._send(compat.getpropertiesins_to_recorddict(ins), "get_properties")
        return compat.recorddict_to_getpropertiesres(content)

    def fit(self, ins, timeout, group_id):
        return compat.recorddict_to_fitres(
            self._send(compat.fitins_to_recorddict(ins, True), "train"), False
        )

    def evaluate(self, ins, timeout, group_id):
        return compat.recorddict_to_evaluateres(
            self._send(compat.evaluateins_to_recorddict(ins, True), "evaluate")
        )

    def get_parameters(self, ins, timeout, group_id):
        raise AssertionError("the strategy has the initial parameters")

    def reconnect(self, ins, timeout, group_id):
        raise AssertionError("not needed")


def serve_old_style(strategy: Strategy, proxies: Sequence[ClientProxy], rounds: int):
    """Return the history and the server of a run of Flower's own old-style server."""
    manager = SimpleClientManager()
    for proxy in proxies:
        manager.register(proxy)
    server = Server(client_manager=manager, strategy=strategy)
    history, _ = server.fit(rounds, timeout=None)
    return history, server
