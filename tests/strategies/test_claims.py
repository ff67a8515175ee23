"""What clients say of themselves: how far it is believed, and who is asked again."""

import math
from collections import OrderedDict

import peft
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from strategies import FedLoRA, census, transport
from strategies.claims import LARGEST, LONGEST_NAME, MOST_METRICS, ReplyError, clean, numbers
from strategies.client import (
    RankLimitError,
    apply_adapter,
    check_limit,
    make_reply,
    receive_parameters,
    register_identity,
)
from strategies.clients import Roster
from strategies.guard import MOST_ALONE, Guard, believed_counts
from strategies.lora import factor_of
from strategies.messages import (
    BYTES_MORE,
    MessageProtocol,
    NumPyProtocol,
    check_size,
    content_bytes,
    from_record,
    to_record,
)
from strategies.ranks import ListRank, QualityRank, ReportedRank, UniformRank
from strategies.sampling import FractionSampling, IndependentSampling
from tests.fakes import FakeGrid, Nodes, message_reply, query_reply, random_adapter

SCALE = 2.0


# ----- numbers and text ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 4e38, 10**400, -(10**39)]
)
def test_a_number_that_would_spoil_a_sum_is_dropped_and_said(value):
    found, weight, notes = numbers({"n": 3, "bad": value, "good": LARGEST}, "n", "scale")
    assert found == {"n": 3.0, "good": LARGEST}
    assert weight == 3.0
    assert len(notes) == 1
    assert notes[0].startswith("bad = ")
    with pytest.raises(ReplyError, match=r"^n is .*, expected a number above 0"):
        numbers({"n": value}, "n", "scale")
    with pytest.raises(ReplyError, match=r"^scale is .*, expected a number above 0"):
        numbers({"n": 1, "scale": value}, "n", "scale")


def test_what_is_no_number_is_passed_over():
    items = {"n": 1, "text": "1", "truth": True, "list": [1.0], "bytes": b"1", "int": -4}
    assert numbers(items, "n", "scale") == ({"n": 1.0, "int": -4}, 1.0, ())


def test_names_and_number_of_metrics_are_bounded():
    long = (LONGEST_NAME + 1) * "x"
    items = {long: 1.0, "line\nbreak": 2.0, "\x1b[31m": 3.0, "n": 1, LONGEST_NAME * "y": 4.0}
    found, _, notes = numbers(items, "n", "scale")
    assert found == {"n": 1.0, LONGEST_NAME * "y": 4.0}
    assert len(notes) == 3
    assert all(note.isprintable() and len(note) < 80 for note in notes)
    many = {f"m{i}": float(i) for i in range(10 * MOST_METRICS)} | {"n": 2}
    found, weight, notes = numbers(many, "n", "scale")
    assert len(found) == MOST_METRICS + 1  # and the weight, wherever it stands
    assert weight == 2.0
    assert notes == (f"all metrics after the first {MOST_METRICS}",)


def test_text_is_one_printable_line():
    said = clean("a\nINFO :  round 9/9 \x1b[31m\u2028\x07b" + 10**6 * "x")
    assert said.isprintable()
    assert said.startswith("a INFO : round 9/9 [31m b")
    assert len(said) == 500


# ----- the size of a reply ------------------------------------------------------------------


def test_a_reply_of_the_size_that_was_planned_passes_and_a_larger_one_does_not():
    adapter = random_adapter(4, seed=1).to_state_dict()
    content = RecordDict({"arrays": to_record(adapter)})
    names, planned = list(adapter), content_bytes(content)
    check_size(content, names, planned)
    check_size(content, names, planned // 2)  # headers and roundings
    large = BYTES_MORE + 2 * planned
    padded = content["arrays"][names[0]]
    padded.data += bytes(large - planned)
    check_size(content, names, planned)
    padded.data += b"x"
    with pytest.raises(ReplyError, match=f"have {large + 1} bytes, but {planned} were planned"):
        check_size(content, names, planned)


def test_a_second_record_counts_as_well():
    adapter = random_adapter(2, seed=1).to_state_dict()
    content = RecordDict({"arrays": to_record(adapter), "more": to_record(adapter)})
    assert content_bytes(content) == 2 * content_bytes(RecordDict({"a": to_record(adapter)}))
    names = [f"{i}" for i in range(2)]
    many = RecordDict({"a": ArrayRecord({f"{i}": content["more"][next(iter(adapter))]
                                         for i in range(21)})})  # fmt: skip
    with pytest.raises(ReplyError, match="21 arrays came back, expected 2"):
        check_size(many, names, 10**9)


@pytest.mark.parametrize("name", ["x\nINFO : all is well", 10**6 * "x", "\x1b[2J"])
def test_array_names_of_a_clients_own_making(name):
    array = next(iter(to_record(random_adapter(1, seed=0).to_state_dict()).values()))
    content = RecordDict({"a": ArrayRecord({name: array})})
    with pytest.raises(ReplyError, match="which nobody asked for") as caught:
        check_size(content, ["head.weight"], 10**6)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
    check_size(content, [name], 10**6)  # the server's own names are its own


# ----- how much a client counts -------------------------------------------------------------


def guard_of(*counts):
    guard = Guard()
    for index, count in enumerate(counts):
        guard.accept(index, 1.0, count)
    return guard


@pytest.mark.parametrize(
    ("others", "count", "good"),
    [
        ((), MOST_ALONE, True),
        ((), 1e15, False),
        ((10,), 10_000, True),
        ((10,), 10_001, False),
        ((10, 20, 30), 20_000, True),
        ((10, 20, 30), 1e15, False),
        ((10, 20, 1e9), 20_001, False),  # one who got in does not open the door
        ((0.4, 0.4, 0.4), 401, False),
        ((1e6, 2e6, 3e6), 1e-9, True),  # who counts less harms nobody
    ],
)
def test_a_first_count_is_compared_with_the_others(others, count, good):
    guard = guard_of(*others)
    if good:
        guard.check_share(99, count)
    else:
        than = "1000 times what others report" if others else "is believed"
        with pytest.raises(ReplyError, match=f"more than {than}.*let it report .* at most"):
            guard.check_share(99, count)


def test_a_count_below_one_switches_nothing_off():
    guard = guard_of(10, 0.4, 12)
    guard.check_count(1, 0.5)
    for count in (0.039, 4.1, 1e12):
        with pytest.raises(ReplyError, match=r"reported 0\.4 before"):
            guard.check_count(1, count)


def test_an_evaluation_is_not_believed_either():
    guard = guard_of(10, 12, 14)
    guard.check_evaluation(0, 1_000)
    with pytest.raises(ReplyError, match="trains on 10"):
        guard.check_evaluation(0, 1_001)
    guard.check_evaluation(7, 12_000)  # it has trained nothing yet
    with pytest.raises(ReplyError, match="what others report"):
        guard.check_evaluation(7, 12_001)


def test_what_queries_say():
    assert believed_counts({}) == {}
    assert believed_counts({1: 1e9}) == {1: 1e9}
    assert believed_counts({1: 10, 2: 10_000}) == {1: 10, 2: 10_000}
    assert believed_counts({1: 10, 2: 10_001}) == {1: 10}
    assert believed_counts({1: 5, 2: 8, 3: 7, 4: 1e15}) == {1: 5, 2: 8, 3: 7}


def counting(counts, queried=None):
    """Return a handler whose clients, by node id from 1, count as the round's number says."""

    def handler(message):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind == "query":
            more = {"num-examples": queried[node - 1]} if queried else {}
            return query_reply(**{"partition-id": node - 1}, **more)
        config = message.content["config"]
        adapter = random_adapter(int(config["lora-rank"]), seed=node)
        return message_reply(adapter, counts[node - 1], accuracy=float(node == 1))

    return handler


def start(handler, nodes, rounds=1, **options):
    records = []
    options = {"ranks": UniformRank(2), "scale": SCALE, "evaluate_fraction": 0, **options}
    strategy = FedLoRA(listeners=[records.append], **options)
    initial = to_record(random_adapter(2, seed=0).to_state_dict())
    result = strategy.start(FakeGrid(nodes, handler), initial, num_rounds=rounds, timeout=5)
    return result, records, strategy


@pytest.mark.parametrize("liar", [1, 2, 3])
@pytest.mark.parametrize("count", [1e5, 1e9, 1e15])
def test_whoever_comes_first_cannot_be_the_model(liar, count):
    counts = [count if node == liar else 10 + node for node in (1, 2, 3)]
    got, records, _ = start(counting(counts), [1, 2, 3], rounds=2)
    bad = {r["client"] for r in records if r.get("status") == "rejected"}
    assert bad == {liar - 1}
    honest = [node for node in (1, 2, 3) if node != liar]
    expected, _, _ = start(counting(counts), honest, rounds=2)
    assert {k: v.data for k, v in got.arrays.items()} == {
        k: v.data for k, v in expected.arrays.items()
    }


@pytest.mark.parametrize("liar", [1, 3])
def test_nor_with_weights_that_are_no_counts(liar):
    """They may change as they like, together."""

    def handler(message):
        content = counting([10, 11, 12])(message)
        if message.metadata.message_type == "train":
            node, number = message.metadata.dst_node_id, message.content["config"]["server-round"]
            content["metrics"]["trust"] = 1e-3 * 1e5**number * (1e4 if node == liar else node)
        return content

    _, records, _ = start(handler, [1, 2, 3], rounds=3, weighted_by_key="trust")
    bad = [r for r in records if r.get("status") == "rejected"]
    assert {r["client"] for r in bad} == {liar - 1}
    assert len(bad) == 3
    assert all("trust is" in r["reason"] for r in bad)


def test_evaluations_of_a_liar_are_left_out_before_anybody_is_known():
    def handler(message):
        if message.metadata.message_type == "train":
            return Error(code=0, reason="no")
        return counting([1e8, 10, 20])(message)

    result, _, _ = start(handler, [1, 2, 3], evaluate_fraction=1.0)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == 0.0


def test_shares_of_a_sampler_are_not_a_nodes_own_choice():
    handler = counting([10, 20, 30], queried=[10, 10**15, 30])
    _, records, strategy = start(handler, [1, 2, 3], sampling=IndependentSampling(1.0))
    assert {r["status"] for r in records if r["kind"] == "client"} == {"ok"}
    weights = strategy.participation.weights
    assert weights[1] == pytest.approx(20 / 60)  # as the mean of the others
    assert weights[0] == pytest.approx(10 / 60)


def test_huge_numbers_reach_no_mean():
    def handler(message):
        content = counting([10, 11, 12])(message)
        if message.metadata.message_type in ("train", "evaluate"):
            node = message.metadata.dst_node_id
            content["metrics"]["loss"] = {1: 1e308, 2: 0.5, 3: -1e308}[node]
            content["metrics"]["own"] = {1: 1.0, 2: 2.0, 3: 1e308}[node]
        return content

    result, records, _ = start(handler, [1, 2, 3], evaluate_fraction=1.0)
    book = next(r for r in records if r["kind"] == "round" and r["round"] == 1)
    assert book["train_loss"] == 0.5
    assert book["clients_loss"] == 0.5
    for metrics in (result.train_metrics_clientapp[1], result.evaluate_metrics_clientapp[1]):
        assert all(math.isfinite(value) for value in metrics.values())


# ----- who is asked again -------------------------------------------------------------------


class Moody:
    """Nodes that answer a query only from their nth on, and may change their limit."""

    def __init__(self, silent=0, fails=False):
        self.silent, self.fails = silent, fails
        self.asked, self.ranks, self.limit = 0, [], 2
        self.broken = False

    def __call__(self, message):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if node != 1:
            return counting([10, 10, 10])(message)
        if kind == "query":
            self.asked += 1
            if self.asked <= self.silent:
                return Error(code=0, reason="not yet") if self.fails else None
            return query_reply(**{"partition-id": 0, "max-rank": self.limit})
        rank = int(message.content["config"]["lora-rank"])
        self.ranks.append(rank)
        if self.broken:
            return Error(code=0, reason="out of memory")
        return message_reply(random_adapter(rank, seed=1))


def drive(node, rounds, each=lambda number, grid: None, **options):
    grid = FakeGrid([1, 2, 3], node)

    def after(record):
        if record["kind"] == "round":
            each(record["round"], grid)

    options = {"ranks": UniformRank(8), **options}
    strategy = FedLoRA(scale=SCALE, evaluate_fraction=0, query_timeout=0.3, listeners=[after],
                       **options)  # fmt: skip
    initial = to_record(random_adapter(8, seed=0).to_state_dict())
    strategy.start(grid, initial, num_rounds=rounds, timeout=5)
    return strategy


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize(
    ("silent", "ranks"), [(0, [2, 2, 2, 2, 2]), (2, [8, 8, 2, 2, 2]), (9, [8, 8, 8, 8, 8])]
)
def test_a_node_that_did_not_answer_is_asked_again_in_three_rounds(silent, ranks, fails):
    node = Moody(silent, fails)
    drive(node, 5)
    assert node.ranks == ranks
    assert node.asked == min(silent + 1, 3)


@pytest.mark.parametrize("policy", [UniformRank(8), ListRank([8], cycle=True), ReportedRank(8),
                                    QualityRank(4, 8)])  # fmt: skip
def test_a_limit_learned_late_caps_every_policy(policy):
    node = Moody(1, True)
    drive(node, 3, ranks=policy)
    assert node.ranks[1:] == [2, 2]


def test_a_limit_is_read_anew_when_a_node_was_away():
    node = Moody()

    def away(number, grid):
        grid.nodes = {1: [2, 3], 2: [1, 2, 3]}.get(number, [1, 2, 3])
        node.limit = 1

    drive(node, 4, away)
    assert node.ranks == [2, 1, 1]  # not there in round 2


def test_a_limit_is_read_anew_when_training_failed():
    node = Moody()

    def each(number, grid):
        node.broken = number == 1
        if number == 2:  # an operator looks at it
            node.limit = 1

    drive(node, 4, each)
    assert node.ranks == [2, 2, 1, 1]


def test_a_limit_that_changes_unseen_is_kept_to_by_the_node_and_then_by_the_server():
    net = peft.LoraConfig(r=8, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(OrderedDict(layer=nn.Linear(4, 4))), net)
    app, ranks = ClientApp(), []
    register_identity(app)

    @app.train()
    def train(message, context):
        apply_adapter(model, message, context)
        ranks.append(int(message.content["config"]["lora-rank"]))
        return make_reply(model, message, num_examples=5, context=context)

    nodes = Nodes(app, [1])
    nodes.contexts[1].node_config["max-rank"] = 8
    reasons = []

    def after(record):
        reasons.append(record.get("reason"))
        if record["kind"] == "round" and record["round"] == 1:  # restarted before anybody looks
            nodes.contexts[1].node_config["max-rank"] = 2

    strategy = FedLoRA(ranks=UniformRank(8), evaluate_fraction=0, listeners=[after])
    start = to_record(peft.get_peft_model_state_dict(model))
    strategy.start(FakeGrid([1], nodes), start, num_rounds=4, timeout=5)
    assert ranks == [8, 2, 2]  # nothing in round 2
    assert any("sends rank 8, but this node's max-rank is 2" in r for r in reasons if r)


@pytest.mark.parametrize(
    ("limit", "rank", "good"),
    [(None, 99, True), (8, 8, True), ("8", 9, False), (1, 2, False), ("high", 9, True)],
)
def test_the_limit_of_a_numpy_client(limit, rank, good):
    node = {} if limit is None else {"max-rank": limit}
    if good:
        check_limit({"lora-rank": rank}, node)
        return
    with pytest.raises(ValueError, match=f"sends rank {rank}, but this node's max-rank is {limit}"):
        receive_parameters(nn.Linear(1, 1), [], {"array-names": "[]", "lora-rank": rank}, node=node)
    with pytest.raises(RankLimitError) as caught:  # an app that is discreet may tell all of it
        check_limit({"lora-rank": rank}, node)
    assert caught.value.told == str(caught.value)


def test_a_place_lasts_whatever_is_said_later():
    roster = Roster()
    roster.join({7: {}, 8: {}})
    roster.observe(7, 50)
    roster.update(7, {"partition-id": 5, "max-rank": "3", "num-examples": 9000})
    client = roster.clients[7]
    assert (client.index, client.max_rank, client.num_examples) == (0, 3, 50)
    roster.update(7, {})
    assert roster.clients[7].max_rank is None


@pytest.mark.parametrize("value", [10**400, 5000 * "9", -1, True, 1.5, math.nan, [1], b"1", ""])
def test_no_answer_to_a_query_ends_a_run(value):
    roster = Roster()
    roster.join({7: {"partition-id": value, "max-rank": value, "num-examples": value}})
    assert vars(roster.clients[7]) == {
        "node_id": 7, "index": 0, "max_rank": None, "num_examples": None, "named": False
    }  # fmt: skip


def test_counts_are_read_without_the_arrays():
    FakeGrid([], None)  # messages need a run's identity
    asked = Message(RecordDict({"c": ConfigRecord()}), 1, "train")
    reply = Message(message_reply(random_adapter(1, seed=0), 12), reply_to=asked)
    assert MessageProtocol().count(reply) == 12.0
    content = RecordDict({"fitres.num_examples": MetricRecord({"num_examples": 7})})
    assert NumPyProtocol().count(Message(content, reply_to=asked)) == 7.0
    for broken in (RecordDict(), Error(0, "x")):
        for protocol in (MessageProtocol(), NumPyProtocol()):
            with pytest.raises(ValueError, match=r".+"):
                protocol.count(Message(broken, reply_to=asked))


# ----- clients whose training does not reach what they send -----------------------------------


def training(moves, steps=None, rank=2):
    """Return a handler whose node 1 moves the factors it is told to, and the head."""

    def handler(message):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind == "query":
            return query_reply(**{"partition-id": node - 1})
        config = message.content["config"]
        state = from_record(message.content["arrays"])
        moved = config["lora-train"] if node != 1 else moves
        out = {
            key: tensor + 0.01 if (factor_of(key) or moved or "") in moved else tensor
            for key, tensor in state.items()
            if (factor_of(key) or config["lora-send"]) in config["lora-send"]
        }
        more = {} if steps is None else {"steps": steps}
        content = RecordDict({"metrics": MetricRecord({"num-examples": 10, **more})})
        content["arrays"] = to_record(out)
        return content

    return handler


@pytest.mark.parametrize(
    ("rule", "moves", "steps", "said"),
    [
        ("replication", "AB", None, ""),
        ("replication", "", None, "lora_A and lora_B"),
        ("replication", "A", None, "lora_B"),
        ("replication", "", 0, ""),  # it has trained nothing, and says so
        ("ffa", "B", None, ""),  # A is frozen for everybody
        ("ffa", "", None, "lora_B"),
        ("rolora", "B", None, "lora_A"),  # B in round 1, A in round 2
        ("fedsa", "A", None, ""),
    ],
)
def test_a_factor_that_comes_back_as_it_was_is_said_once(rule, moves, steps, said, caplog):
    caplog.set_level("WARNING", logger="flwr")
    _, records, _ = start(training(moves, steps), [1, 2, 3], rounds=4, aggregation=rule)
    assert {r["status"] for r in records if r["kind"] == "client"} == {"ok"}
    lines = [r.getMessage() for r in caplog.records if "exactly as it was sent" in r.getMessage()]
    assert len(lines) == (said != "")
    assert not said or f"client 0 (node 1): {said} came back" in lines[0]


def test_a_first_step_that_cannot_move_the_first_factor_is_no_fault(caplog):
    caplog.set_level("WARNING", logger="flwr")
    adapter = random_adapter(2, seed=0)
    state = {k: t * 0 if factor_of(k) == "B" else t for k, t in adapter.to_state_dict().items()}
    strategy = FedLoRA(ranks=UniformRank(2), scale=SCALE, evaluate_fraction=0)
    strategy.start(FakeGrid([1], training("B")), to_record(state), num_rounds=1, timeout=5)
    assert "exactly as it was sent" not in caplog.text


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda key: "module." + key, "wrapped by DataParallel: let it pass the unwrapped model"),
        (lambda key: key.replace("base.", "base._orig_mod."), "wrapped by torch.compile"),
        (lambda key: key.replace("q.", "k."), "trains another model than the server has"),
    ],
)
def test_another_model_is_said_first(rename, said):
    def handler(message):
        if message.metadata.message_type == "query":
            return query_reply()
        state = from_record(message.content["arrays"])
        content = message_reply(random_adapter(2, seed=0))
        content["arrays"] = to_record({rename(key): tensor for key, tensor in state.items()})
        return content

    shapes = {f"base.layer.{i}.q": (4, 3) for i in range(30)}
    initial = random_adapter(2, seed=0, shapes=shapes, dense=False)
    records = []
    strategy = FedLoRA(ranks=UniformRank(2), scale=SCALE, listeners=[records.append])
    start = to_record(initial.to_state_dict())
    strategy.start(FakeGrid([1], handler), start, num_rounds=1, timeout=5)
    (record,) = [r for r in records if r["kind"] == "client"]
    assert said in record["reason"].partition(";")[0]
    assert "is missing" in record["reason"]
    assert len(record["reason"]) <= 1000


def test_a_node_that_hangs_does_not_hold_up_the_rounds_it_is_asked_before(monkeypatch):
    """Once known it is waited for as a node is that trains, not for as long as a newcomer."""
    waited = []

    def exchange(grid, messages, timeout, **options):
        waited.append((len(messages), timeout))
        return transport.exchange(grid, messages, min(timeout, 0.05), **options)

    monkeypatch.setattr(census, "exchange", exchange)

    def hangs(message):
        if message.metadata.message_type == "query" and len(waited) == 1:
            return query_reply(**{"partition-id": message.metadata.dst_node_id})
        if message.metadata.dst_node_id == 1:
            return None
        return message_reply(random_adapter(4, seed=1))

    strategy = FedLoRA(
        ranks=UniformRank(4), scale=2.0, sampling=FractionSampling(1.0), query_timeout=600,
        evaluate_fraction=0.0, min_answering=0.0,
    )  # fmt: skip
    arrays = to_record(random_adapter(4, seed=0).to_state_dict())
    strategy.start(FakeGrid([1, 2, 3], hangs), arrays, num_rounds=6, timeout=0.3)
    asked = [(count, timeout) for count, timeout in waited if count]
    assert asked == [(3, 600)] + 3 * [(1, census.AGAIN_SECONDS)]
