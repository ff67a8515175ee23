"""What of Flower is not public but needed, each with its reason, and the versions that have it.

``tests/strategies/test_flower.py`` sees to it that nothing else of this kind is imported anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from importlib.metadata import version
from typing import Any, NamedTuple

from flwr.app import Message

TESTED = ((1, 41), (1, 43))
"""The first version of Flower this was tested with, and the first it was not.

pyproject.toml says the same to pip; 1.43 drops services over gRPC and changes what is below.
"""


def require_tested(installed: str) -> None:
    """Raise ImportError unless a version of Flower is one that was tested.

    Parameters
    ----------
    installed : str
        Such as ``"1.42.0"``.
    """
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    try:
        number = tuple(int(part) for part in installed.split(".")[:2])
    except ValueError:
        number = ()
    if not TESTED[0] <= number < TESTED[1]:
        raise ImportError(
            f"flwr {installed} is installed, but FedLoRA works with flwr>={low},<{high}: "
            f"run pip install 'flwr>={low},<{high}'"
        )


require_tested(version("flwr"))  # before what follows, which another version may lack

# Records of today's API from and to what clients of the old one take and return.
# The type of what a mod calls.
from flwr.clientapp.typing import ClientAppCallable as ClientAppCallable  # noqa: E402
from flwr.compat.common import recorddict_compat as recorddict_compat  # noqa: E402

# What a ClientManager holds; no public module has its name.
from flwr.server.client_proxy import ClientProxy as ClientProxy  # noqa: E402

# The default of Flower's own strategies for metrics, so that ours have the same.
from flwr.serverapp.strategy.strategy_utils import (  # noqa: E402
    aggregate_metricrecords as aggregate_metricrecords,
)

# Messages are only made by a process that has an identity, which a server of the old style lacks.
from flwr.supercore.task_identity import TaskIdentity as TaskIdentity  # noqa: E402


def is_network(grid: object) -> bool:
    """Tell whether there is one between a grid and its clients; a simulation's has none."""
    return type(grid).__name__ != "InMemoryGrid"  # its module has whole servers


def is_transport_error(error: Exception) -> bool:
    """Tell whether Flower's grid failed to reach its SuperLink, rather than to read a reply.

    The grid raises what its HTTP client raises, and has no class of its own for it. A reply too
    large for a response is one that cannot be read.
    """
    if isinstance(error, OSError):
        return True
    import httpx  # Flower's own client

    if isinstance(error, httpx.HTTPStatusError):
        return bool(error.response.status_code != httpx.codes.REQUEST_ENTITY_TOO_LARGE)
    return isinstance(error, httpx.HTTPError)


class Announced(NamedTuple):
    """The head of a reply that is on the SuperLink; not all of its parts need be there yet."""

    reply_to: str
    response: Any  # of Flower's protocol, as if it had been asked after alone
    awaited: list[str]  # of the parts that may come last, those that nobody has seen there


def is_http(grid: object) -> bool:
    """Tell whether a grid is Flower's to a SuperLink, so that what follows works with it."""
    return type(grid).__name__ == "HttpGrid"


class _Asking:
    """The client of a grid, but replies are only announced."""

    def __init__(self, client: Any) -> None:
        self.client: Any = client
        self.response: Any = None

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        self.response = self.client.PullMessages(request)
        return type(self.response)()


class _Fetching:
    """The client of a grid, for one reply that was announced."""

    def __init__(self, client: Any, response: Any) -> None:
        self.client, self.response = client, response

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        return self.response

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        for _ in range(_TRIES):  # parts are sent two at a time: one may come after the last
            answer = self.client.PullObject(request)
            if answer.object_available or not answer.object_found:
                break
            time.sleep(_PAUSE)
        return answer

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        return self.client.ConfirmMessageReceived(request)


_TRIES, _PAUSE = 50, 0.05
# So many of the last parts of arrays are looked at, which takes them once more to the server.
_LARGE = 4


def _pull(grid: Any, client: Any, ids: Sequence[str]) -> list[Message]:
    """Pull messages with the grid's own code, but over another client."""
    own = copy(grid)
    own._client = client
    return list(own.pull_messages(ids))


def announced(grid: Any, ids: Sequence[str]) -> list[Announced]:
    """Return the replies of which the SuperLink has the head, each one time only.

    The grid itself would then wait for their parts, one reply after the other.
    """
    asking = _Asking(grid._runtime_client)
    _pull(grid, asking, ids)
    whole: Any = asking.response
    if whole is None:  # too many at once; the grid has said so
        return []
    return [
        Announced(
            message.metadata.reply_to_message_id,
            type(whole)(messages_list=[message], message_object_trees=[tree]),
            _last_to_come(tree),
        )
        for message, tree in zip(whole.messages_list, whole.message_object_trees, strict=True)
    ]


def _last_to_come(tree: Any) -> list[str]:
    """Return the parts of a reply of which one comes last.

    A SuperNode sends the root last, but two parts at a time: the end of an array, which is large,
    can take longer than all the small parts after it.
    """
    leaves: list[tuple[int, str]] = []

    def walk(part: Any, depth: int) -> None:
        for child in part.children:
            walk(child, depth + 1)
        if not part.children:
            leaves.append((depth, part.object_id))

    walk(tree, 0)
    deepest = max(depth for depth, _ in leaves)  # the bytes of arrays
    return [tree.object_id, *[part for depth, part in leaves if depth == deepest][-_LARGE:]]


def is_there(grid: Any, reply: Announced) -> bool:
    """Tell whether all of a reply is on the SuperLink, or never will be."""
    from flwr.proto.message_pb2 import PullObjectRequest

    while reply.awaited:
        request = PullObjectRequest(
            node=grid.node, run_id=grid.run.run_id, object_id=reply.awaited[0]
        )
        answer = grid._runtime_client.PullObject(request)
        if answer.object_found and not answer.object_available:
            return False
        del reply.awaited[0]
    return True


def fetch(grid: Any, reply: Announced) -> list[Message]:
    """Return a reply of which all is there."""
    return _pull(grid, _Fetching(grid._runtime_client, reply.response), [reply.reply_to])
