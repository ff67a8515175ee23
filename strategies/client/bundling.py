"""Arrays that travel as one: the client's part."""

from __future__ import annotations

from flwr.app import Context, Message

from strategies.bundles import bundle, mark, marked, unbundle
from strategies.flower import ClientAppCallable


def bundled(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Read and send all arrays of a message as one: a mod for ``ClientApp``.

    ``ClientApp(mods=[bundled, timed])``: a request for each message in place of several for each
    array, where the server is a ``FedLoRA`` behind a SuperLink; anywhere else, and in a
    simulation, it does nothing. The app sees the arrays as ever.

    Raises
    ------
    ValueError
        If the message's arrays cannot be read.
    """
    if not marked(message.content):
        return call_next(message, context)
    unbundle(message.content)
    reply = call_next(message, context)
    if reply.has_content():
        bundle(reply.content)
        mark(reply.content)
    return reply
