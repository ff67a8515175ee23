"""Send messages and collect replies in a fixed order, holding few of them at a time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from logging import INFO
from threading import Thread

from flwr.app import Error, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from strategies.arrivals import PromptGrid
from strategies.durations import duration
from strategies.flower import is_transport_error
from strategies.listing import listed
from strategies.messages import record_bytes

# Replies past this many unanswered messages stay on the SuperLink, not in this process.
WINDOW = 32
# Over a network so many bytes of arrays are sent together: of messages that go one after the other
# the first are answered before the last is sent, and nobody looks at replies meanwhile.
TOGETHER = 2**25
# Seconds between two looks at a message, above which nobody knows when its reply came.
BLUR = 0.5
# Seconds to the next look after one by which somebody's turn came; it grows to ``poll_seconds``.
SOON, SLOWER = 0.01, 1.5
# Seconds between two lines of the log that say whom a run waits for.
PATIENCE = 60.0
UNREADABLE = 0  # Flower's code of an unknown error

OnArrival = Callable[[Message, float | None], None]
Asked = tuple[int, str]  # the node and the type of a message


class Until:
    """When enough replies are in. This one waits for all of them, in the order of the messages."""

    #: Whether replies are yielded in the order of their messages, or as they come.
    in_order = True
    #: Whether it is asked after every reply if it is over, or after all that came together.
    strict = False

    def __init__(self) -> None:
        #: Replies that came when it was over already, for the next one.
        self.kept: deque[Message] = deque()

    def sent(self, message_id: str, message: Message) -> None:
        """Learn under which id a message is on its way."""

    def older(self) -> Mapping[str, Asked]:
        """Return the messages of before whose replies are taken too, by id."""
        return {}

    def taking(self, reply: Message) -> None:
        """Learn that a reply is about to be yielded; who gets it may look at some more first."""

    def waits(self, own: int) -> bool:
        """Return whether there is anything to wait for, with so many messages of its own left."""
        return own > 0

    def over(self) -> bool:
        """Return whether enough is in."""
        return False

    def left(self, waited: float) -> float:
        """Return for how many more seconds it is reasonable to wait, after so many."""
        return math.inf

    def more(self) -> Iterable[Message]:
        """Return what is to be sent now that a reply was taken."""
        return ()


class Meanwhile:
    """Work for the time in which clients train; in a thread of its own.

    Parameters
    ----------
    work : callable
        Must not touch what sending and collecting replies does.
    then : callable
        What is to be done with it in the thread of the caller, before the first reply is used.
    """

    def __init__(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        self._work = work
        self._then = then
        self._error: BaseException | None = None
        self._begun = self._over = False
        self._thread = Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._begun = True
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it is still at it."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the end of it, or do it now if it was never begun; raise what it raised.

        A second time it does nothing.
        """
        if self._over:
            return
        self._over = True
        if self._begun:
            self._thread.join()
        else:
            self._run()
        if self._error is not None:
            raise self._error
        self._then()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    *,
    on_arrival: OnArrival | None = None,
    name: Callable[[int], str] = "node {}".format,
    meanwhile: Meanwhile | None = None,
    until: Until | None = None,
    window: int = WINDOW,
    batch: int = 1,
    poll_seconds: float = 0.1,
) -> Iterator[Message]:
    """Send messages and yield the replies, in the order of the messages.

    The order makes a sum over replies the same to the last bit, whoever answers first.
    At most ``window`` replies are held here while an earlier one is outstanding.

    For a node that is gone, or whose reply was lost or cannot be decoded, there is a reply with
    an error in the name of the node. Once a minute the log says whom it waits for.

    Parameters
    ----------
    grid : Grid
    messages : Iterable[Message]
    timeout : float
        Seconds to wait for all replies; what is missing then is left out.
    on_arrival : callable, optional
        Called with each reply when it comes in, before its turn, and the seconds since its
        message was sent: None where nobody looked for a while, since it was outside the window
        or the caller was busy, so that the time says nothing about the client.
    name : callable
        Returns how the log calls a node. (default: ``node 123``)
    meanwhile : Meanwhile, optional
        Begun when all messages are on their way, and finished before the first reply is yielded.
    until : Until, optional
        May end it earlier, and take replies as they come. (default: it waits for all)
    window : int (default: 32)
    batch : int (default: 1)
        So many messages are handed to the grid together. One: those with arrays need not all be in
        memory at once; over a network up to ``TOGETHER`` bytes of them are.
    poll_seconds : float (default: 0.1)
        The longest pause after a look at the SuperLink by which nobody's turn came.
    """
    until = until or Until()
    pending: deque[str] = deque()
    asked: dict[str, Asked] = {}
    sent: dict[str, float] = {}
    looked: dict[str, float] = {}  # when a message was last looked at

    def send(some: Iterable[Message]) -> None:
        for message_id, message in push(grid, list(some)):
            pending.append(message_id)
            asked[message_id] = message.metadata.dst_node_id, message.metadata.message_type
            sent[message_id] = looked[message_id] = time.monotonic()
            until.sent(message_id, message)

    network = isinstance(grid, PromptGrid)
    for some in _portions(messages, max(batch, WINDOW) if network else batch):
        send(some)
    own = frozenset(asked) if until.in_order else frozenset()  # those whose turn is waited for
    before = until.older()
    older = deque(before)
    asked |= before
    if meanwhile is not None:
        meanwhile.start()
    early: dict[str, Message] = {}
    ready, until.kept = until.kept, deque()  # whose turn it is
    began = time.monotonic()
    tell_at = began + PATIENCE
    pause = SOON
    while ready or until.waits(len(pending)):
        now = time.monotonic()
        left = min(began + timeout - now, until.left(now - began))
        late = left <= 0
        if until.in_order:
            wanted = [i for i in islice(pending, window) if i not in early]
        else:
            wanted = _next(pending, len(pending) if late else window)
        wanted += _next(older, window)
        for message_id, reply in _pull_all(grid, wanted, asked, window):
            if message_id in own:
                early[message_id] = reply
            elif (waiting := next((w for w in (pending, older) if message_id in w), None)) is None:
                continue  # a second time
            else:
                ready.append(reply)
                waiting.remove(message_id)
            if on_arrival is not None:
                just_now = now - looked.get(message_id, -math.inf) <= max(BLUR, 2 * poll_seconds)
                took = (
                    time.monotonic() - sent[message_id] if just_now and message_id in sent else None
                )
                if isinstance(grid, PromptGrid):
                    took = grid.seconds(message_id)
                on_arrival(reply, took)
        looked.update(dict.fromkeys(wanted, now))
        if meanwhile is not None:
            if meanwhile.running and not late:
                time.sleep(poll_seconds)
                continue
            meanwhile.finish()
            meanwhile = None
        moved = bool(ready)
        while ready and not (until.strict and until.over()):
            until.taking(ready[0])
            yield ready.popleft()
            send(until.more())
        # At the deadline, one last look at everything, a window after the other.
        for _ in range(min(window, len(pending)) if until.in_order else 0):
            if not (late or pending[0] in early):
                break
            moved = True
            first = pending.popleft()
            if first in early:
                yield early.pop(first)
        if until.over() or (late and not (until.in_order and pending)):
            break
        if pending and not late and now >= tell_at:
            tell_at = now + PATIENCE
            silent = [name(asked[i][0]) for i in pending if i not in early]
            log(INFO, "waiting for %s, up to %s more", listed(silent, 5), duration(left))
        if moved:  # then others are in the window now, and may be there
            pause = SOON
        elif pending or older:
            time.sleep(min(pause, poll_seconds))
            pause = min(SLOWER * pause, poll_seconds)
    until.kept = ready
    if meanwhile is not None:  # nobody was there to be asked
        meanwhile.finish()


def _portions(messages: Iterable[Message], most: int) -> Iterator[list[Message]]:
    """Return messages in portions of at most so many, and about ``TOGETHER`` bytes."""
    some: list[Message] = []
    nbytes = 0
    for message in messages:
        some.append(message)
        if message.has_content():
            nbytes += sum(map(record_bytes, message.content.array_records.values()))
        if len(some) >= most or nbytes >= TOGETHER:
            yield some
            some, nbytes = [], 0
    if some:
        yield some


def _next(ids: deque[str], count: int) -> list[str]:
    """Return the next of some ids, which then come last."""
    found = list(islice(ids, count))
    ids.rotate(-len(found))
    return found


def push(grid: Grid, messages: Sequence[Message]) -> list[tuple[str, Message]]:
    """Send messages; return those that were taken with their ids. The node of others is gone."""
    ids = [None if i is None else str(i) for i in grid.push_messages(messages)]
    if len(ids) == len(messages):
        return [(i, message) for i, message in zip(ids, messages, strict=True) if i]
    taken = set(ids)  # a simulation leaves out what it did not take
    return [(m.metadata.message_id, m) for m in messages if m.metadata.message_id in taken]


def _pull_all(
    grid: Grid, wanted: Sequence[str], asked: Mapping[str, Asked], window: int
) -> Iterator[tuple[str, Message]]:
    """Return the replies that are there, looked for a window after the other."""
    for start in range(0, len(wanted), window):
        yield from look_for(grid, wanted[start : start + window], asked)


def look_for(
    grid: Grid, wanted: Sequence[str], asked: Mapping[str, Asked]
) -> Iterator[tuple[str, Message]]:
    """Return the replies that are there by the id of their message; one by one after an error."""
    if not wanted:
        return
    try:
        replies = list(grid.pull_messages(wanted))
    except Exception as error:  # whatever the bytes of a client make Flower's decoder raise
        if is_transport_error(error):
            raise
        if len(wanted) > 1:
            for message_id in wanted:
                yield from look_for(grid, [message_id], asked)
            return
        (message_id,) = wanted
        reason = f"the reply cannot be read ({type(error).__name__})"
        yield message_id, error_of(message_id, asked[message_id], Error(UNREADABLE, reason))
        return
    for reply in replies:
        message_id = reply.metadata.reply_to_message_id
        if message_id in asked:
            yield message_id, _in_the_name_of(message_id, asked[message_id], reply)


def _in_the_name_of(message_id: str, asked: Asked, reply: Message) -> Message:
    """Return a reply as it is, or the SuperLink's error as one of the node that was asked."""
    if not reply.has_error() or reply.metadata.src_node_id == asked[0]:
        return reply
    return error_of(message_id, asked, reply.error)


def error_of(message_id: str, asked: Asked, error: Error) -> Message:
    """Return an error as the reply to a message, in the name of the node that was asked."""
    node_id, message_type = asked
    message = Message(RecordDict(), node_id, message_type)
    message.metadata.__dict__["_message_id"] = message_id
    return Message(error, reply_to=message)
