"""The intake of trained adapters: one reply after the other, folded in or refused by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from logging import WARNING

from flwr.app import Message
from flwr.common import log

from strategies.aggregation import Update
from strategies.census import Census
from strategies.claims import REASON_LENGTH, ReplyError, clean
from strategies.clients import Client
from strategies.lora import Adapter
from strategies.messages import Reply, check_size, content_bytes, reply_error
from strategies.packing import Packing
from strategies.participation import Participation
from strategies.privacy import NoPrivacy, PrivateRun, clip_update
from strategies.privacy.outside import OutsideNoise
from strategies.ranks import RankPolicy
from strategies.records import ClientRecord
from strategies.round.flow import Flow
from strategies.round.replies import Replies
from strategies.rounds import Assignment, Round
from strategies.trained import Trained


@dataclass(frozen=True)
class Accepted:
    """A reply that is in the sum."""

    client: Client
    adapter: Adapter


@dataclass(frozen=True)
class Rejected:
    """A reply that cannot be used, or none."""

    client: Client
    reason: str


@dataclass(frozen=True)
class Late:
    """A good reply that a simulated deadline leaves out, and that nobody waits for any more."""

    client: Client


class Intake:
    """Reads replies, bounds what each may do, and lets policies learn from the good ones.

    Parameters
    ----------
    replies : Replies
    participation : Participation
    census : Census
    policy : RankPolicy
    privacy : PrivateRun or NoPrivacy
    outside : OutsideNoise
    clip_norm : float
        A larger change is scaled down to it; 0: none is.
    flow : Flow
        Knows which order a reply is to, what it counts if it is late, and which replies may come
        after their round.
    """

    def __init__(
        self,
        replies: Replies,
        participation: Participation,
        census: Census,
        policy: RankPolicy,
        privacy: PrivateRun | NoPrivacy,
        outside: OutsideNoise,
        clip_norm: float,
        flow: Flow,
    ) -> None:
        self.flow = flow
        self.replies = replies
        self.participation = participation
        self.census = census
        self.policy = policy
        self.privacy = privacy
        self.outside = outside
        self.clip_norm = clip_norm
        #: The good replies of this round, their numbers without their arrays.
        self.good: list[Reply] = []
        #: That of the round; None before the first.
        self.packing: Packing | None = None
        self._book = Round(0)
        self._late: Collection[int] = ()

    def open(self, book: Round, packing: Packing, late: Collection[int]) -> None:
        """Begin with a round.

        Parameters
        ----------
        book : Round
            Says who was asked, and is filled in.
        packing : Packing
        late : Collection[int]
            Indices of who will miss the deadline.
        """
        self.good = []
        self._book, self.packing, self._late = book, packing, late
        self.flow.outstanding.begin(book)

    def take(
        self, message: Message, fold: Callable[[Update], None]
    ) -> Accepted | Rejected | Late | None:
        """Take one reply; None for one that nobody waits for.

        Parameters
        ----------
        message : Message
        fold : callable
            Takes a good update into the sum; an error of it refuses the reply.
        """
        assignment = self.flow.outstanding.claim(message)
        if assignment is None or self.packing is None:
            log(WARNING, "ignored a reply of node %s: it was not asked in this round or "
                "answered before", message.metadata.src_node_id)  # fmt: skip
            return None
        packing = assignment.packing or self.packing  # of the model it was trained from
        part = self.flow.late(assignment, self._book)
        clock = time.perf_counter()
        client, parcel = assignment.client, assignment.parcel
        received = 0
        try:
            if reason := reply_error(message):
                raise ReplyError(reason)
            received = content_bytes(message.content)
            check_size(message.content, parcel.expected, parcel.upload_bytes)
            reply = self.replies.protocol.read_train(message.content, parcel.expected)
            sent = parcel.sent().download
            any_rank = self.policy.accepts_other_ranks
            adapter = packing.read(reply, sent, any_rank=any_rank)
            if client.index in self._late:
                self._book.miss(assignment, reply)
                return Late(client)
            adapter, norm = self._clip(client, sent.adapter, adapter)
            quality = reply.metrics.get("quality")
            reply, count = self._count(client, reply)
            weight = reply.weight if assignment.weight is None else assignment.weight
            fold(self.flow.update(Update(adapter, weight, quality, sent), assignment, part))
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            return self._reject(assignment, clean(str(error), 2 * REASON_LENGTH), received)
        self.replies.guard.accept(client.index, norm, count)
        if reply.notes:
            log(WARNING, "round %s: %s: left out of its reply: %s", self._book.number, client.name,
                "; ".join(reply.notes))  # fmt: skip
        self._book.aggregate_seconds += time.perf_counter() - clock
        self._book.accept(assignment, reply)
        self.participation.answered(client, part)
        if self.replies.by_rows and self.privacy.rows_known:
            self.census.roster.observe(client.node_id, max(1, round(count)))
        self.good.append(replace(reply, arrays={}))
        trained = Trained(
            client, adapter, sent.adapter, reply.metrics, self._book.number,
            packing.model.frozen(sent.adapter),
        )  # fmt: skip
        self._watch(trained, packing)
        self._observe(trained)
        return Accepted(client, adapter)

    def close(self, tell: Callable[[ClientRecord], None]) -> None:
        """Refuse those that gave no answer, take the time, and tell of everybody's part."""
        book = self._book
        for assignment in self.flow.unanswered(book):
            assignment.elapsed_seconds = time.perf_counter() - book.started
            self._reject(assignment, "no answer")
        book.train_seconds = time.perf_counter() - book.started - book.aggregate_seconds
        book.time = self.flow.finish(book)
        book.clock_total = self.participation.seconds
        for assignment in (*book.older, *book.assignments.values()):
            if assignment.status == "busy":
                continue  # told of when it has answered
            tell(assignment.record(book.number, book.time))

    def _count(self, client: Client, reply: Reply) -> tuple[Reply, float]:
        """Return a reply with how much it counts, and what it says itself."""
        if self.privacy.rows_known:
            if self.replies.by_rows:
                self.replies.guard.check_count(client.index, reply.weight)
            self.replies.guard.check_share(client.index, reply.weight, self.replies.weighted_by)
        else:  # numbers of rows stay with the clients
            reply = replace(reply, weight=1.0)
        # Noise of a strategy around this one is for a plain mean.
        return replace(reply, weight=1.0) if self.outside.expected else reply, reply.weight

    def _clip(self, client: Client, sent: Adapter, adapter: Adapter) -> tuple[Adapter, float]:
        """Return a client's adapter, its change scaled down to ``clip_norm``, and its norm.

        Raises
        ------
        ReplyError
            If the change cannot be training's.
        """
        clipped, norm = clip_update(sent, adapter, self.clip_norm or math.inf)
        if self.clip_norm and norm > self.clip_norm:
            log(WARNING, "round %s: %s: its change of norm %.4g was scaled down to clip_norm = %g",
                self._book.number, client.name, norm, self.clip_norm)  # fmt: skip
            return clipped, min(norm, self.clip_norm)
        if math.isfinite(norm):  # the rule names what is not
            self.replies.guard.check_norm(norm, sent, self.privacy.noise)
        return clipped, norm

    def _observe(self, trained: Trained) -> None:
        """Let the rank policy and the sampler look at a good reply."""
        for learner in (self.policy, self.participation.sampler):
            try:
                learner.observe(trained)
            except ValueError as error:
                log(WARNING, "round %s: %s: %s", self._book.number, trained.client.name, error)

    def _watch(self, trained: Trained, packing: Packing) -> None:
        """Note what is odd about a good reply."""
        asked = "".join(f for f in packing.trained if f in packing.uploaded)
        found = self.participation.watch.reply(trained, asked, packing.wire)
        self._book.warnings += found
        self.participation.watch.say(found, self._book.number)

    def _reject(self, assignment: Assignment, reason: str, nbytes: int = 0) -> Rejected:
        client = assignment.client
        self._book.reject(assignment, reason, nbytes)
        self.census.doubt(client.node_id)
        log(WARNING, "round %s: rejected %s: %s", self._book.number, client.name, reason)
        return Rejected(client, reason)
