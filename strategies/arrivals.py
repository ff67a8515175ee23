"""Replies from a network, each taken when all of it is there.

Flower's grid hands out a reply as soon as its head is on the SuperLink, and then waits for its
arrays, at first for a second, later for ten, before it looks at the next one: behind a slow link
everybody seems slow, and no time of arrival is right. Here a reply is looked for until its last
part is there, several times a second at first and then every twentieth of the time it takes, and
fetched then; nobody waits behind another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from strategies.bundles import bundle, mark, marked, unbundle
from strategies.flower import (
    Announced,
    announced,
    fetch,
    is_http,
    is_there,
    is_transport_error,
)

# Seconds between two looks at a reply that is on its way, and as a share of the time it took.
SOON, SHARE, MOST = 0.05, 0.05, 1.0
# A reply found by a look that is so much of the whole time after the one before is taken to have
# come halfway between the two; above the second share its time is unknown.
BLUR, BLIND = 0.1, 0.5
# So many messages are asked after at once.
BATCH = 256
# Seconds after which a message is no longer asked after unless somebody wants its reply.
GIVEN_UP = 3600.0


@dataclass
class _Coming:
    """A reply whose head is on the SuperLink."""

    reply: Announced
    since: float
    looked: float
    #: When all of it was found; None before, NaN if nobody had looked for a while.
    came: float | None = None

    def due(self, now: float) -> bool:
        return now - self.looked >= min(max(SOON, SHARE * (now - self.since)), MOST)

    def look(self, grid: Grid, now: float, sent: float) -> None:
        if self.came is None and self.due(now):
            gap, whole = now - self.looked, now - sent
            if is_there(grid, self.reply):
                self.came = time.monotonic()
                if gap > max(2 * MOST, BLUR * whole):  # busy elsewhere, or a look takes long
                    self.came = math.nan if gap > BLIND * whole else now - gap / 2
            self.looked = now


class PromptGrid(Grid):
    """A grid that hands out replies when they are whole, and knows when that was.

    Arrays travel as one to and from nodes whose app can read that (``strategies.bundles``).

    Parameters
    ----------
    grid : Grid
        Flower's, to a SuperLink.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._sent: dict[str, tuple[float, float]] = {}  # when sending began, and was over
        self._coming: dict[str, _Coming] = {}
        self._seconds: dict[str, float | None] = {}
        self._asked = 0.0
        self._able: set[int] = set()  # nodes that read bundles

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids.

        All count as sent when the first is: a node may have its own, and even answer, long before
        Flower's grid is through with the others. A reply that is there by then has come then, as
        far as the round goes.
        """
        now = time.monotonic()
        ids = list(self.grid.push_messages([self._going(message) for message in messages]))
        self._sent = {i: sent for i, sent in self._sent.items() if now - sent[0] < GIVEN_UP}
        self._sent.update(dict.fromkeys((str(i) for i in ids if i), (now, time.monotonic())))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages that are wholly there.

        It is noted when others came, but their arrays stay where they are.
        """
        wanted = list(message_ids)
        self._look(wanted)
        found: list[Message] = []
        for message_id in wanted:
            if time.monotonic() - self._asked > MOST:  # others come while these are fetched
                with suppress(Exception):  # the next pull meets it again, with nothing to lose
                    self._look([i for i in wanted if i in self._sent])
            there = self._coming.get(message_id)
            if there is None or there.came is None:
                continue
            try:
                replies = [self._came(reply) for reply in fetch(self.grid, there.reply)]
            except Exception as error:  # whatever the bytes of a client make Flower's decoder raise
                if found and not is_transport_error(error):
                    continue  # next time, when it loses nobody else's
                if len(wanted) == 1:
                    self._done(message_id, there.came)
                raise
            self._done(message_id, there.came)
            found += replies
        return found

    def _look(self, wanted: Sequence[str]) -> None:
        """Look which replies are there, wanted ones and others."""
        now = time.monotonic()
        before, self._asked = self._asked, now
        others = (i for i in self._sent if i not in wanted)
        ids = [i for i in (*wanted, *islice(others, BATCH)) if i not in self._coming]
        for reply in announced(self.grid, ids) if ids else []:
            _, over = self._sent.get(reply.reply_to, (0.0, 0.0))
            self._coming[reply.reply_to] = _Coming(reply, now, max(min(before, now - MOST), over))
        for message_id, coming in self._coming.items():
            sent, _ = self._sent.get(message_id, (now, now))
            coming.look(self.grid, now, sent)

    def seconds(self, message_id: str) -> float | None:
        """Return the time from sending a message to its reply; None if nobody looked for a while.

        Once, after it was pulled.
        """
        return self._seconds.pop(message_id, None)

    def _going(self, message: Message) -> Message:
        if message.has_content():
            if message.metadata.dst_node_id in self._able:
                bundle(message.content)
            mark(message.content)
        return message

    def _came(self, reply: Message) -> Message:
        if reply.has_content():
            if marked(reply.content):
                self._able.add(reply.metadata.src_node_id)
            unbundle(reply.content)
        return reply

    def _done(self, message_id: str, came: float) -> None:
        del self._coming[message_id]
        sent, _ = self._sent.pop(message_id, (math.nan, math.nan))
        self._seconds[message_id] = None if math.isnan(came - sent) else came - sent

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run."""
        return self.grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as Flower's grid does."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return what is known of them."""
        return self.grid.get_nodes()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for the replies, as Flower's grid does."""
        return self.grid.send_and_receive(messages, timeout=timeout)


def prompt(grid: Grid) -> Grid:
    """Return a grid whose replies are taken when they are whole; where none is late, the same."""
    return PromptGrid(grid) if is_http(grid) else grid
