"""How long a message was at its client, told with the reply."""

from __future__ import annotations

import time

from flwr.app import ConfigRecord, Context, Message, MetricRecord

from strategies.flower import ClientAppCallable
from strategies.messages import HELD_SECONDS_KEY, TRAIN_SECONDS_KEY


def timed(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Report the seconds from having a message to having its reply: a mod for ``ClientApp``.

    ``ClientApp(mods=[timed])``; last, so that nothing but the app itself is timed. Without it a
    ``MeasuredClock`` only knows the seconds since ``apply_adapter``, and takes what an app did
    before for a part of the network. Replies that do not report their training time, as private
    ones, stay as they are.
    """
    began = time.perf_counter()
    reply = call_next(message, context)
    if reply.has_content():
        found: list[MetricRecord | ConfigRecord] = [
            *reply.content.metric_records.values(),
            *reply.content.config_records.values(),  # a NumPyClient's
        ]
        for record in found:
            if TRAIN_SECONDS_KEY in record:
                record[HELD_SECONDS_KEY] = time.perf_counter() - began
    return reply
