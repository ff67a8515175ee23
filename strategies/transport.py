"""Send messages and collect replies in a fixed order, holding few of them at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

# Replies past this many unanswered messages stay on the SuperLink, not in this process.
WINDOW = 32


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    *,
    on_arrival: Callable[[Message], None] | None = None,
    window: int = WINDOW,
    poll_seconds: float = 0.1,
) -> Iterator[Message]:
    """Send messages and yield the replies in the order of the messages.

    The order makes a sum over replies the same to the last bit, whoever answers first.
    At most ``window`` replies are held here while an earlier one is outstanding.

    For a node that is gone, or whose reply was lost, the SuperLink answers with an error in
    its own name; here it comes in the name of the node.

    Parameters
    ----------
    grid : Grid
    messages : Iterable[Message]
        Sent one by one, so that not all of them are in memory together.
    timeout : float
        Seconds to wait for all replies; what is missing then is left out.
    on_arrival : callable, optional
        Called with each reply when it comes in, before its turn.
    window : int (default: 32)
    poll_seconds : float (default: 0.1)
        Pause between looks at the SuperLink.
    """
    pending: list[str] = []
    asked: dict[str, tuple[int, str]] = {}
    for message in messages:
        pushed = [str(i) for i in grid.push_messages([message]) if i]
        pending += pushed  # empty when the node is gone
        node = message.metadata.dst_node_id, message.metadata.message_type
        asked.update(dict.fromkeys(pushed, node))
    early: dict[str, Message] = {}
    deadline = time.monotonic() + timeout
    while pending:
        late = time.monotonic() >= deadline
        # At the deadline, one last look at everything.
        wanted = [i for i in pending[: None if late else window] if i not in early]
        for reply in grid.pull_messages(wanted) if wanted else ():
            message_id = reply.metadata.reply_to_message_id
            reply = _in_the_name_of(*asked[message_id], reply)
            early[message_id] = reply
            if on_arrival is not None:
                on_arrival(reply)
        while pending and (late or pending[0] in early):
            first = pending.pop(0)
            if first in early:
                yield early.pop(first)
        if pending:
            time.sleep(poll_seconds)


def _in_the_name_of(node_id: int, message_type: str, reply: Message) -> Message:
    """Return a reply as it is, or the SuperLink's error as one of the node that was asked."""
    if not reply.has_error() or reply.metadata.src_node_id == node_id:
        return reply
    return Message(reply.error, reply_to=Message(RecordDict(), node_id, message_type))
