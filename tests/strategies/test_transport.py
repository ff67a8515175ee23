"""Replies that come late, cannot be read, or do not come, over a grid without a network."""

import logging

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from strategies import FedLoRA, transport
from strategies.messages import record_bytes, to_record
from strategies.ranks import UniformRank
from strategies.transport import exchange
from tests.fakes import FakeGrid, message_reply, query_reply, random_adapter

NODES = list(range(1, 8))


class Broken(FakeGrid):
    """Cannot decode the reply of some nodes; what is pulled with it stays where it was."""

    def __init__(self, nodes, handler, broken, error):
        super().__init__(nodes, handler)
        self.broken, self.error = broken, error
        self.node_of = {}

    def push_messages(self, messages):
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self.node_of |= {i: m.metadata.dst_node_id for i, m in zip(ids, messages, strict=True)}
        return ids

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        if any(self.node_of[i] in self.broken for i in ids):
            raise self.error
        return super().pull_messages(ids)


def messages(nodes=NODES):
    return [Message(RecordDict({"c": ConfigRecord({"n": n})}), n, "train") for n in nodes]


def answer(message):
    return RecordDict({"c": message.content["c"]})


def test_error_free():
    replies = list(exchange(FakeGrid(NODES, answer), messages(), 5))
    assert [m.content["c"]["n"] for m in replies] == NODES


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"\xff\xff", 0, 1, "invalid start byte"),
        KeyError("x"),
        AssertionError(),
        RuntimeError("a decoder's own"),
        httpx.HTTPStatusError("", request=None, response=httpx.Response(413)),
    ],
)
@pytest.mark.parametrize("broken", [{3}, {1, 7}, set(NODES)])
def test_a_reply_that_cannot_be_read_costs_itself_alone(error, broken):
    grid = Broken(NODES, answer, broken, error)
    replies = list(exchange(grid, messages(), 5))
    assert [m.metadata.src_node_id for m in replies if m.has_error()] == sorted(broken)
    found = [m.content["c"]["n"] for m in replies if not m.has_error()]
    assert found == [n for n in NODES if n not in broken]
    for reply in replies:
        assert not reply.has_error() or "cannot be read" in reply.error.reason


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        httpx.ConnectError("no SuperLink"),
        httpx.HTTPStatusError("", request=None, response=httpx.Response(503)),
    ],
)
def test_a_superlink_that_is_gone_is_not_a_bad_reply(error):
    with pytest.raises(type(error)):
        list(exchange(Broken(NODES, answer, {3}, error), messages(), 5))


def test_such_a_reply_does_not_end_a_run():
    def honest(message):
        if message.metadata.message_type == "query":
            return query_reply(**{"partition-id": message.metadata.dst_node_id})
        return message_reply(random_adapter(2, seed=1))

    grid = Broken(NODES, honest, {2, 5}, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"))
    records = []
    strategy = FedLoRA(
        ranks=UniformRank(2), scale=2.0, evaluate_fraction=0, listeners=[records.append]
    )
    start = to_record(random_adapter(2, seed=0).to_state_dict())
    result = strategy.start(grid, start, num_rounds=2, timeout=5)
    rejected = [r for r in records if r["kind"] == "client" and r["status"] == "rejected"]
    assert {int(r["node"]) for r in rejected} == {2, 5}
    assert all("cannot be read" in r["reason"] for r in rejected)
    assert record_bytes(result.arrays) == record_bytes(start)


class Clock:
    """The seconds of a test."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(transport, "time", clock)
    return clock


class Timed(FakeGrid):
    """Each node answers at its own time."""

    def __init__(self, clock, seconds):
        super().__init__(list(seconds), answer)
        self.clock, self.seconds = clock, seconds

    def pull_messages(self, message_ids):
        nodes = {i: m.metadata.dst_node_id for i, m in zip(self.ids, self.sent, strict=True)}
        now = self.clock.now
        return super().pull_messages([i for i in message_ids if self.seconds[nodes[i]] <= now])

    @property
    def ids(self):
        return [m.metadata.message_id for m in self.sent]


def test_who_was_not_looked_at_is_not_timed(clock):
    grid = Timed(clock, {n: 3.0 if n == 0 else 0.2 for n in range(40)})
    timed = {}

    def arrived(message, seconds):
        timed[message.metadata.src_node_id] = seconds

    assert len(list(exchange(grid, messages(range(40)), 60, on_arrival=arrived))) == 40
    assert timed[0] == pytest.approx(3.0, abs=0.2)
    assert all(timed[n] == pytest.approx(0.2, abs=0.11) for n in range(1, 32))
    assert all(timed[n] is None for n in range(32, 40))


def test_nor_is_who_answered_while_the_caller_was_busy(clock):
    grid = Timed(clock, {0: 0.1, 1: 2.0, 2: 9.0})
    timed = {}

    def arrived(message, seconds):
        timed[message.metadata.src_node_id] = seconds is not None

    for reply in exchange(grid, messages([0, 1, 2]), 60, on_arrival=arrived):
        if reply.metadata.src_node_id == 0:
            clock.now += 5  # a slow aggregation
    assert timed == {0: True, 1: False, 2: True}


def test_every_minute_the_log_says_whom_it_waits_for(clock, caplog):
    logger = logging.getLogger("flwr")
    logger.propagate, before = True, logger.propagate
    try:
        with caplog.at_level(logging.INFO):
            grid = Timed(clock, {n: 1.0 if n < 3 else 1e9 for n in range(10)})
            replies = list(exchange(grid, messages(range(10)), 200, name="client {}".format))
    finally:
        logger.propagate = before
    assert len(replies) == 3
    lines = [r.getMessage() for r in caplog.records if "waiting" in r.getMessage()]
    assert len(lines) == 3
    assert lines[0].startswith("waiting for client 3, client 4, client 5, client 6, client 7 and 2")
    assert lines[0].endswith("up to 2:20 more")
