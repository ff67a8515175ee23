"""Who is connected, and what they say of themselves and of their data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid

from strategies.arrivals import PromptGrid
from strategies.capacity import ECHO_KEY, ELAPSED_KEY
from strategies.claims import clean
from strategies.clients import Client, Roster, whole
from strategies.guard import OTHERS_FACTOR, believed_counts
from strategies.listing import listed, log_each
from strategies.messages import COUNT_KEY, Protocol, reply_error
from strategies.ranks import RankPolicy
from strategies.transport import PATIENCE, exchange

Answer = Mapping[str, Any]

#: A node that gives no answer is asked again in the next rounds, so many times in all.
MOST_TRIES = 3
#: And of those, so many in one round: where no app answers, all of thousands need not be asked.
MOST_AGAIN = 100
#: And so long: a node that hangs must not hold up the rounds it is asked before.
AGAIN_SECONDS = 20.0
#: So many queries are handed to the grid together, and so many answers are looked for.
BATCH = 256


class Census:
    """Finds the connected nodes; asks newcomers who they are, and for a profile if need be.

    At the start of a run one query asks for both, where the rank policy wants everybody's profile;
    who fails at it, or takes too long, is then asked alone who it is. Newcomers are asked for a
    profile after that. A node is asked again who it is if it gave no answer, if it was away, or if
    its last training failed: its limit may not be known, or be another by now.

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
        #: Seconds that the last queries took for which a node has nothing to do.
        self.trips: list[float] = []

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
        again, left = self._to_ask_again(node_ids, server_round) if self.introduce else ([], [])
        known: Mapping[int, Answer] = {}
        profiled: Mapping[int, Answer | None] = {}
        if self.introduce and (new or again):
            more: Mapping[str, Any] = {**config, COUNT_KEY: True} if self.counts else {}
            settings = ConfigRecord({**more, **self.told})
            if policy.profiles_everyone and not self.roster.clients:
                both = ConfigRecord({**config, **settings, **policy.profile_settings()})
                answers = self._ask(grid, new, both, self.profile_timeout)
                profiled = {node_id: answers.get(node_id) for node_id in new}
                known = {n: answer for n, answer in answers.items() if "partition-id" in answer}
            rest = [node_id for node_id in new if node_id not in known]
            known = {
                **known,
                **self._ask(grid, rest, settings, self.timeout, empty=not self.counts),
            }
            soon = min(self.timeout, AGAIN_SECONDS)
            known = {**known, **self._ask(grid, again, settings, soon)}
            if isinstance(grid, PromptGrid):
                # Once more, for nothing: clients have started by now, and the time is the way's.
                answered = [node_id for node_id in new if node_id in known]
                self._ask(grid, answered, ConfigRecord({**self.told}), soon, empty=True)
            if not any(node_id in known for node_id in again):
                again += left  # they would not answer either
            for node_id in (*new, *again):
                tried = 0 if node_id in known else self._tries.get(node_id, 0) + 1
                self._tries[node_id], self._asked[node_id] = tried, server_round
            for node_id in again:
                self._learn_limit(node_id, known.get(node_id))
        if new:
            said: dict[int, Answer] = {node_id: {} for node_id in new}
            if self.introduce:
                said |= {node_id: known[node_id] for node_id in new if node_id in known}
                if not known.keys() >= set(new):
                    log(INFO, "%s of %s new nodes do not say who they are: no limit of theirs is "
                        "known, and seeded choices go by their node ids; a Message API app answers "
                        "with register_identity(app)",
                        len(set(new) - known.keys()), len(new))  # fmt: skip
            self.roster.join(said, present=node_ids)
            for index in self.roster.handed_on:
                policy.forget(index)
            for node_id, index in self.roster.doubles.items():
                log(WARNING, "node %s says that it is partition %s, as a node does that is still "
                    "connected; it joins when that one is gone", node_id, index)  # fmt: skip
        clients = self.roster.present(node_ids)
        if asked := policy.to_profile(clients, server_round):
            self._profile(grid, policy, asked, config, server_round, profiled)
            clients = self.roster.present(node_ids)
        if known or asked:
            self._disbelieve(clients)
            clients = self.roster.present(node_ids)
        self._compare(clients)
        return clients

    def doubt(self, node_id: int) -> None:
        """Have a node asked again in the next round: its training failed."""
        self._doubted.add(node_id)

    def _to_ask_again(
        self, node_ids: Sequence[int], server_round: int
    ) -> tuple[list[int], list[int]]:
        """Return the known nodes whose limit is unknown or may have changed; once a round each.

        And those that are left out this time, since enough others are asked that never answered.
        """
        here = self._here or {}
        found: list[int] = []
        silent: list[int] = []
        for node_id in sorted(set(node_ids) & self.roster.clients.keys()):
            tries = self._tries.get(node_id, 0)
            if node_id not in here:  # it was away, or this run goes on from a checkpoint
                found.append(node_id)
            elif self._asked.get(node_id) == server_round or tries >= MOST_TRIES:
                continue
            elif node_id in self._doubted:
                found.append(node_id)
            elif tries:
                silent.append(node_id)
        self._doubted -= set(found)
        silent.sort(key=lambda node_id: self._tries[node_id])
        return found + silent[:MOST_AGAIN], silent[MOST_AGAIN:]

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
        log_each([f"{name} is gone" for n, name in before.items() if n not in self._here])
        new = [f"{name} is here now" for n, name in self._here.items() if n not in before]
        log_each(new, INFO)

    def _wait(self, grid: Grid) -> list[int]:
        """Return who is connected, once enough are; say every minute who is missing."""
        tell_at = time.monotonic()
        wanted = self.min_nodes if self._here is None else self.least
        while len(node_ids := list(grid.get_node_ids())) < wanted:
            if time.monotonic() >= tell_at:
                tell_at = time.monotonic() + PATIENCE
                here = set(node_ids)
                gone = [name for node, name in (self._here or {}).items() if node not in here]
                log(INFO, "waiting for nodes: %s of %s%s", len(node_ids), wanted,
                    f"; gone since the last round: {listed(gone)}" if gone else "")  # fmt: skip
            time.sleep(1)
        return node_ids

    def _profile(
        self,
        grid: Grid,
        policy: RankPolicy,
        clients: Sequence[Client],
        config: ConfigRecord,
        server_round: int,
        answered: Mapping[int, Answer | None],
    ) -> None:
        """Have the policy learn profiles; ask those clients for one that were not asked yet."""
        settings = ConfigRecord({**config, **policy.profile_settings()})
        node_ids = [client.node_id for client in clients if client.node_id not in answered]
        answers = {**answered, **self._ask(grid, node_ids, settings, self.profile_timeout)}
        unusable = []
        for client in clients:
            answer = answers.get(client.node_id)
            try:
                policy.learn(client, answer, server_round)
            except ValueError as error:
                unusable.append(f"profile of {client.name} left out: {clean(str(error))}")
            if count := whole((answer or {}).get("num-examples"), low=1):
                self.roster.observe(client.node_id, count)
        log_each(unusable)

    def _ask(
        self,
        grid: Grid,
        node_ids: Sequence[int],
        config: ConfigRecord,
        timeout: float,
        *,
        empty: bool = False,
    ) -> dict[int, Answer]:
        """Send one query to each node; who fails to answer is left out.

        ``empty``: there is nothing to do for it, so that its seconds are those of the way.
        """
        messages = [
            Message(self.protocol.query(config), node_id, self.protocol.query_type)
            for node_id in node_ids
        ]
        answers: dict[int, Answer] = {}
        silent = set(node_ids)
        failed: list[str] = []
        took: dict[int, float] = {}

        def arrived(message: Message, seconds: float | None) -> None:
            if seconds is not None:
                took[message.metadata.src_node_id] = seconds

        for message in exchange(
            grid, messages, timeout, on_arrival=arrived, window=BATCH, batch=BATCH
        ):
            node_id = message.metadata.src_node_id
            silent.discard(node_id)
            if reason := reply_error(message):
                failed.append(f"node {node_id} did not answer a query: {reason}")
                continue
            try:
                answer = self.protocol.read_query(message.content)
                if ECHO_KEY in config:  # whatever it says of that itself
                    answer = {**answer, ELAPSED_KEY: took.get(node_id)}
                answers[node_id] = answer
            except (ValueError, KeyError, TypeError) as error:
                said = clean(str(error))
                failed.append(f"node {node_id} answered a query with what cannot be read: {said}")
        failed += [
            f"node {n} gave no answer to a query within {timeout:g} s" for n in sorted(silent)
        ]
        log_each(failed)
        if empty and took:
            self.trips = list(took.values())
        return answers
