"""Who is connected, and what they say of themselves and of their data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid

from strategies.claims import clean
from strategies.clients import Client, Roster, whole
from strategies.guard import OTHERS_FACTOR, believed_counts
from strategies.messages import COUNT_KEY, Protocol, reply_error
from strategies.ranks import RankPolicy
from strategies.transport import PATIENCE, exchange

Answer = Mapping[str, Any]

#: A node that gives no answer is asked again in the next rounds, so many times in all.
MOST_TRIES = 3


class Census:
    """Finds the connected nodes; asks newcomers who they are, and for a profile if need be.

    Two queries, one after the other: a client that takes too long over its profile, or
    fails at it, has still said who it is. A node is asked again who it is if it gave no answer, if
    it was away, or if its last training failed: its limit may not be known, or be another by now.

    Parameters
    ----------
    protocol : Protocol
    min_nodes : int
        Wait for this many nodes before the first round.
    least : int (default: 1)
        And for this many, or ``min_nodes`` if that is less, before a later one: nodes that are
        gone do not hold up a run.
    introduce : bool
        Whether to ask nodes who they are.
    counts : bool
        Whether that answer is to have their number of training examples.
    told : Mapping[str, float], optional
        What else a query tells a node, such as that the run is private.
    timeout, profile_timeout : float
        Seconds to wait for the answers; who does not answer takes part without.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        min_nodes: int,
        least: int = 1,
        introduce: bool,
        counts: bool = False,
        told: Mapping[str, float] | None = None,
        timeout: float,
        profile_timeout: float,
    ) -> None:
        self.protocol = protocol
        self.min_nodes = min_nodes
        self.least = min(least, min_nodes)
        self.introduce = introduce
        self.counts = counts
        self.told = dict(told or {})
        self.timeout = timeout
        self.profile_timeout = profile_timeout
        self.roster = Roster()
        self._here: dict[int, str] | None = None  # names of who was there last
        self._asked: dict[int, int] = {}  # the round in which a node was asked last
        self._tries: dict[int, int] = {}  # how often in vain, of those that never answered since
        self._doubted: set[int] = set()

    def take(
        self, grid: Grid, policy: RankPolicy, config: ConfigRecord, server_round: int
    ) -> list[Client]:
        """Return who is connected, in a lasting order.

        Parameters
        ----------
        grid : Grid
        policy : RankPolicy
            Says who is to be profiled, and learns the answers.
        config : ConfigRecord
            The user's settings for clients; a profiling query carries them too.
        server_round : int
        """
        node_ids = self._wait(grid)
        new = self.roster.unknown(node_ids)
        again = self._to_ask_again(node_ids, server_round) if self.introduce else []
        known: Mapping[int, Answer] = {}
        if self.introduce and (new or again):
            more: Mapping[str, Any] = {**config, COUNT_KEY: True} if self.counts else {}
            settings = ConfigRecord({**more, **self.told})
            known = self._ask(grid, [*new, *again], settings, self.timeout)
            for node_id in (*new, *again):
                tried = 0 if node_id in known else self._tries.get(node_id, 0) + 1
                self._tries[node_id], self._asked[node_id] = tried, server_round
            for node_id in again:
                self._learn_limit(node_id, known.get(node_id))
        if new:
            answers: dict[int, Answer] = {node_id: {} for node_id in new}
            if self.introduce:
                answers |= {node_id: known[node_id] for node_id in new if node_id in known}
                if not known.keys() >= set(new):
                    log(INFO, "%s of %s new nodes do not say who they are: no limit of theirs is "
                        "known, and seeded choices go by their node ids; a Message API app answers "
                        "with register_identity(app)",
                        len(set(new) - known.keys()), len(new))  # fmt: skip
            self.roster.join(answers, present=node_ids)
            for index in self.roster.handed_on:
                policy.forget(index)
            for node_id, index in self.roster.doubles.items():
                log(WARNING, "node %s says that it is partition %s, as a node does that is still "
                    "connected; it joins when that one is gone", node_id, index)  # fmt: skip
        clients = self.roster.present(node_ids)
        if asked := policy.to_profile(clients, server_round):
            self._profile(grid, policy, asked, config, server_round)
            clients = self.roster.present(node_ids)
        if known or asked:
            self._disbelieve(clients)
            clients = self.roster.present(node_ids)
        self._compare(clients)
        return clients

    def doubt(self, node_id: int) -> None:
        """Have a node asked again in the next round: its training failed."""
        self._doubted.add(node_id)

    def _to_ask_again(self, node_ids: Sequence[int], server_round: int) -> list[int]:
        """Return the known nodes whose limit is unknown or may have changed; once a round each."""
        here = self._here or {}
        found = []
        for node_id in sorted(set(node_ids) & self.roster.clients.keys()):
            tries = self._tries.get(node_id, 0)
            if node_id not in here:  # it was away, or this run goes on from a checkpoint
                found.append(node_id)
            elif self._asked.get(node_id) == server_round or tries >= MOST_TRIES:
                continue
            elif tries or node_id in self._doubted:
                found.append(node_id)
        self._doubted -= set(found)
        return found

    def _learn_limit(self, node_id: int, answer: Answer | None) -> None:
        """Take the limit of a node that was asked again."""
        if answer is None:
            return
        before = self.roster.clients[node_id]
        self.roster.update(node_id, answer)
        now = self.roster.clients[node_id]
        if now.max_rank != before.max_rank:
            log(INFO, "%s: its max-rank is %s, it was %s", now.name,
                now.max_rank or "none", before.max_rank or "none")  # fmt: skip

    def _disbelieve(self, clients: Sequence[Client]) -> None:
        """Forget numbers of examples by which one node would be the whole model."""
        counts = {c.node_id: float(c.num_examples) for c in clients if c.num_examples}
        believed = believed_counts(counts)
        for client in clients:
            if client.node_id in counts and client.node_id not in believed:
                log(WARNING, "%s says that it has %s examples, more than %g times what others "
                    "have: it counts as the mean of those", client.name, client.num_examples,
                    OTHERS_FACTOR)  # fmt: skip
                self.roster.observe(client.node_id, None)

    def _compare(self, clients: Sequence[Client]) -> None:
        """Log who is gone and who is new since the last time."""
        before, self._here = self._here, {client.node_id: client.name for client in clients}
        if before is None:
            return
        for node_id in before.keys() - self._here.keys():
            log(WARNING, "%s is gone", before[node_id])
        for node_id in self._here.keys() - before.keys():
            log(INFO, "%s is here now", self._here[node_id])

    def _wait(self, grid: Grid) -> list[int]:
        """Return who is connected, once enough are; say every minute who is missing."""
        tell_at = time.monotonic()
        wanted = self.min_nodes if self._here is None else self.least
        while len(node_ids := list(grid.get_node_ids())) < wanted:
            if time.monotonic() >= tell_at:
                tell_at = time.monotonic() + PATIENCE
                gone = [name for node, name in (self._here or {}).items() if node not in node_ids]
                log(INFO, "waiting for nodes: %s of %s%s", len(node_ids), wanted,
                    f"; gone since the last round: {', '.join(gone)}" if gone else "")  # fmt: skip
            time.sleep(1)
        return node_ids

    def _profile(
        self,
        grid: Grid,
        policy: RankPolicy,
        clients: Sequence[Client],
        config: ConfigRecord,
        server_round: int,
    ) -> None:
        settings = ConfigRecord({**config, **policy.profile_settings()})
        node_ids = [client.node_id for client in clients]
        answers = self._ask(grid, node_ids, settings, self.profile_timeout)
        for client in clients:
            answer = answers.get(client.node_id)
            try:
                policy.learn(client, answer, server_round)
            except ValueError as error:
                log(WARNING, "profile of %s left out: %s", client.name, clean(str(error)))
            if count := whole((answer or {}).get("num-examples"), low=1):
                self.roster.observe(client.node_id, count)

    def _ask(
        self, grid: Grid, node_ids: Sequence[int], config: ConfigRecord, timeout: float
    ) -> dict[int, Answer]:
        """Send one query to each node; who fails to answer is left out."""
        messages = [
            Message(self.protocol.query(config), node_id, self.protocol.query_type)
            for node_id in node_ids
        ]
        answers: dict[int, Answer] = {}
        silent = set(node_ids)
        for message in exchange(grid, messages, timeout):
            node_id = message.metadata.src_node_id
            silent.discard(node_id)
            if reason := reply_error(message):
                log(WARNING, "node %s did not answer a query: %s", node_id, reason)
                continue
            try:
                answers[node_id] = self.protocol.read_query(message.content)
            except (ValueError, KeyError, TypeError) as error:
                log(WARNING, "node %s answered a query with what cannot be read: %s",
                    node_id, clean(str(error)))  # fmt: skip
        for node_id in sorted(silent):
            log(WARNING, "node %s gave no answer to a query within %g s", node_id, timeout)
        return answers
