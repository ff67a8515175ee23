"""Replies over Flower's own HTTP grid, whose parts come one after the other."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from strategies import arrivals, flower, transport
from strategies.arrivals import PromptGrid
from strategies.bundles import KIND, bundle, mark
from strategies.flower import is_http, is_network
from strategies.transport import exchange


class Seconds:
    """The seconds of a test; a look at the SuperLink takes a few milliseconds."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class SuperLink:
    """Answers a grid as Flower's does: heads first, then parts that come when they come.

    ``ways``: by node, when the head is there, and seconds from part to part.
    """

    def __init__(self, time, ways):
        self.time, self.ways = time, ways
        self.replies, self.parts, self.confirmed, self.requests = {}, {}, [], 0
        self.broken, self.able, self.wrong = set(), set(), set()
        self.lags = {}  # by node, how long after all others the last bytes of arrays come
        self.sent = []  # node and number of objects of each message
        self.slow = 0.0  # seconds until all messages are sent, with all that is in them
        self.told, self.twice = set(), set()  # whose replies were announced, and asked for again
        self.pause = 0.002  # seconds until a question for an object is answered

    def PushMessages(self, request):  # noqa: N802
        ids = []
        for proto, sent_tree in zip(
            request.messages_list, request.message_object_trees, strict=True
        ):
            node = proto.metadata.dst_node_id
            self.sent.append((node, len(list(iterate_object_tree(sent_tree)))))
            head, pace = self.ways[node]
            asked = Message(RecordDict(), node, "train")
            asked.metadata.__dict__["_message_id"] = proto.metadata.message_id
            arrays = ArrayRecord([np.full(4, node), np.full(4, -node)])
            content = RecordDict({"arrays": arrays})
            if node in self.able:
                content["config"] = ConfigRecord()
                mark(content)
                bundle(content)
            if node in self.wrong:
                content["arrays"][KIND].data = b"rubbish"
            reply = Message(content, reply_to=asked)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            with no_object_id_recompute():
                tree = get_object_tree(reply)
                nested = get_all_nested_objects(reply)
                *_, chunk = (i for i, o in nested.items() if type(o).__name__ == "ArrayChunk")
                objects = {i: o.deflate() for i, o in nested.items()}
                proto_reply = message_to_proto(reply)
            sent = self.time.now
            self.replies[proto.metadata.message_id] = sent + head, proto_reply, tree
            for count, part in enumerate(iterate_object_tree(tree), 1):
                content = b"rubbish" if node in self.broken else objects[part.object_id]
                self.parts[part.object_id] = sent + head + count * pace, content
            if node in self.lags:
                self.parts[chunk] = sent + head + count * pace + self.lags[node], objects[chunk]
            ids.append(proto.metadata.message_id)
        self.time.now += self.slow
        return PushAppMessagesResponse(message_ids=ids)

    def PushObject(self, request):  # noqa: N802
        raise AssertionError("nothing is asked for")

    def PullMessages(self, request):  # noqa: N802
        self.requests += 1
        self.twice |= self.told & set(request.message_ids)
        there = [i for i in request.message_ids if self.replies.get(i, (1e9,))[0] <= self.time.now]
        found = [self.replies.pop(i) for i in there]
        self.told.update(there)
        return PullAppMessagesResponse(
            messages_list=[proto for _, proto, _ in found],
            message_object_trees=[tree for _, _, tree in found],
        )

    def PullObject(self, request):  # noqa: N802
        self.requests += 1
        self.time.now += self.pause
        when, content = self.parts[request.object_id]
        there = when <= self.time.now
        return PullObjectResponse(
            object_found=True, object_available=there, object_content=content if there else b""
        )

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def time(monkeypatch):
    clock = Seconds()
    for module in (arrivals, flower, transport):
        monkeypatch.setattr(module, "time", clock)
    return clock


def make(time, ways):
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    link, grid = SuperLink(time, ways), HttpGrid(token="t")
    grid._client = link
    grid.set_run(Run.create_empty(run_id=1))
    return link, PromptGrid(grid), [Message(RecordDict(), node, "train") for node in ways]


def test_a_slow_upload_holds_up_nobody_and_each_is_timed(time):
    # Objects of a reply: two arrays with a chunk each, their record, the content, the message.
    ways = {1: (0.5, 3.0), 2: (0.6, 0.02), 3: (6.0, 0.1), 4: (0.4, 10.0)}
    link, grid, messages = make(time, ways)
    assert is_http(grid.grid)
    assert is_network(grid)
    parts = 7
    took, order = {}, []

    def arrived(reply, seconds):
        took[reply.metadata.src_node_id] = seconds
        order.append(reply.metadata.src_node_id)

    replies = list(exchange(grid, messages, 600, on_arrival=arrived))
    assert [r.metadata.src_node_id for r in replies] == [1, 2, 3, 4]
    assert [r.content["arrays"]["0"].numpy()[0] for r in replies] == [1, 2, 3, 4]
    assert order == [2, 3, 1, 4]
    for node, (head, pace) in ways.items():
        exact = head + parts * pace
        assert exact - 0.01 <= took[node] <= 1.06 * exact + 0.2
    assert len(link.confirmed) == 4
    assert link.requests < 1500  # of a minute and a half


@pytest.mark.parametrize("slow", [1.5, 5.0])
def test_who_answers_while_others_are_sent_theirs_has_answered_then(time, slow):
    link, grid, messages = make(time, {1: (0.5, 0.01), 2: (8.0, 0.01)})
    link.slow = slow
    time.sleep(60)  # nobody looked for a while, as nothing was sent
    took = {}

    def arrived(reply, seconds):
        took[reply.metadata.src_node_id] = seconds

    list(exchange(grid, messages, 60, on_arrival=arrived))
    assert took == {1: pytest.approx(slow, abs=0.1), 2: pytest.approx(8.07, abs=0.5)}
    grid.push_messages([Message(RecordDict(), 1, "train")])  # but who was not looked at
    (sent,) = grid._sent
    time.sleep(30)
    grid.push_messages([Message(RecordDict(), 2, "train")])
    assert list(grid.pull_messages([sent]))
    assert grid.seconds(sent) is None


def test_where_looking_takes_long_times_are_known_to_half_a_look(time):
    ways = {node: (9.0 + node, 0.2) for node in range(1, 13)}
    link, grid, messages = make(time, ways)
    link.pause = 0.3  # of twelve that come at once: a few seconds from look to look
    took = {}

    def arrived(reply, seconds):
        took[reply.metadata.src_node_id] = seconds

    list(exchange(grid, messages, 120, on_arrival=arrived))
    assert len(took) == 12
    assert None not in took.values()
    assert not link.twice
    for node, (head, pace) in ways.items():
        assert took[node] == pytest.approx(head + 7 * pace, rel=0.35)


def test_a_look_between_two_fetches_that_fails_costs_nobody_a_reply(time, monkeypatch):
    link, grid, messages = make(time, {1: (0.5, 0.01), 2: (0.5, 0.01), 3: (9.0, 0.1)})
    link.pause = 0.3
    pull, look, looks, failed = grid.pull_messages, grid._look, [], []

    def pulled(ids):
        looks.clear()
        return pull(ids)

    def looked(ids):
        looks.append(ids)
        if len(looks) > 1:
            failed.append(ids)
            raise ConnectionError("the SuperLink is away")
        look(ids)

    monkeypatch.setattr(grid, "pull_messages", pulled)
    monkeypatch.setattr(grid, "_look", looked)
    replies = list(exchange(grid, messages, 60))
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    assert failed


@pytest.mark.parametrize("one", [False, True])
def test_the_end_of_a_large_array_may_come_after_the_root(time, one):
    ways = {1: (0.1, 0.01), 2: (0.1, 0.01)}
    link, grid, messages = make(time, ways)
    link.lags[1] = 30.0  # far longer than Flower's code would try before it waits
    link.able |= {1, 2} if one else set()
    took = {}

    def arrived(reply, seconds):
        took[reply.metadata.src_node_id] = seconds

    for reply in exchange(grid, messages, 600, on_arrival=arrived):
        node = reply.metadata.src_node_id
        assert [a.numpy()[0] for a in reply.content["arrays"].values()] == [node, -node]
    assert list(took) == [2, 1]
    assert took[2] < 0.5
    assert 30 <= took[1] < 33


def test_arrays_travel_as_one_to_who_says_it_reads_that(time):
    link, grid, _ = make(time, {1: (0.1, 0.01), 2: (0.1, 0.01)})
    link.able.add(2)

    def messages():
        for node in (1, 2):
            arrays = ArrayRecord([np.ones(2), np.zeros(3)])
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"rank": 2})})
            yield Message(content, node, "train")

    for _ in range(2):
        replies = list(exchange(grid, messages(), 60))
        for node, reply in enumerate(replies, 1):
            assert [a.numpy()[0] for a in reply.content["arrays"].values()] == [node, -node]
            assert not any(reply.content.config_records.values())
    # Each array is two objects; beside them their record, the config, the content, the message.
    assert link.sent == [(1, 8), (2, 8), (1, 8), (2, 6)]


def test_a_bundle_that_cannot_be_read_is_its_own_node_s_loss(time):
    link, grid, messages = make(time, {1: (0.1, 0.01), 2: (0.1, 0.01)})
    link.able.add(2)
    link.wrong.add(2)
    first, second = exchange(grid, messages, 60)
    assert not first.has_error()
    assert second.error.reason == "the reply cannot be read (ValueError)"
    assert second.metadata.src_node_id == 2


def test_who_is_outside_the_window_is_timed_too_and_its_arrays_stay_there(time):
    ways = {1: (9.0, 0.01), **{node: (0.1 * node, 0.01) for node in range(2, 9)}}
    _, grid, messages = make(time, ways)
    took = {}

    def arrived(reply, seconds):
        took[reply.metadata.src_node_id] = seconds
        assert len(took) - len(seen) <= 2

    seen = []
    for reply in exchange(grid, messages, 60, on_arrival=arrived, window=2):
        seen.append(reply)
    assert len(seen) == 8
    for node, (head, pace) in ways.items():
        assert took[node] == pytest.approx(head + 7 * pace, abs=0.3)


def test_one_that_cannot_be_read_costs_itself_alone(time):
    ways = dict.fromkeys((1, 2, 3), (0.1, 0.0))
    link, grid, messages = make(time, ways)
    link.broken = {2}
    replies = list(exchange(grid, messages, 60))
    assert [r.has_error() for r in replies] == [False, True, False]
    assert replies[1].metadata.src_node_id == 2


def test_when_the_server_was_busy_the_time_is_not_known(time):
    ways = {1: (0.1, 0.01), 2: (2.0, 0.1), 3: (30.0, 0.1)}
    _, grid, messages = make(time, ways)
    took = {}

    def arrived(reply, seconds):
        took[reply.metadata.src_node_id] = seconds

    for reply in exchange(grid, messages, 60, on_arrival=arrived):
        if reply.metadata.src_node_id == 1:
            time.now += 10
    assert took[1] == pytest.approx(0.17, abs=0.2)
    assert took[2] is None
    assert took[3] == pytest.approx(30.7, rel=0.06)
