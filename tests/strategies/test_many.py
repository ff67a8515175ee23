"""What a server does for thousands of clients is counted, not timed: machines differ."""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from strategies import FedLoRA, census, transport
from strategies.census import BATCH, MOST_AGAIN
from strategies.counts import Counts
from strategies.guard import Guard, believed_counts
from strategies.messages import COUNT_KEY, to_record
from strategies.ranks import AutoRank, UniformRank
from strategies.sampling import FractionSampling
from strategies.transport import WINDOW, exchange
from strategies.wallclock import MeasuredClock
from strategies.wallclock.clock import Work
from strategies.wallclock.transfers import Transfers
from tests.fakes import FakeGrid, random_adapter

RANK, ASKED = 4, 5


class Counting(FakeGrid):
    """Counts what is asked of it, by kind of message; its clients send back what they got."""

    def __init__(self, nodes, *, mute=False):
        self.pushes, self.pulls, self.mute = Counter(), [], mute
        super().__init__(nodes, self.handle)

    def handle(self, message):
        i = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            if self.mute:
                return Error(0, "no such function")
            profile = {"loss-entropy": i % 7, "label-entropy": i % 5, "gini-simpson": i % 10 / 10}
            profile = MetricRecord({k: float(v) for k, v in profile.items()})
            return RecordDict({"me": ConfigRecord({"partition-id": i}), "profile": profile})
        metrics = MetricRecord({"num-examples": 10 + i % 3, "loss": 0.5})
        return RecordDict({"arrays": message.content["arrays"], "metrics": metrics})

    def push_messages(self, messages):
        messages = list(messages)
        self.pushes[messages[0].metadata.message_type] += 1
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        self.pulls.append(len(list(message_ids)))
        return super().pull_messages(message_ids)

    def queries(self):
        sent = [m for m in self.sent if m.metadata.message_type == "query"]
        self.sent.clear()
        return len(sent)


def run(grid, rounds=1, **options):
    after = []

    class Seen(FedLoRA):
        def round_over(self, server_round, result):
            super().round_over(server_round, result)
            after.append((grid.queries(), self))

    settings = {
        "aggregation": "zero-padding", "ranks": AutoRank(1, RANK), "evaluate_fraction": 0.0,
        "sampling": FractionSampling(clients=ASKED),
    }  # fmt: skip
    strategy = Seen(**{**settings, **options})
    arrays = to_record(random_adapter(RANK, seed=0).to_state_dict())
    strategy.start(grid, arrays, num_rounds=rounds, timeout=5)
    return [queries for queries, _ in after[1:]], strategy


@pytest.fixture
def naps(monkeypatch):
    taken = []
    monkeypatch.setattr(transport.time, "sleep", taken.append)
    return taken


@pytest.mark.parametrize("nodes", [BATCH - 1, 2 * BATCH + 1])
def test_a_census_is_one_query_a_node_in_batches(nodes, naps):
    grid = Counting(range(1, nodes + 1))
    queries, strategy = run(grid, 3)
    assert queries == [nodes, 0, 0]
    assert grid.pushes["query"] == math.ceil(nodes / BATCH)
    assert len(strategy.roster.clients) == nodes
    assert max(grid.pulls) <= BATCH
    assert not naps  # everything was there


@pytest.mark.parametrize("counts", [False, True])
def test_over_a_network_new_nodes_are_asked_once_more_for_nothing(monkeypatch, counts):
    asked = []

    class Listening(Counting):
        def handle(self, message):
            if message.metadata.message_type == "query":
                (config,) = message.content.config_records.values()
                asked.append((message.metadata.dst_node_id, COUNT_KEY in config))
            return super().handle(message)

    monkeypatch.setattr(census, "PromptGrid", Listening)
    options = {"ranks": UniformRank(RANK), "sampling": "weighted" if counts else "fraction"}
    queries, strategy = run(Listening(range(1, 4)), 2, **options)
    assert queries == [6, 0]
    assert sorted(asked[:3]) == [(node, counts) for node in (1, 2, 3)]
    assert sorted(asked[3:]) == [(node, False) for node in (1, 2, 3)]
    assert len(strategy.census.trips) == 3


def test_of_thousands_that_never_answer_a_few_are_asked_again():
    nodes = 3 * MOST_AGAIN
    assert run(Counting(range(nodes), mute=True), 5, ranks=UniformRank(RANK))[0] == [
        nodes, MOST_AGAIN, MOST_AGAIN, 0, 0,
    ]  # fmt: skip


def test_once_one_of_them_answers_all_are_asked_again_in_turn():
    class Better(Counting):
        def handle(self, message):
            if message.metadata.message_type == "train":
                self.mute = False
            return super().handle(message)

    nodes = 3 * MOST_AGAIN - 10
    queries, _ = run(Better(range(nodes), mute=True), 5, ranks=UniformRank(RANK))
    assert queries == [nodes, MOST_AGAIN, MOST_AGAIN, MOST_AGAIN - 10, 0]


def test_the_log_does_not_name_thousands(caplog):
    caplog.set_level("INFO", logger="flwr")
    run(Counting(range(400), mute=True))
    assert len(caplog.records) < 150
    assert max(len(record.getMessage()) for record in caplog.records) < 2000
    assert "… and so for 380 more" in caplog.text


def test_ranks_are_told_again_when_they_change_not_when_counts_come_in():
    told = []
    listen = [lambda record: told.append(record) if record["kind"] == "ranks" else None]
    run(Counting(range(50)), 4, listeners=listen)
    assert [record["round"] for record in told] == [1]


@pytest.mark.parametrize("nodes", [WINDOW, 10 * WINDOW])
def test_replies_that_are_there_are_not_waited_for(nodes, naps):
    grid = Counting(range(nodes))
    content = RecordDict({"arrays": to_record({}), "config": ConfigRecord()})
    replies = list(exchange(grid, (Message(content, n, "train") for n in range(nodes)), 5))
    assert [reply.metadata.src_node_id for reply in replies] == list(range(nodes))
    assert grid.pushes["train"] == nodes  # one by one: arrays need not be there together
    assert len(grid.pulls) == math.ceil(nodes / WINDOW)
    assert not naps


def test_at_the_deadline_all_is_looked_for_in_windows():
    class Deaf(Counting):
        def handle(self, message):
            return super().handle(message) if message.metadata.dst_node_id else None

    grid = Deaf(range(10 * WINDOW))
    content = RecordDict({"arrays": to_record({}), "config": ConfigRecord()})
    messages = [Message(content, n, "train") for n in grid.nodes]
    replies = list(exchange(grid, messages, 0.2, poll_seconds=0.05))
    assert [reply.metadata.src_node_id for reply in replies] == list(range(1, 10 * WINDOW))
    assert max(grid.pulls) <= WINDOW


def test_a_message_that_a_grid_leaves_out_is_not_waited_for():
    class Picky(Counting):
        def push_messages(self, messages):
            kept = [m for m in messages if m.metadata.dst_node_id % 3]
            return super().push_messages(kept) if kept else []

    grid = Picky(range(20))
    content = RecordDict({"arrays": to_record({}), "config": ConfigRecord()})
    messages = [Message(content, n, "train") for n in grid.nodes]
    replies = list(exchange(grid, messages, 5, batch=7))
    assert [r.metadata.src_node_id for r in replies] == [n for n in range(20) if n % 3]


def test_the_median_of_others():
    rng = np.random.default_rng(0)
    counts, seen = Counts(), {}
    for _ in range(300):
        client, count = int(rng.integers(40)), float(rng.integers(1, 9))
        counts.set(client, count)
        seen[client] = count
        for one in (client, 99):
            others = [value for key, value in seen.items() if key != one]
            assert counts.median_of_others(one) == (np.median(others) if others else None)
    assert len(counts) == len(seen)


class Compared(float):
    """Counts how often it is compared."""

    times = 0

    def __lt__(self, other):
        Compared.times += 1
        return float(self) < other


@pytest.mark.parametrize("low", [1, 2000])  # with 1 everybody is a thousand times the least
def test_whom_to_believe_is_found_without_comparing_everyone_with_everyone(low):
    n = 3000
    counts = {i: Compared(low if i == 7 else 2000 + i) for i in range(n)} | {n: Compared(1e9)}
    Compared.times = 0
    assert believed_counts(counts).keys() == set(range(n))
    assert Compared.times < 5 * n * math.log2(n)


def test_the_guard_looks_for_the_usual_norm_once_a_round(monkeypatch):
    looked = []
    usual = Guard._usual_norm
    monkeypatch.setattr(Guard, "_usual_norm", lambda guard: looked.append(1) or usual(guard))
    guard, sent = Guard(), random_adapter(RANK, seed=0)
    for server_round in range(1, 4):
        list(guard.look_ahead([], lambda message: None))
        looked.clear()
        for client in range(50):
            guard.check_norm(1.0, sent)
            guard.check_share(client, 10)
            guard.accept(client, 1.0, 10)
        assert len(looked) == 1 or server_round == 1


def test_what_was_measured_is_looked_through_once_a_round(monkeypatch):
    taken = []
    for cls, name in ((MeasuredClock, "_known"), (Transfers, "fit")):
        own = getattr(cls, name)
        monkeypatch.setattr(
            cls, name, lambda *args, own=own: taken.append(own.__name__) or own(*args)
        )
    clock = MeasuredClock()
    for server_round in range(1, 4):
        clients = range(100 * server_round, 100 * server_round + 100)  # none measured before
        clock.forecast([Work(i, RANK, 1000) for i in clients], server_round)
        # Nobody looked when they answered.
        works = [Work(i, RANK, 1000, train_seconds=1.0, answered=True) for i in clients]
        clock.finish(works, server_round)
        assert taken.count("_known") <= 2
        assert taken.count("fit") <= 2
        taken.clear()


def leaves(state):
    """Return how many numbers a state holds."""
    if isinstance(state, Mapping):
        return sum(map(leaves, state.values()))
    if isinstance(state, list | tuple | set):
        return sum(map(leaves, state))
    return 1


def test_nothing_that_lasts_grows_by_the_round():
    sizes = []

    class Weighed(FedLoRA):
        def round_over(self, server_round, result):
            super().round_over(server_round, result)
            kept = [part.state_dict() for part in self.parts().values()]
            census = [self.census._tries, self.census._asked, self.census._doubted]
            book = [self.round.assignments.keys(), self.rank_book.ranks, self.rank_book.told]
            book += [self.participation.watch._said, self.intake.good]
            sizes.append(leaves([*kept, *census, *map(list, book)]))

    strategy = Weighed(aggregation="zero-padding", ranks=AutoRank(1, RANK), evaluate_fraction=1.0)
    arrays = to_record(random_adapter(RANK, seed=0).to_state_dict())
    strategy.start(Counting(range(70)), arrays, num_rounds=6, timeout=5)
    assert sizes[2] == sizes[6] > 70 * 5
