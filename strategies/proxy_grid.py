"""A ``Grid`` over the ``ClientManager`` of a server of the old style; see ``strategies.legacy``."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from itertools import count
from threading import Thread
from typing import Any, NoReturn

from flwr.app import Error, Message
from flwr.server import ClientManager
from flwr.serverapp import Grid

from strategies.flower import ClientProxy, TaskIdentity
from strategies.flower import recorddict_compat as compat


class ProxyGrid(Grid):
    """What the engine needs of a ``Grid``, over a ``ClientManager``: who is there, and queries.

    Parameters
    ----------
    client_manager : ClientManager
    """

    def __init__(self, client_manager: ClientManager) -> None:
        identify()
        self._client_manager = client_manager
        self._proxies: dict[int, ClientProxy] = {}
        self._replies: dict[str, Message] = {}
        self._ids = count()

    def proxy(self, message: Message) -> ClientProxy:
        """Return the proxy of the node that a message is for."""
        return self._proxies[message.metadata.dst_node_id]

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the clients that are available."""
        proxies = list(self._client_manager.all().values())
        self._proxies = {node_id_of(proxy): proxy for proxy in proxies}
        return list(self._proxies)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send queries, each in a thread of its own."""
        ids = []
        for message in messages:
            ids.append(str(next(self._ids)))
            message.metadata.__dict__["_message_id"] = ids[-1]
            # A daemon: one that never answers does not keep the process alive.
            Thread(target=self._ask, args=(message,), daemon=True).start()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def _ask(self, message: Message) -> None:
        try:
            ins = compat.recorddict_to_getpropertiesins(message.content)
            answer = self.proxy(message).get_properties(ins, timeout=None, group_id=None)
            content = compat.getpropertiesres_to_recorddict(answer)
            reply = Message(content, reply_to=message)
        except Exception as error:  # whatever a client may answer; said by the census
            reply = Message(Error(code=0, reason=str(error)), reply_to=message)
        self._replies[message.metadata.message_id] = reply

    @property
    def run(self) -> NoReturn:
        """Not there."""
        raise NotImplementedError("a server of the old style shows its strategy no run")

    def set_run(self, run: Any) -> None:
        """Not there."""
        raise NotImplementedError("a server of the old style shows its strategy no run")

    def create_message(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not there; deprecated."""
        raise NotImplementedError("use flwr.app.Message(…)")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> NoReturn:
        """Not there."""
        raise NotImplementedError("use push_messages and pull_messages")


def identify() -> None:
    """Give this process the identity that messages need; ``start_server`` gives it none."""
    try:
        _ = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def node_id_of(proxy: ClientProxy) -> int:
    """Return Flower's node id, or a number of its own for a proxy that has another name."""
    if proxy.cid.isdecimal():
        return int(proxy.cid)
    return int.from_bytes(sha256(proxy.cid.encode()).digest()[:7])
