"""Who is asked when, how long a round waits, and what a reply counts that comes later."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid

from strategies.aggregation import Aggregator, Update
from strategies.clients import Client
from strategies.listing import listed
from strategies.packing import Packing
from strategies.participation import Participation
from strategies.round.lasting import LastingOrders, Rng
from strategies.round.orders import Orders
from strategies.round.waiting import Waiting, refuse_late, refuse_waiting
from strategies.rounds import Assignment, Round
from strategies.transport import WINDOW, Asked, Meanwhile, OnArrival, exchange
from strategies.wallclock import MeasuredClock
from strategies.wallclock.clock import RoundTime

Give = Callable[[Sequence[tuple[Client, int]]], Iterator[Message]]


class Flow(LastingOrders):
    """The orders of a run: placed, on their way, answered in time or later.

    Parameters
    ----------
    waiting : Waiting
    participation : Participation
    orders : Orders
    rng : callable
        Returns the generator of a round and purpose.
    """

    def __init__(
        self, waiting: Waiting, participation: Participation, orders: Orders, rng: Rng
    ) -> None:
        super().__init__(waiting, rng)
        self.participation = participation
        self.orders = orders
        #: Whether late replies count; set once it is known that the run can take them.
        self.keeps_late = False
        self.timeout = math.inf  # seconds after which an order is given up
        self.strict = waiting.overlaps
        self._chosen = 0  # without over-selection
        #: Gives more clients of the round in progress their orders.
        self._place: Callable[[Sequence[tuple[Client, int]]], Iterator[Message]] = lambda _: iter(
            ()
        )
        self._book = Round(0)
        self._ahead: list[Assignment] = []  # on their way to be looked at
        self._sent_at = 0.0  # when the round's messages were
        self._zero: float | None = None  # when the run's clock began, by this machine's

    def check(self, rule: Aggregator[Any], **noise: bool) -> None:
        """Refuse what the run cannot do, and see whether late replies can count.

        Parameters
        ----------
        rule : Aggregator
        **noise : bool
            Whether noise of privacy is added, as ``refuse_waiting`` takes it.

        Raises
        ------
        ValueError
            With every reason.
        """
        sampler = self.participation.sampler
        if problems := refuse_waiting(self.waiting, rule, sampler, **noise):
            raise ValueError("waiting: " + "; ".join(problems))
        self.keeps_late = self.waiting.staleness != "drop" and not refuse_late(rule, **noise)

    def refuse_other_loops(self) -> None:
        """Refuse a loop that collects all replies of a round before it hands on any.

        Raises
        ------
        ValueError
            If a round may be over before.
        """
        if self.waiting.closes:
            raise ValueError(
                f"waiting ({self.waiting.summary()}) works in the start of FedLoRA itself alone: "
                "another strategy's loop waits for everybody; call that, or leave waiting out"
            )

    def summary(self, rule: Aggregator[Any], **noise: bool) -> str:
        """Return the settings in one line; see ``check`` for the parameters."""
        late = f"late replies count {self.waiting.discount(1):.2g} a round later"
        if self.waiting.staleness == "drop":
            late = "late replies are dropped"
        elif why := refuse_late(rule, **noise):
            late = f"late replies are dropped, since {why}"
        return f"{self.waiting.summary()}; {late}"

    # ----- who is asked ----------------------------------------------------------------

    @property
    def busy(self) -> Mapping[int, Assignment]:
        """The nodes that are still at an order of an earlier round, which will count."""
        return self.outstanding.busy

    def idle(self, clients: Sequence[Client]) -> list[Client]:
        """Return who is free to answer something else than an order of an earlier round."""
        busy = self.busy if self.real else {}
        return [client for client in clients if client.node_id not in busy]

    def extend(
        self, chosen: Sequence[Client], idle: Sequence[Client], rng: np.random.Generator
    ) -> list[Client]:
        """Return whom to ask: whom the sampler has chosen, and as many more as is wanted.

        Where rounds overlap, so many as are missing of those that are to train at a time.
        """
        self._chosen = len(chosen)
        size = len(chosen) + self.waiting.more_than(len(chosen))
        if self.waiting.overlaps:
            self._wanted = self._wanted or len(chosen)
            size = max(self._wanted - len(self.outstanding.orders), 0)
            chosen = [chosen[i] for i in rng.permutation(len(chosen))][:size]
        known = {client.node_id for client in chosen}
        rest = [client for client in idle if client.node_id not in known]
        size = min(size - len(chosen), len(rest))
        more = rng.choice(len(rest), size=size, replace=False) if size > 0 else ()
        return sorted([*chosen, *(rest[i] for i in more)], key=lambda client: client.index)

    def place(
        self,
        chosen: Sequence[tuple[Client, int]],
        book: Round,
        packing: Packing,
        config: ConfigRecord,
        model_round: int,
    ) -> Iterator[Message]:
        """Give the chosen clients of a round their orders; see ``Orders.place``."""
        self._book = book

        def give(clients: Sequence[tuple[Client, int]]) -> Iterator[Message]:
            messages = self.orders.place(clients, book, packing, config, model_round, self.rng)
            for client, _ in clients:
                order = book.assignments[client.node_id]
                order.weight = self.participation.weights.get(client.index)
                self._number += 1
                order.number = self._number
                self.started(order)
            return messages

        self._place = give
        return give(chosen)

    def started(self, order: Assignment) -> None:
        """Learn of an order that was placed."""

    def more(self) -> Iterator[Message]:
        """Return the orders of clients that take the place of those that have answered."""
        if not self.waiting.overlaps or self.over():
            return iter(())
        ahead = {order.number for order in self._ahead}
        under_way = [o for o in self.outstanding.orders.values() if o.number not in ahead]
        busy = {order.client.node_id for order in under_way}
        free = [
            client
            for client in self.participation.here()
            if client.node_id not in busy and client.node_id not in self._book.assignments
        ]
        size = min(self._wanted - len(under_way), len(free))
        if size <= 0:
            return iter(())
        rng = self.rng(self._book.number, 5, self._number)
        drawn = [free[i] for i in sorted(rng.choice(len(free), size=size, replace=False))]
        for client in drawn:
            self.participation.asked(client)
        messages = self._place(
            [(client, self.participation.trained[client.index]) for client in drawn]
        )
        for client in drawn:
            self.outstanding.open[client.node_id] = self._book.assignments[client.node_id]
        return messages

    def begin(self, book: Round, grid: Grid, empty: Sequence[float]) -> frozenset[int]:
        """Return who will be late by a simulated clock, and learn what the clock expects.

        Parameters
        ----------
        book : Round
        grid : Grid
        empty : Sequence[float]
            How long answers without content took, in seconds.
        """
        time = self.participation.begin(book.works(), book.number, grid, empty)
        if self.real:
            self.patience.expect(time, [a.client.index for a in book.assignments.values()])
        return time.late

    @property
    def virtual(self) -> bool:
        """Whether messages are made when the clock says so."""
        return False

    @property
    def real(self) -> bool:
        """Whether the seconds of the run are those of this machine."""
        return isinstance(self.participation.clock, MeasuredClock)

    # ----- how long a round waits --------------------------------------------------------

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
        """Send a round's messages and yield replies until it has waited long enough."""
        self.timeout = timeout
        if self._zero is None:
            self._zero = time.perf_counter() - self.participation.seconds
        self._sent_at = time.perf_counter()
        self.in_order = not self.waiting.closes
        self.give_up_old()
        again, self.revived = self.revived, []
        messages = chain(map(self.orders.message, again), messages)
        for order in again:
            self.outstanding.unsent[order.client.node_id] = order
        return exchange(
            grid, messages, timeout,
            on_arrival=on_arrival, name=name, meanwhile=meanwhile, until=self,
        )  # fmt: skip

    def sent(self, message_id: str, message: Message) -> None:
        """Note under which id an order is on its way."""
        self.outstanding.sent(message_id, message)

    def older(self) -> Mapping[str, Asked]:
        """Return the orders of rounds before whose replies count."""
        return {o.message_id: (o.client.node_id, "train") for o in self.outstanding.older()}

    def waits(self, own: int) -> bool:
        """Return whether there is anything to wait for.

        A synchronous round waits for its own; where everybody is still at an earlier order, for the
        first of these.
        """
        ahead = sum(order.message_id in self.outstanding.orders for order in self._ahead)
        if own or len(self.outstanding.orders) <= ahead:
            return own > 0
        return self.waiting.overlaps or not (self._book.assignments or self._book.older or ahead)

    def taking(self, reply: Message) -> None:
        """Count a reply as good until it is known; counts of the first few are seen beforehand."""
        order = self.outstanding.of(reply)
        if order is not None and not reply.has_error():
            self._ahead.append(order)

    def over(self) -> bool:
        """Return whether there are as many good replies as are needed."""
        book, everybody = self._book, self.waiting.overlaps
        self._ahead = [o for o in self._ahead if o.message_id in self.outstanding.orders]
        good = book.accepted if everybody else book.accepted - book.stale
        good += sum(everybody or order.asked == book.number for order in self._ahead)
        return good >= self.waiting.needed(self._chosen)

    def left(self, waited: float) -> float:
        """Return for how many more seconds it is reasonable to wait, after so many."""
        deadline = self.waiting.deadline
        if deadline and deadline != "auto":
            return float(deadline) - waited
        if not self.real:
            return math.inf
        book = self._book
        if self.waiting.overlaps:  # it ends when everybody under way is silent for too long
            now = time.perf_counter()
            ages = [now - order.sent_at for order in self.outstanding.orders.values()]
            waited = min(ages, default=0.0)
        seen = [a.elapsed_seconds for a in book.assignments.values() if a.elapsed_seconds]
        asked = min(len(book.assignments), WINDOW)  # of more, the first must answer first
        limit = self.patience.limit(seen, asked, auto=deadline == "auto")
        return limit - waited

    # ----- what becomes of replies -------------------------------------------------------

    def late(self, order: Assignment, book: Round) -> float:
        """Return what part of its weight an order counts; note it with a round it is late for."""
        order.staleness = book.number - order.asked if order.asked else 0
        self._note_ended(order)
        if not order.staleness:
            return 1
        book.older.append(order)
        return self.waiting.discount(order.staleness)

    def _note_ended(self, order: Assignment) -> None:
        """Note from when to when an order was under way, where rounds do not tell that."""
        if self._zero is not None and (self.waiting.closes or order.staleness):
            now = time.perf_counter()
            seconds = (
                now - order.sent_at if order.elapsed_seconds is None else order.elapsed_seconds
            )
            order.began = order.sent_at - self._zero
            order.ended = order.began + seconds

    def update(self, update: Update, order: Assignment, part: float) -> Update:
        """Return an update as it counts: one to an older model as what it has changed.

        In a synchronous round it weighs less, among the others; where every round is of a few
        replies, be it one, it moves the model less.
        """
        if not order.staleness:
            return update
        if self.waiting.overlaps:
            return replace(update, late=part)
        return replace(update, weight=update.weight * part, late=1.0)

    def unanswered(self, book: Round) -> list[Assignment]:
        """Return whose answer is nobody's any more; those that are late are noted as such."""
        given_up, late = [], []
        waited = self.waited()
        for order in list(self.outstanding.open.values()):
            if self.waiting.overlaps:
                order.status = "busy"
                continue
            self.patience.missed(order.client.index, waited)
            keep = self.keeps_late and self.real and bool(order.message_id)
            if self.virtual or (keep and waited < self.timeout):
                book.wait_for(order, alive=self.virtual)
                late.append(order.client.name)
                if self._zero is not None:
                    order.began = order.sent_at - self._zero
            else:
                given_up.append(order)
            if order in given_up or not self.keeps_late:
                self.drop(order)
        self.outstanding.open = {}
        if late:
            then = "still counts" if self.keeps_late else "does not count"
            log(INFO, "round %s: over without %s; what they send later %s",
                book.number, listed(late, 5), then)  # fmt: skip
        return given_up

    def waited(self) -> float:
        """Return for how many seconds of the run's clock this round has waited."""
        return time.perf_counter() - self._sent_at

    def drop(self, order: Assignment) -> None:
        """Wait no more for an order."""
        self.outstanding.drop(order)

    def give_up_old(self) -> None:
        """Forget orders that nobody has answered for as long as a round may last."""
        now = time.perf_counter()
        for order in self.outstanding.older():
            if now - order.sent_at >= self.timeout:
                log(WARNING, "%s: no answer to round %s within %.0f s; it is asked anew",
                    order.client.name, order.asked, self.timeout)  # fmt: skip
                self.drop(order)

    def forget(self, index: int) -> None:
        """Forget the orders of a client whose place is another's now."""
        self.patience.answered(index)
        for order in self.outstanding.older():
            if order.client.index == index:
                self.drop(order)

    def finish(self, book: Round) -> RoundTime:
        """Return the time of a round that is over, and learn from it."""
        for order in (*book.assignments.values(), *book.older):
            if order.status == "ok":
                self.patience.answered(order.client.index)
        self.participation.clock.learn([order.work() for order in book.older], book.number)
        return self.participation.finish(book.works(), book.number)
