"""FedLoRA over a grid without a network: who gets what, what is refused, what is kept."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.compat.common import recorddict_compat as compat

from strategies import FedLoRA
from strategies.clients import Client, Roster
from strategies.lora import Adapter
from strategies.messages import NAMES_KEY, from_record, to_record
from strategies.ranks import ListRank, ReportedRank, UniformRank, make_rank_policy
from strategies.sampling import FractionSampling, make_sampler
from strategies.scores import Score, shown
from tests.fakes import FakeGrid, message_reply, query_reply, random_adapter, same

NODES = [901, 17, 455, 230, 78]  # Flower's ids say nothing about the order of partitions
PARTITION = {node: i for i, node in enumerate(NODES)}
SCALE = 2.0


def read(record: ArrayRecord) -> Adapter:
    return Adapter.from_state_dict(from_record(record), SCALE)


def trained(adapter: Adapter, seed: int) -> Adapter:
    """Return the adapter as a client of that seed would have changed it."""
    g = torch.Generator().manual_seed(seed)
    state = adapter.to_state_dict()
    return Adapter.from_state_dict(
        {k: v + torch.randn(v.shape, generator=g) for k, v in state.items()}, SCALE
    )


def honest(message):
    """A Message API client that trains whatever it was sent."""
    node = message.metadata.dst_node_id
    if message.metadata.message_type == "query":
        return query_reply(**{"partition-id": PARTITION[node]})
    if message.metadata.message_type == "evaluate":
        metrics = {"num-examples": 10, "accuracy": 0.1 * (PARTITION[node] + 1), "loss": 1.0}
        return RecordDict({"metrics": MetricRecord(metrics)})
    adapter = read(message.content["arrays"])
    return message_reply(trained(adapter, PARTITION[node]), weight=10 + PARTITION[node])


def make(**options):
    settings = {"ranks": ListRank([2, 4], cycle=True), "scale": SCALE, "query": True}
    return FedLoRA(**{**settings, **options})


def initial(rank=4):
    return to_record(random_adapter(rank, seed=0).to_state_dict())


def run(strategy, grid, rounds=2, **options):
    return strategy.start(grid, initial(), num_rounds=rounds, timeout=5, **options)


def test_every_client_gets_its_own_slice_and_settings():
    grid = FakeGrid(NODES, honest)
    config = ConfigRecord({"lr": 0.1})
    run(make(), grid, rounds=1, train_config=config)
    sent = [m for m in grid.sent if m.metadata.message_type == "train"]
    assert [m.metadata.dst_node_id for m in sent] == NODES  # by partition, not by node id
    whole = read(initial())
    for message in sent:
        index = PARTITION[message.metadata.dst_node_id]
        rank = [2, 4][index % 2]
        assert same(read(message.content["arrays"]), whole.with_rank(rank))
        own = message.content["config"]
        expected = {"lr": 0.1, "server-round": 1, "model-round": 1, "client-index": index}
        expected |= {"lora-train": "AB", "lora-send": "AB", "wire-dtype": "float32"}
        assert dict(own) == {**expected, "lora-rank": rank, "lora-scale": SCALE}
    assert dict(config) == {"lr": 0.1}  # the caller's config is not touched


@pytest.mark.parametrize("aggregation", ["zero-padding", "rbla", "replication"])
def test_same_seed_same_bytes_whatever_order_replies_come_in(aggregation):
    results = []
    for shuffle in (None, 1, 2, 3):
        ids = NODES if shuffle is None else list(np.random.default_rng(shuffle).permutation(NODES))
        rng = None if shuffle is None else np.random.default_rng(shuffle)
        grid = FakeGrid([int(i) for i in ids], honest, rng=rng)
        strategy = make(aggregation=aggregation, sampling=FractionSampling(0.6))
        results.append(run(strategy, grid).arrays)
    first = {k: v.data for k, v in results[0].items()}
    for other in results[1:]:
        assert {k: v.data for k, v in other.items()} == first
    different = run(
        make(aggregation=aggregation, sampling=FractionSampling(0.6), seed=7),
        FakeGrid(NODES, honest),
    ).arrays
    assert {k: v.data for k, v in different.items()} != first


def test_replies_handed_in_any_order_give_the_same_bytes():
    """As Flower's own ``start`` or a wrapper strategy calls it: a collection of replies."""
    results = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        strategy, grid = make(), FakeGrid(NODES, honest)
        messages = list(strategy.configure_train(1, initial(), ConfigRecord(), grid))
        ids = list(grid.push_messages(messages))
        replies = list(grid.pull_messages(ids))
        arrays, metrics = strategy.aggregate_train(1, [replies[i] for i in order])
        assert metrics["loss"] == pytest.approx(0.5)
        results.append({k: v.data for k, v in arrays.items()})
    assert results[0] == results[1]


def spoil(kind):
    """Return a handler where the client of partition 1 sends something bad."""

    def handler(message):
        content = honest(message)
        if message.metadata.message_type != "train":
            return content
        if PARTITION[message.metadata.dst_node_id] != 1:
            return content
        adapter = read(content["arrays"])
        state = adapter.to_state_dict()
        match kind:
            case "wrong rank":
                state = adapter.with_rank(3).to_state_dict()
            case "wrong shape":
                state["head.bias"] = torch.zeros(7)
            case "unknown key":
                state["extra.weight"] = torch.zeros(2)
            case "missing key":
                del state["head.bias"]
            case "missing factor":
                del state["tall.lora_A.weight"]
            case "NaN":
                state["wide.lora_B.weight"] = torch.full_like(state["wide.lora_B.weight"], math.nan)
            case "Inf":
                state["head.bias"] = torch.tensor([1.0, math.inf, 0.0])
            case "integers":
                state["head.bias"] = torch.tensor([1, 2, 3])
            case "truncated":
                array = content["arrays"]["head.bias"]
                array.data = array.data[:-3]
                return content
            case "zero weight" | "negative weight" | "NaN weight":
                weights = {"zero weight": 0, "negative weight": -5, "NaN weight": math.nan}
                return message_reply(adapter, weight=weights[kind])
            case "no weight":
                del content["metrics"]["num-examples"]
                return content
            case "no arrays":
                del content["arrays"]
                return content
            case "two array records":
                content["more"] = to_record({"x": torch.zeros(1)})
                return content
            case "scale of infinity":
                content["metrics"]["lora-scale"] = math.inf
                return content
            case "absurd weight":
                return message_reply(adapter, weight=1.7e308)
            case "weight of a thousand others":
                return message_reply(adapter, weight=20_000)
            case "another scale" | "huge scale":
                scale = 1.0 if kind == "another scale" else 1e30
                return message_reply(adapter, 11, **{"lora-scale": scale})
            case "header that is no header":
                array = content["arrays"]["head.bias"]
                array.data = b"\x93NUMPY\x01\x00\x02\x00{ " + array.data[10:]
                return content
            case "exception":
                return Error(code=0, reason="CUDA out of memory")
            case "silence":
                return None
        content["arrays"] = to_record(state)
        return content

    return handler


REASONS = {
    "wrong rank": "rank 3 for 'tall', but rank 4 was assigned",
    "wrong shape": r"'head.bias' has shape \(7\)|'head.bias' has shape \(7,\), expected \(3\)",
    "unknown key": "tensor 'extra.weight' is unknown",
    "missing key": "tensor 'head.bias' is missing",
    "missing factor": "lora_A of 'tall' is missing",
    "NaN": "'wide.lora_B.weight' holds NaN or Inf",
    "Inf": "'head.bias' holds NaN or Inf",
    "integers": "'head.bias' is torch.int64",
    "truncated": "array 'head.bias' cannot be read",
    "zero weight": "num-examples is 0, expected a number above 0",
    "negative weight": "num-examples is -5, expected a number above 0",
    "NaN weight": "num-examples is nan, expected a number above 0",
    "no weight": "'num-examples', by which replies are weighted, is missing",
    "no arrays": "expected one array record, got 0",
    "two array records": "expected one array record, got 2",
    "scale of infinity": "lora-scale is inf, expected a number above 0",
    "absurd weight": r"num-examples is 1.7e\+308, expected a number above 0, at most 3.4e\+38",
    "weight of a thousand others": "num-examples is 20000, more than 1000 times what others report",
    "another scale": "lora-scale is 1, but the server sets it, and said 2: apply_adapter",
    "huge scale": r"lora-scale is 1e\+30, but the server sets it, and said 2",
    "header that is no header": "array 'head.bias' cannot be read",
    "exception": "CUDA out of memory",
    "silence": "no answer",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_reply_is_rejected_by_name_and_the_round_goes_on(kind):
    records = []
    strategy = make(listeners=[records.append])
    arrays = strategy.start(FakeGrid(NODES, spoil(kind)), initial(), num_rounds=1, timeout=0.5)
    bad = [r for r in records if r.get("status") == "rejected"]
    assert [r["client"] for r in bad] == [1]
    assert bad[0]["node"] == str(NODES[1])
    with pytest.raises(AssertionError, match=REASONS[kind]):
        raise AssertionError(bad[0]["reason"])
    # the others make the same model as if the bad one had not been asked
    others = [n for n in NODES if n != NODES[1]]
    expected = make().start(FakeGrid(others, honest), initial(), num_rounds=1)
    got = {k: v.data for k, v in arrays.arrays.items()}
    assert got == {k: v.data for k, v in expected.arrays.items()}


def test_too_few_replies_leave_the_model(caplog):
    caplog.set_level("WARNING", logger="flwr")
    strategy = make(min_replies=5)
    start = initial()
    result = strategy.start(FakeGrid(NODES, spoil("exception")), start, num_rounds=2)
    assert result.arrays is start
    assert "4 good replies, fewer than min_replies = 5; the model stays as it was" in caplog.text


def test_the_proximal_weight_is_sent_where_there_is_one():
    for mu in (0.0, 0.25):
        told = []

        def answer(message, told=told):
            if message.metadata.message_type == "train":
                told.append(dict(message.content["config"]))
            return honest(message)

        run(make(proximal_mu=mu), FakeGrid(NODES[:2], answer), rounds=1)
        assert len(told) == 2
        assert [config.get("proximal-mu") for config in told] == [mu or None] * 2
    with pytest.raises(ValueError, match=r"proximal_mu: expected 0 \(none\) or more, got -1"):
        make(proximal_mu=-1)


def test_a_reply_may_name_the_scale_it_was_told():
    def told(message):
        content = honest(message)
        if message.metadata.message_type == "train":
            content["metrics"]["lora-scale"] = message.content["config"]["lora-scale"]
        return content

    silent = run(make(), FakeGrid(NODES, honest), rounds=1).arrays
    named = run(make(), FakeGrid(NODES, told), rounds=1).arrays
    assert {k: v.data for k, v in named.items()} == {k: v.data for k, v in silent.items()}


def test_reported_ranks_are_taken_as_they_come():
    def handler(message):
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            return query_reply(**{"partition-id": PARTITION[node], "max-rank": 1 + PARTITION[node]})
        content = honest(message)
        if message.metadata.message_type == "train" and PARTITION[node] == 4:
            smaller = read(content["arrays"]).with_rank(1)  # less than it was sent
            return message_reply(smaller, 14)
        return content

    records = []
    strategy = make(ranks=ReportedRank(4, fallback=2), listeners=[records.append])
    run(strategy, FakeGrid(NODES, handler), rounds=1)
    done = [r for r in records if r["kind"] == "client"]
    assert [r["rank"] for r in done] == [1, 2, 3, 4, 4]
    assert all(r["status"] == "ok" for r in done)


def test_a_device_limit_caps_every_policy():
    clients = [Client(1, 0, max_rank=4), Client(2, 1)]
    for policy in (UniformRank(8), ListRank([8, 8]), make_rank_policy("cycle", ranks=[8])):
        assert policy.assign(clients, 1) == {1: 4, 2: 8}


def test_policies_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="2 ranks are listed, but there is client 2"):
        ListRank([4, 8]).assign([Client(5, 2)], 1)
    for wrong in (
        lambda: UniformRank(0),
        lambda: ListRank([]),
        lambda: ReportedRank(4, fallback=8),
    ):
        with pytest.raises(ValueError, match=r"rank|fallback"):
            wrong()
    with pytest.raises(ValueError, match="did you mean 'reported'"):
        make_rank_policy("report")
    with pytest.raises(ValueError, match="did you mean 'fraction'"):
        make_sampler("fractoin")


def test_a_too_small_initial_model_is_refused_before_anything_is_sent():
    grid = FakeGrid(NODES, honest)
    with pytest.raises(ValueError, match="make the initial model with r = 4"):
        make().start(grid, initial(2), num_rounds=1)
    assert not grid.sent


@pytest.mark.parametrize(
    "wrong",
    [
        {"aggregation": "fedavgg"},
        {"client_api": "rest"},
        {"scale": 0},
        {"min_replies": 0},
        {"evaluate_fraction": 2},
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        FedLoRA(**wrong)


def test_evaluation_gives_mean_worst_and_spread():
    records = []
    strategy = make(listeners=[records.append])
    result = run(strategy, FakeGrid(NODES, honest), rounds=1)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.3)
    book = next(r for r in records if r["kind"] == "round")
    assert book["clients_accuracy"] == pytest.approx(0.3)
    assert book["clients_accuracy_worst"] == pytest.approx(0.1)
    assert book["clients_accuracy_spread"] == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert len([r for r in records if r["kind"] == "client-evaluation"]) == 5


def test_users_own_functions_are_called_as_flower_calls_them():
    seen = {}

    def train_metrics(records, key):
        seen["weights"] = [next(iter(r.metric_records.values()))[key] for r in records]
        return MetricRecord({"mine": 1.0})

    def evaluate(server_round, arrays):
        seen.setdefault("rounds", []).append(server_round)
        return MetricRecord({"accuracy": 0.5})

    strategy = make(train_metrics_aggr_fn=train_metrics)
    result = run(strategy, FakeGrid(NODES, honest), rounds=2, evaluate_fn=evaluate)
    assert seen == {"weights": [10, 11, 12, 13, 14], "rounds": [0, 1, 2]}
    assert result.train_metrics_clientapp[2]["mine"] == 1.0
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == 0.5


def numpy_client(message):
    """A NumPyClient, through Flower's own translation of records."""
    node = message.metadata.dst_node_id
    kind = message.metadata.message_type
    if kind == "get_properties":
        res = compat.GetPropertiesRes(
            compat.Status(compat.Code.OK, ""), {"partition-id": PARTITION[node]}
        )
        return compat.getpropertiesres_to_recorddict(res)
    if kind == "evaluate":
        res = compat.EvaluateRes(compat.Status(compat.Code.OK, ""), 1.0, 10, {"accuracy": 0.5})
        return compat.evaluateres_to_recorddict(res)
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

    ins = compat.recorddict_to_fitins(message.content, keep_input=True)
    names = json.loads(ins.config[NAMES_KEY])
    arrays = parameters_to_ndarrays(ins.parameters)
    state = {n: torch.from_numpy(a.copy()) for n, a in zip(names, arrays, strict=True)}
    out = trained(Adapter.from_state_dict(state, SCALE), PARTITION[node]).to_state_dict()
    res = compat.FitRes(
        compat.Status(compat.Code.OK, ""),
        ndarrays_to_parameters([out[n].numpy() for n in names]),
        10 + PARTITION[node],
        {"loss": 0.5, "note": "text is allowed"},
    )
    return compat.fitres_to_recorddict(res, keep_input=True)


def test_both_client_apis_give_the_same_model():
    message = run(make(), FakeGrid(NODES, honest)).arrays
    numpy = run(make(client_api="numpy"), FakeGrid(NODES, numpy_client)).arrays
    assert {k: v.data for k, v in message.items()} == {k: v.data for k, v in numpy.items()}


def test_a_numpy_client_that_fails_is_rejected():
    def handler(message):
        content = numpy_client(message)
        if message.metadata.message_type == "train" and PARTITION[message.metadata.dst_node_id] < 2:
            if PARTITION[message.metadata.dst_node_id] == 0:
                content["fitres.status"]["code"] = 5
                content["fitres.status"]["message"] = "no battery"
            else:
                del content["fitres.parameters"]["3"]
        return content

    records = []
    run(make(client_api="numpy", listeners=[records.append]), FakeGrid(NODES, handler), rounds=1)
    reasons = [r["reason"] for r in records if r.get("status") == "rejected"]
    assert reasons == ["the client answered: no battery", "9 arrays came back, expected 10"]


def test_a_message_client_under_the_numpy_protocol_is_told_so():
    records = []
    strategy = make(client_api="numpy", query=False, listeners=[records.append])

    def handler(message):
        return message_reply(random_adapter(2, seed=0))

    run(strategy, FakeGrid(NODES, handler), rounds=1)
    reasons = {r["reason"] for r in records if r.get("status") == "rejected"}
    assert any("needs client_api = 'message'" in r for r in reasons)


def test_clients_that_come_and_go():
    grid = FakeGrid(NODES[:2], honest)

    def evaluate(server_round, arrays):
        if server_round == 1:
            grid.nodes = NODES[1:]  # the first is gone, three are new
        return MetricRecord({})

    records = []
    strategy = make(listeners=[records.append])
    run(strategy, grid, rounds=2, evaluate_fn=evaluate)
    by_round = {r: [x["client"] for x in records if x["kind"] == "client" and x["round"] == r]
                for r in (1, 2)}  # fmt: skip
    assert by_round == {1: [0, 1], 2: [1, 2, 3, 4]}


def test_roster_numbers_clients_without_partition_ids_in_order_of_joining():
    roster = Roster()
    roster.join({30: {}, 10: {"max-rank": 8}, 20: {"partition-id": 0}})
    assert [(c.node_id, c.index) for c in roster.present([10, 20, 30])] == [
        (20, 0), (10, 1), (30, 2)]  # fmt: skip
    roster.join({5: {"partition-id": 1, "max-rank": "high"}})  # taken, and nonsense
    assert roster.clients[5].index == 3
    assert roster.clients[5].max_rank is None
    assert roster.clients[10].max_rank == 8


def test_fraction_sampling_is_seeded_and_sized():
    clients = [Client(i, i) for i in range(10)]
    sampler = FractionSampling(0.25, min_clients=3)
    one = sampler.sample(clients, 1, np.random.default_rng(5))
    assert len(one) == 3
    assert one == sampler.sample(clients, 1, np.random.default_rng(5))
    assert [c.index for c in one] == sorted(c.index for c in one)
    assert FractionSampling(1.0).sample(clients, 1, np.random.default_rng(0)) == clients
    assert FractionSampling(0.1, min_clients=30).sample(clients, 1, np.random.default_rng(0)) == (
        clients
    )
    with pytest.raises(ValueError, match="fraction"):
        FractionSampling(0)


def test_metrics_cannot_hide_what_the_server_says_of_a_client():
    names = ("rank", "round", "status", "client", "node", "kind", "bytes_up", "reason", "self")

    def handler(message):
        content = honest(message)
        if message.metadata.message_type in ("train", "evaluate"):
            content["metrics"].update(dict.fromkeys(names, 77))
        return content

    records = []
    run(make(listeners=[records.append]), FakeGrid(NODES, handler), rounds=1)
    done = [r for r in records if r["kind"] == "client"]
    assert [r["client"] for r in done] == [0, 1, 2, 3, 4]
    assert [r["rank"] for r in done] == [2, 4, 2, 4, 2]
    assert all(r["status"] == "ok" and r["bytes_up"] > 77 for r in done)


@pytest.mark.parametrize("rule", ["flexlora", "rb-lora", "flora", "fedex", "hetlora", "rbla"])
def test_one_huge_reply_never_ends_a_run(rule, caplog):
    caplog.set_level("WARNING", logger="flwr")

    def handler(message):
        content = honest(message)
        if message.metadata.message_type == "train" and PARTITION[message.metadata.dst_node_id] < 1:
            huge = {k: t * 0 + 1e30 for k, t in read(content["arrays"]).to_state_dict().items()}
            content["arrays"] = to_record(huge)
        return content

    result = run(make(aggregation=rule), FakeGrid(NODES, handler), rounds=2)
    assert read_model(result.arrays).adapter.non_finite() == []


def read_model(record):
    from strategies.model import GlobalModel

    return GlobalModel.from_tensors(from_record(record), SCALE)


def test_metrics_that_only_some_report_are_not_averaged_over_all():
    def handler(message):
        content = honest(message)
        if message.metadata.message_type == "train" and PARTITION[message.metadata.dst_node_id]:
            content["metrics"]["extra"] = 1.0
        return content

    result = run(make(), FakeGrid(NODES, handler), rounds=1)
    assert "extra" not in result.train_metrics_clientapp[1]
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(0.5)


def test_reported_ranks_are_asked_for_by_default():
    def handler(message):
        if message.metadata.message_type == "query":
            return query_reply(**{"max-rank": 3})
        return honest(message)

    records = []
    strategy = FedLoRA(ranks=ReportedRank(4, fallback=1), scale=SCALE, listeners=[records.append])
    run(strategy, FakeGrid(NODES, handler), rounds=1)
    assert {r["rank"] for r in records if r["kind"] == "client"} == {3}


def test_a_reply_above_the_global_rank_is_refused_under_reported_ranks():
    def handler(message):
        content = honest(message)
        if message.metadata.message_type == "train":
            content["arrays"] = to_record(read(content["arrays"]).with_rank(9).to_state_dict())
        return content

    records = []
    run(make(ranks=ReportedRank(4), listeners=[records.append]), FakeGrid(NODES, handler), rounds=1)
    done = [r for r in records if r["kind"] == "client"]
    assert all("but the global rank is 4" in r["reason"] for r in done)


def test_fedit_refuses_a_policy_of_unequal_ranks_before_anything_is_sent():
    grid = FakeGrid(NODES, honest)
    with pytest.raises(ValueError, match=r"fedit averages equal ranks only.*'list'"):
        make(aggregation="fedit").start(grid, initial(), num_rounds=1)
    assert not grid.sent
    make(aggregation="fedit", ranks=UniformRank(4)).start(grid, initial(), num_rounds=1)


def test_a_restarted_node_takes_its_old_place():
    roster = Roster()
    roster.join({10: {"partition-id": 0}, 11: {"partition-id": "1"}})
    roster.join({21: {"partition-id": 1}}, present=[10, 21])
    assert [(c.node_id, c.index) for c in roster.present([10, 21])] == [(10, 0), (21, 1)]
    assert 11 not in roster.clients


def test_listeners_hear_of_replies_when_they_arrive():
    records = []
    run(make(listeners=[records.append]), FakeGrid(NODES, honest), rounds=1)
    assert len([r for r in records if r["kind"] == "arrived"]) == 5
    assert all(r["bytes"] > 0 for r in records if r["kind"] == "arrived")


def test_all_that_clients_measure_is_in_the_round_and_what_is_worst_is_declared():
    def answer(message):
        content = honest(message)
        if message.metadata.message_type == "evaluate":
            own = content["metrics"]
            own["f1"], own["surprise"], own["total"] = 2 * own["accuracy"], 7 * own["accuracy"], 9.0
        return content

    records = []
    scores = [Score("surprise", "surprise", higher_is_better=False, top=None, digits=1)]
    strategy = make(listeners=[records.append], scores=scores)
    run(strategy, FakeGrid(NODES, answer), rounds=1)
    book = [r for r in records if r["kind"] == "round"][-1]
    assert book["clients_f1_worst"] == pytest.approx(0.2)
    assert book["clients_surprise_worst"] == pytest.approx(3.5)
    assert book["clients_surprise"] == pytest.approx(2.1)
    assert book["clients_total"] == len(NODES)  # the round's own number, whatever clients say
    assert "clients_num-examples" not in book
    assert "own data: surprise 2.1" in strategy.round_line(1, 0.0)
    assert records[0]["scores"][0]["name"] == "surprise"


def test_the_line_of_a_round_has_what_is_declared_or_what_there_is():
    known = (Score("accuracy", "accuracy", short="acc"), Score("macro_f1", "macro-F1", short="F1"))
    metrics = {"loss": 0.3, "accuracy": 0.51, "macro_f1": 0.25}
    assert shown(known, metrics) == "acc 0.510 F1 0.250"
    assert shown((), metrics) == "accuracy 0.510 macro_f1 0.250"
    assert shown(known, {"loss": 0.3, "loss_worst": 0.4}) == "test loss 0.300"
