"""Rounds that do not wait, on a simulated clock: all in the order of the clock [D].

What happens when is decided before anybody trains, from the planned bytes and the steps each client
did last time; this machine trains what will arrive next, a few orders ahead, in whatever order it
likes. So the same seed gives the same bytes, however fast the machine is, and a message is made
when it is sent: thousands that are under way on the clock are no messages yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from strategies.participation import Participation
from strategies.round.flow import Flow
from strategies.round.lasting import Rng, seeded
from strategies.round.orders import Orders
from strategies.round.waiting import Waiting
from strategies.rounds import Assignment, Round
from strategies.transport import (
    SOON,
    WINDOW,
    Meanwhile,
    OnArrival,
    error_of,
    look_for,
    push,
)
from strategies.wallclock import MeasuredClock, SimulatedClock
from strategies.wallclock.clock import RoundTime
from strategies.wallclock.events import Event, Events

#: So many orders are at most on this machine's grid without being needed yet.
AHEAD = WINDOW
#: Flower's codes of an error for a node that is gone, and for a reply that did not come.
GONE, SILENT = 5, 6


def make_flow(waiting: Waiting, participation: Participation, orders: Orders, seed: int) -> Flow:
    """Return the flow of a run: in virtual time where its clock is simulated and nobody waits.

    A simulated clock's own deadline is that of rounds which drop who is late: its best shares of
    the band can be known in advance.
    """
    clock, w, rng = participation.clock, waiting, partial(seeded, seed)
    if not isinstance(clock, SimulatedClock) or not w.closes:
        return Flow(waiting, participation, orders, rng)
    if w == Waiting(deadline=w.deadline, staleness="drop") and w.deadline != "auto":
        clock.deadline = float(w.deadline)
        return Flow(Waiting(staleness="drop"), participation, orders, rng)
    return VirtualFlow(waiting, participation, orders, rng, clock)


class VirtualFlow(Flow):
    """The orders of a run, on the way by a simulated clock.

    Parameters
    ----------
    waiting, participation, orders, rng
        As in ``Flow``.
    clock : SimulatedClock
        Says what computing and uploading take; the band is shared equally at every moment.
    """

    def __init__(
        self,
        waiting: Waiting,
        participation: Participation,
        orders: Orders,
        rng: Rng,
        clock: SimulatedClock,
    ) -> None:
        super().__init__(waiting, participation, orders, rng)
        self.clock = clock
        self.in_order = False
        self.events = Events(1.0)  # uploads in seconds of the whole band
        self.pace = MeasuredClock()  # of the clock's seconds, for a deadline of its own accord
        self._by_number: dict[int, Assignment] = {}
        self._on_grid: set[int] = set()  # numbers of orders that this machine is at
        self._began = 0.0
        self._last: Assignment | None = None

    @property
    def virtual(self) -> bool:
        """Whether messages are made when the clock says so."""
        return True

    def started(self, order: Assignment) -> None:
        """Begin with an order now, by the clock."""
        order.message_id = f"order-{order.number}"
        order.began = self.events.now
        self.outstanding.orders[order.message_id] = order
        self._by_number[order.number] = order
        compute, upload = self.clock.order(order.work(), order.asked)
        index = order.client.index
        present = self.clock.availability.look([index], self.events.now)
        gone = float(present.until[0]) if present.here[0] else self.events.now
        self.events.start(order.number, compute, upload, gone)

    def place(self, *args: Any) -> Iterator[Message]:
        """Give the chosen clients of a round their orders, at the second the clock is at."""
        while self.events.now < self.clock.now:  # nobody was there, and nothing was under way
            self.events.next(self.clock.now)
        self._began = self.events.now
        self._last = None
        return super().place(*args)

    def begin(self, book: Round, grid: Grid, empty: Sequence[float]) -> frozenset[int]:
        """Learn how long the clients of a round are expected to need; nobody is late yet."""
        self.patience.expect(
            self.pace.forecast(book.works(), book.number),
            [a.client.index for a in book.assignments.values()],
        )
        return frozenset()

    def collect(
        self,
        grid: Grid,
        messages: Iterable[Message],
        timeout: float,
        *,
        on_arrival: OnArrival,
        name: Callable[[int], str],
        meanwhile: Meanwhile | None,
    ) -> Iterator[Message]:
        """Yield replies in the order of the clock, until the round has waited long enough."""
        self.timeout = timeout
        own = len(self.outstanding.open)
        self._send_ahead(grid)
        if meanwhile is not None:
            meanwhile.start()
            meanwhile.finish()
        while self.waits(own) and not self.over():
            event = self.events.next(self._began + self._limit())
            if event is None:
                break
            order = self._by_number.pop(event.key)
            own -= self.outstanding.open.get(order.client.node_id) is order
            reply = self._reply(grid, order, event)
            on_arrival(reply, None)
            self.taking(reply)
            self._last = order
            yield reply
            self.clock.now = self.events.now
            before = self._number
            self.more()  # who takes its place has begun; messages are made when they are sent
            own += self._number - before

    def _limit(self) -> float:
        """Return after how many seconds of the clock a round is over at the latest."""
        deadline = self.waiting.deadline
        if deadline == "auto":
            return self.patience.limit((), 1, auto=True)
        return float(deadline) or math.inf

    def waited(self) -> float:
        """Return for how many seconds of the run's clock this round has waited."""
        return self.events.now - self._began

    # ----- this machine -------------------------------------------------------------------

    def _reply(self, grid: Grid, order: Assignment, event: Event) -> Message:
        """Return what an order has become: the reply to it, or that its client is gone."""
        order.ended = event.seconds
        began = self.events.now if order.began is None else order.began
        order.elapsed_seconds = event.seconds - began
        order.computed_seconds = min(event.computed, event.seconds) - began
        asked = order.client.node_id, "train"
        if event.kind == "gone":
            self._on_grid.discard(order.number)
            reason = f"went away at {event.seconds:.6g} s of the clock"
            return error_of(order.message_id, asked, Error(GONE, reason))
        if order.number not in self._on_grid:
            self._push(grid, order)
        self._send_ahead(grid)
        patient_until, pause = time.monotonic() + self.timeout, SOON
        while time.monotonic() < patient_until:
            for _, reply in look_for(grid, [order.message_id], {order.message_id: asked}):
                self._on_grid.discard(order.number)
                return reply
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)
        return error_of(order.message_id, asked, Error(SILENT, "no answer on this machine"))

    def _send_ahead(self, grid: Grid) -> None:
        """Have this machine train what the clock will need next."""
        if len(self._on_grid) > AHEAD // 2:
            return
        for number in self.events.soonest(AHEAD):
            if number not in self._on_grid and len(self._on_grid) < AHEAD:
                self._push(grid, self._by_number[number])

    def _push(self, grid: Grid, order: Assignment) -> None:
        for message_id, _ in push(grid, [self.orders.message(order)]):
            self.outstanding.rename(order, message_id)
            self._on_grid.add(order.number)

    # ----- the end of a round ---------------------------------------------------------------

    def drop(self, order: Assignment) -> None:
        """Wait no more for an order; its client is free for another."""
        super().drop(order)
        self.dropped(order.number)

    def dropped(self, number: int) -> None:
        """Have an order end by the clock as well."""
        self.events.drop(number)
        self._by_number.pop(number, None)
        self._on_grid.discard(number)

    def finish(self, book: Round) -> RoundTime:
        """Return the time of a round that is over, and learn from it."""
        done = [a for a in (*book.older, *book.assignments.values()) if a.status == "ok"]
        for order in done:
            self.patience.answered(order.client.index)
            self.clock.learn([order.work()], book.number)
            self.pace.learn([replace(order.work(), train_seconds=None)], book.number)
        if book.empty:
            self.events.next(self.events.now + self.clock.idle_seconds)
        time = RoundTime(
            seconds=self.events.now - self._began,
            bottleneck=None if self._last is None else self._last.client.index,
            compute_seconds={a.client.index: a.computed_seconds for a in done},
            upload_seconds={
                a.client.index: (a.elapsed_seconds or 0.0) - a.computed_seconds for a in done
            },
            late=frozenset(a.client.index for a in book.assignments.values() if a.status == "late"),
        )
        self.participation.pass_to(self.events.now)
        return time

    # ----- what lasts -----------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Return what has a state that must last, by its name in a checkpoint."""
        return {"waiting": self}

    def state_dict(self) -> dict[str, Any]:
        """Return what must last, as JSON can hold it."""
        own = {"events": self.events.state_dict(), "pace": self.pace.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Any) -> None:
        """Put back what ``state_dict`` returned."""
        super().load_state_dict(state)
        if "events" in state:
            self.events.load_state_dict(state["events"])
            self.pace.load_state_dict(state["pace"])

    def restart(self, order: Assignment) -> None:
        """Go on with an order of a run that was resumed: by the clock it is where it was."""
        self._by_number[order.number] = order
        self.revived.remove(order)
