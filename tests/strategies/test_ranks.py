"""Rank policies: alone, and in FedLoRA with nodes that join, fail, lie and vanish."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies import FedLoRA
from strategies.client import profile, register_profile, tail_penalty
from strategies.clients import Client
from strategies.lora import Adapter, LoraPair, factor_of
from strategies.messages import from_record, to_record
from strategies.profiling import (
    GINI_SIMPSON,
    LABEL_ENTROPY,
    LOSS_ENTROPY,
    METRICS,
    profile_metrics,
    profile_rows,
)
from strategies.ranks import (
    AutoRank,
    QualityRank,
    ReportedRank,
    SelfPruningRank,
    Trained,
    make_rank_policy,
)
from strategies.ranks.mcda import critic_weights, scores_to_ranks, topsis_scores
from strategies.ranks.pruning import tail_norm
from strategies.ranks.report import rank_table
from strategies.wire import decode, encode
from tests.fakes import FakeGrid, message_reply, random_adapter, same

NODES = [901, 17, 455, 230, 78]
SCALE = 2.0
PROFILES = {i: (1.0 + i, 0.3 * i**1.5, 0.9 - 0.8 / (1 + i)) for i in range(12)}


def answer(index):
    return dict(zip(METRICS, PROFILES[index], strict=True))


def clients(n, caps=None):
    return [Client(100 - i, i, (caps or {}).get(i)) for i in range(n)]


def learned(n, caps=None, **options):
    policy = AutoRank(**{"min_rank": 2, "max_rank": 16, **options})
    everyone = clients(n, caps)
    for client in policy.to_profile(everyone, 1):
        policy.learn(client, answer(client.index), 1)
    return policy, everyone


def by_index(policy, everyone, server_round=1):
    ranks = policy.assign(everyone, server_round)
    return [ranks[c.node_id] for c in sorted(everyone, key=lambda c: c.index)]


# ----- the three numbers -------------------------------------------------------------------


def test_profile_metrics_are_the_formulas():
    losses, labels = [1.0, 2.0, 5.0], [0, 0, 1, 3]
    u, pi = np.array(losses) / 8, np.array([0.5, 0.25, 0.25])
    got = profile_metrics(losses, labels)
    assert got[LOSS_ENTROPY] == pytest.approx(-(u * np.log(u)).sum())
    assert got[LABEL_ENTROPY] == pytest.approx(-(pi * np.log(pi)).sum())
    assert got[GINI_SIMPSON] == pytest.approx(1 - (pi**2).sum())


@pytest.mark.parametrize(
    ("losses", "labels", "expected"),
    [
        ([0.0, 0.0], [1, 1], (0, 0, 0)),
        ([], [], (0, 0, 0)),
        ([math.nan, math.inf, -1], ["a", "b"], (0, math.log(2), 0.5)),
        ([3.0], [7], (0, 0, 0)),
        ([1e308, 1e308], [0, 1], (math.log(2), math.log(2), 0.5)),
        ([1.0, math.nan, 0.0, 1.0], [0, 0, 1, 1], (math.log(2), math.log(2), 0.5)),
    ],
)
def test_profile_metrics_of_odd_data(losses, labels, expected):
    assert list(profile_metrics(losses, labels).values()) == pytest.approx(expected)


def test_profile_rows_are_a_seeded_choice():
    assert profile_rows(5, 0, 1).tolist() == profile_rows(5, 9, 1).tolist() == [0, 1, 2, 3, 4]
    some = profile_rows(100, 10, 1)
    assert len(set(some)) == 10
    assert some.tolist() == sorted(profile_rows(100, 10, 1))
    assert some.tolist() != profile_rows(100, 10, 2).tolist()


# ----- AutoRank alone ------------------------------------------------------------------------


def test_autorank_maps_topsis_scores_to_ranks():
    policy, everyone = learned(5)
    x = np.array([PROFILES[i] for i in range(5)])
    expected = scores_to_ranks(topsis_scores(x, critic_weights(x)), 2, 16)
    assert by_index(policy, everyone) == expected.tolist()
    assert by_index(policy, everyone)[0] == 2
    assert by_index(policy, everyone)[-1] == 16
    why = policy.explain()
    assert why.weights[LOSS_ENTROPY] == pytest.approx(critic_weights(x)[0])
    assert why.clients[3][GINI_SIMPSON] == PROFILES[3][2]


def test_autorank_depends_on_profiles_alone():
    expected = by_index(*learned(6, budget=7.5))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        policy = AutoRank(2, 16, budget=7.5)
        ids = rng.permutation(1000)[:6]
        everyone = [Client(int(ids[i]), int(i)) for i in rng.permutation(6)]
        for client in rng.permutation(6):
            policy.learn(everyone[client], answer(everyone[client].index), 1)
        assert by_index(policy, everyone) == expected


@given(
    n=st.integers(1, 12),
    budget=st.floats(2, 16),
    caps=st.dictionaries(st.integers(0, 11), st.integers(1, 20)),
    unprofiled=st.sets(st.integers(0, 11)),
)
@settings(max_examples=150, deadline=None)
def test_a_budget_is_met_exactly_or_the_reason_said(n, budget, caps, unprofiled):
    policy = AutoRank(2, 16, budget=budget)
    everyone = clients(n, caps)
    for client in policy.to_profile(everyone, 1):
        policy.learn(client, None if client.index in unprofiled else answer(client.index), 1)
    ranks = by_index(policy, everyone)
    total = math.floor(budget * n + 1e-9)
    notes = " ".join(policy.explain().notes)
    if sum(ranks) != total:
        assert "the budget" in notes or "nobody is scored" in notes
    if abs(budget * n - total) > 1e-6:
        assert "ranks are whole" in notes
    for client, rank in zip(everyone, ranks, strict=True):
        high = min(16, client.max_rank or 16)
        assert min(2, high) <= rank <= high


def test_a_budget_is_shared_in_proportion_and_within_caps():
    policy, everyone = learned(5, budget=8)
    ranks = by_index(policy, everyone)
    assert sum(ranks) == 40
    assert ranks == sorted(ranks)
    assert not policy.explain().notes
    policy, everyone = learned(5, {4: 4}, budget=8)
    capped = by_index(policy, everyone)
    assert capped[4] == 4
    assert sum(capped) == 40  # what one cannot hold goes to the others
    policy, everyone = learned(3, {0: 2, 1: 2, 2: 2}, budget=8)
    assert by_index(policy, everyone) == [2, 2, 2]
    assert "their devices hold 6" in policy.explain().notes[0]


def test_a_budget_follows_who_is_connected_and_ranks_without_one_do_not():
    policy, everyone = learned(5, budget=8)
    by_index(policy, everyone)
    assert sum(by_index(policy, everyone[:3], 2)) == 24
    assert sum(by_index(policy, everyone, 3)) == 40
    policy, everyone = learned(5)
    whole = by_index(policy, everyone)
    assert by_index(policy, everyone[1:4], 2) == whole[1:4]


def test_orders_to_compare_with_deal_out_the_same_ranks():
    score, turned = (by_index(*learned(6, order=o)) for o in ("score", "reversed"))
    assert turned[0] == 16
    assert turned[-1] == 2
    assert [18 - r for r in score] == turned
    dealt = [by_index(*learned(6, order="random", seed=s)) for s in (1, 1, 2)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert sorted(dealt[0]) == sorted(score)


def test_autorank_refuses_what_cannot_be():
    for wrong, message in (
        ({"min_rank": 9, "max_rank": 8}, "must not exceed"),
        ({"min_rank": 0}, "at least 1"),
        ({"budget": 99}, "not between"),
        ({"budget": math.nan}, "not between"),
        ({"budget": 8, "byte_budget": 1e6}, "got both"),
        ({"byte_budget": -1}, "above 0"),
        ({"order": "best"}, "expected one of"),
        ({"reassign_every": -1}, "0 or more"),
        ({"fallback": 64}, "must not exceed"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoRank(**wrong)
    with pytest.raises(ValueError, match="did you mean 'autorank'"):
        make_rank_policy("autorang")


@pytest.mark.parametrize(
    "nonsense",
    [
        {},
        {**answer(1), LOSS_ENTROPY: math.nan},
        {**answer(1), LOSS_ENTROPY: "high"},
        {**answer(1), LABEL_ENTROPY: -0.1},
        {**answer(1), GINI_SIMPSON: 1.5},
        {**answer(1), GINI_SIMPSON: True},
        {**answer(1), LOSS_ENTROPY: 1e300},
        {**answer(1), LOSS_ENTROPY: [1.0]},
    ],
)
def test_a_nonsense_profile_is_refused_and_falls_back(nonsense):
    policy, everyone = learned(0)[0], clients(3)
    policy.learn(everyone[0], answer(0), 1)
    policy.learn(everyone[2], answer(2), 1)
    with pytest.raises(ValueError, match=r"entropy|gini"):
        policy.learn(everyone[1], nonsense, 1)
    assert by_index(policy, everyone) == [2, 2, 16]
    assert "client 1" in policy.explain().notes[0]
    assert policy.to_profile(everyone, 2) == []  # not asked by a query again …
    assert policy.train_settings(everyone[1], 2)["profile"] is True  # … but when it trains
    assert policy.train_settings(everyone[0], 2) == {}


def test_reassignment_waits_for_its_round_and_uses_the_newest_profiles():
    policy, everyone = learned(3, reassign_every=2)
    adapter = random_adapter(2, seed=0)
    first = by_index(policy, everyone)
    assert policy.train_settings(everyone[0], 1) == {}
    assert policy.train_settings(everyone[0], 2)["profile"] is True
    policy.observe(Trained(everyone[0], adapter, adapter, {**answer(9), "loss": 1.0}, 2))
    assert by_index(policy, everyone, 2) == first
    assert by_index(policy, everyone, 3)[0] == 16
    assert policy.train_settings(everyone[0], 3) == {}
    assert policy.train_settings(everyone[0], 4)["profile"] is True
    assert policy.train_settings(everyone[1], 3)["profile"] is True  # missed round 2


def test_who_was_away_when_ranks_were_assigned_moves_nobody():
    policy, everyone = learned(3, reassign_every=2)
    adapter = random_adapter(2, seed=0)
    by_index(policy, everyone)
    third = by_index(policy, everyone[1:], 3)
    policy.observe(Trained(everyone[1], adapter, adapter, answer(9), 3))
    assert by_index(policy, everyone, 4)[1:] == third  # the new profile waits for round 5
    assert by_index(policy, everyone, 5)[1] == 16


@pytest.mark.parametrize("kind", ["autorank", "quality", "self-pruning"])
def test_state_survives_json(kind):
    everyone = clients(3)
    make = {
        "autorank": lambda: AutoRank(2, 16, budget=6),
        "quality": lambda: QualityRank(2, 8, 0.4),
        "self-pruning": lambda: SelfPruningRank(8, gamma=0.5),
    }[kind]
    policy, big = make(), random_adapter(8, seed=0)
    small = Adapter({m: LoraPair(p.A, p.B * 0.5, p.scale) for m, p in big.pairs.items()})
    for client in policy.to_profile(everyone, 1):
        policy.learn(client, answer(client.index), 1)
    before = by_index(policy, everyone)
    for client in everyone[:2]:
        loss = math.nan if client.index else 1.0
        policy.observe(Trained(client, small, big, {"validation-loss": loss}, 1))
    other = make()
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    after = by_index(policy, everyone, 2)
    assert by_index(other, everyone, 2) == after
    assert (before == after) == (kind == "autorank")


# ----- quality and self-pruning alone --------------------------------------------------------


def feed(policy, losses, server_round):
    adapter = random_adapter(2, seed=0)
    for index, loss in losses.items():
        client = Client(100 - index, index)
        metrics = {"validation-loss": loss}
        policy.observe(Trained(client, adapter, adapter, metrics, server_round))


def test_quality_lifts_the_best_after_their_first_round():
    policy, everyone = QualityRank(5, 20, 0.2), clients(10)
    assert by_index(policy, everyone) == [5] * 10
    feed(policy, {i: 1.0 + (i - 3) ** 2 for i in range(10)}, 1)
    assert by_index(policy, everyone, 1) == [5] * 10  # not within the round
    assert by_index(policy, everyone, 2) == [5, 5, 20, 20, 5, 5, 5, 5, 5, 5]
    feed(policy, {9: 0.0}, 2)  # only the first round counts
    assert by_index(policy, everyone, 3)[9] == 5


def test_quality_with_partial_participation():
    policy, everyone = QualityRank(5, 20, 0.25), clients(8)
    feed(policy, {0: 1.0, 1: 2.0, 2: math.nan, 3: math.inf}, 1)
    assert by_index(policy, everyone, 2) == [20, 5, 5, 5, 5, 5, 5, 5]
    assert policy.train_settings(everyone[0], 2) == {}
    assert policy.train_settings(everyone[5], 2) == {"validate": True}
    feed(policy, {4: 0.4, 5: 0.3, 6: 0.2, 7: 0.1}, 2)  # better, for they started later
    assert by_index(policy, everyone, 3) == [20, 5, 5, 5, 5, 5, 5, 20]


def test_quality_prefers_the_servers_judgement():
    policy = QualityRank(5, 20, 0.5, score_fn=lambda a: float(a.pairs["tall"].A.sum()))
    assert policy.train_settings(Client(1, 0), 1) == {}
    for index, seed in enumerate((0, 1)):
        adapter = random_adapter(2, seed=seed)
        policy.observe(Trained(Client(index, index), adapter, adapter, {}, 1))
    sums = [float(random_adapter(2, seed=s).pairs["tall"].A.sum()) for s in (0, 1)]
    expected = [20, 5] if sums[0] < sums[1] else [5, 20]
    assert list(policy.assign([Client(0, 0), Client(1, 1)], 2).values()) == expected
    with pytest.raises(ValueError, match="validation-loss is missing"):
        QualityRank().observe(Trained(Client(1, 0), adapter, adapter, {}, 1))


def tail_scaled(adapter, factor, start):
    """Return the adapter with the columns of B from ``start`` on scaled."""
    pairs = {}
    for module, pair in adapter.pairs.items():
        B = pair.B.clone()
        B[:, start:] *= factor
        pairs[module] = LoraPair(pair.A, B, pair.scale)
    return Adapter(pairs, adapter.dense)


def test_self_pruning_shrinks_where_the_tail_fell():
    policy, everyone = SelfPruningRank(10, gamma=0.9), clients(3)
    sent = random_adapter(10, seed=0)
    for client, factor in zip(everyone, (0.5, 1.0, 1.5), strict=True):
        policy.observe(Trained(client, tail_scaled(sent, factor, 9), sent, {}, 1))
    assert by_index(policy, everyone, 2) == [9, 10, 10]
    smaller = sent.with_rank(9)  # the tail of 9 begins at 8
    policy.observe(Trained(everyone[0], tail_scaled(smaller, 0.5, 8), smaller, {}, 2))
    assert by_index(policy, everyone, 3) == [9, 10, 10]  # ⌈0.9 · 9⌉ = 9: as the rule says


@pytest.mark.parametrize(("gamma", "rank", "kept"), [
    (0.99, 32, 32), (0.99, 100, 99), (0.9, 32, 29), (0.5, 5, 3), (0.55, 20, 11), (0.5, 1, 1),
])  # fmt: skip
def test_self_pruning_keeps_gamma_of_the_rank(gamma, rank, kept):
    policy = SelfPruningRank(rank, gamma=gamma)
    sent = random_adapter(rank, seed=0)
    policy.observe(Trained(Client(1, 0), tail_scaled(sent, 0.5, 0), sent, {}, 1))
    assert policy.assign([Client(1, 0)], 2) == {1: kept}


def test_self_pruning_stops_at_its_least_rank_and_refuses_what_cannot_be():
    policy = SelfPruningRank(ReportedRank(8, fallback=8), gamma=0.5, min_rank=6)
    sent = random_adapter(8, seed=0)
    policy.observe(Trained(Client(1, 0), tail_scaled(sent, 0.5, 0), sent, {}, 1))
    assert policy.assign([Client(1, 0), Client(2, 1)], 2) == {1: 6, 2: 8}
    for wrong in ({"gamma": 1.0}, {"penalty": -1}, {"min_rank": 64}, {"start": AutoRank()}):
        with pytest.raises(ValueError, match="expected"):
            SelfPruningRank(**wrong)


def test_the_clients_penalty_is_the_servers_tail_and_has_a_gradient():
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 3), nn.Conv2d(2, 3, 3))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1", "2"])
    model = peft.get_peft_model(net, config)
    start = tail_penalty(model, 0.5)
    assert start == 0
    start.backward()  # at B = 0 the norm has no slope; it must not be NaN
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    state = peft.get_peft_model_state_dict(model)
    adapter = Adapter.from_state_dict(dict(state), config=config)
    assert len(adapter.pairs) == 3
    for gamma in (0.1, 0.5, 0.99):
        assert tail_penalty(model, gamma).item() == pytest.approx(tail_norm(adapter, gamma), 1e-5)


# ----- in FedLoRA ------------------------------------------------------------------------------


class Nodes:
    """Message API clients by partition; what one does wrong is said in ``faults``."""

    def __init__(self, faults=None, caps=None, terse=()):
        self.faults = faults or {}
        self.caps = caps or {}
        self.terse = terse
        self.profiled = []

    def __call__(self, message):
        index = NODES.index(message.metadata.dst_node_id)
        fault = self.faults.get(index)
        config = message.content["config"]
        if message.metadata.message_type == "query":
            limit = {"max-rank": self.caps[index]} if index in self.caps else {}
            me = ConfigRecord({"partition-id": index, **limit})
            if not config.get("profile"):
                return RecordDict({"me": me})
            self.profiled.append(index)
            match fault:
                case "silent":
                    return None
                case "error":
                    return Error(code=0, reason="no handler")
                case "text":
                    return RecordDict({"x": ConfigRecord(dict.fromkeys(METRICS, "high"))})
                case "NaN":
                    return RecordDict({"x": MetricRecord(dict.fromkeys(METRICS, math.nan))})
                case "negative":
                    return RecordDict({"x": MetricRecord(dict.fromkeys(METRICS, -1.0))})
                case "empty":
                    return RecordDict()
            metrics = MetricRecord({**answer(index), "num-examples": 10 + index})
            # Some apps answer one question alone.
            return RecordDict(
                {"profile": metrics} | ({"me": me} if index not in self.terse else {})
            )
        if message.metadata.message_type == "evaluate":
            return RecordDict({"m": MetricRecord({"num-examples": 10, "loss": 1.0})})
        arrays = decode(from_record(message.content["arrays"]), config["wire-dtype"])
        adapter = Adapter.from_state_dict(arrays, SCALE)
        g = torch.Generator().manual_seed(index)
        state = {
            k: v + 0.1 * torch.randn(v.shape, generator=g)
            for k, v in adapter.to_state_dict().items()
        }
        extra = {}
        if config.get("profile"):  # by then the data has changed: the order is turned
            extra = answer(4 - index) if fault != "NaN" else dict.fromkeys(METRICS, math.nan)
        reply = message_reply(Adapter.from_state_dict(state, SCALE), 10 + index, **extra)
        kept = {k: v for k, v in state.items() if (factor_of(k) or "") in config["lora-send"]}
        reply["arrays"] = to_record(encode(kept, config["wire-dtype"]))
        return reply


def run(policy, nodes=None, *, grid=None, rounds=2, rank=16, shapes=None, **options):
    records = []
    strategy = FedLoRA(
        ranks=policy,
        scale=SCALE,
        listeners=[records.append],
        **{"query_timeout": 0.3, "aggregation": "rbla", **options},
    )
    grid = grid or FakeGrid(NODES, nodes or Nodes())
    start = to_record(random_adapter(rank, seed=0, shapes=shapes).to_state_dict())
    result = strategy.start(grid, start, num_rounds=rounds, timeout=5)
    return result.arrays, records, grid


def ranks_in(records, server_round):
    return {
        r["client"]: r["rank"]
        for r in records
        if r["kind"] == "client" and r["round"] == server_round
    }


@pytest.mark.parametrize("terse", [(), (1, 3), range(5)])
def test_autorank_end_to_end(terse, caplog):
    caplog.set_level("INFO", logger="flwr")
    nodes = Nodes(terse=terse)
    _, records, grid = run(AutoRank(2, 16), nodes)
    assert sorted(nodes.profiled) == [0, 1, 2, 3, 4]  # once each, in both rounds
    assert ranks_in(records, 1) == ranks_in(records, 2)
    assert list(ranks_in(records, 1).values()) == by_index(*learned(5))
    (told,) = [r for r in records if r["kind"] == "ranks"]
    assert json.loads(json.dumps(told)) == told
    assert [c["samples"] for c in told["clients"]] == [10, 11, 12, 13, 14]
    assert sum(told["weights"].values()) == pytest.approx(1)
    assert rank_table(told)[1].split() == ["client", "samples", *METRICS, "score", "rank"]
    for line in rank_table(told):
        assert line in caplog.text
    queries = [m for m in grid.sent if m.metadata.message_type == "query"]
    assert len(queries) == 5 + len(terse)  # who are you and your profile, in one
    for message in grid.sent:
        assert len(message.content.array_records) == (message.metadata.message_type != "query")


@pytest.mark.parametrize("fault", ["silent", "error", "text", "NaN", "negative", "empty"])
def test_a_client_without_a_usable_profile_gets_the_fallback(fault, caplog):
    caplog.set_level("WARNING", logger="flwr")
    nodes = Nodes({2: fault}, caps={4: 8})
    _, records, _ = run(AutoRank(2, 16, fallback=3), nodes, rounds=3)
    assert len([r for r in records if r.get("status") == "ok"]) == 15
    first, second = ranks_in(records, 1), ranks_in(records, 2)
    assert first[2] == 3
    assert first[4] == 8  # its device's limit
    assert nodes.profiled.count(2) == 1
    assert "rank 3 (fallback): client 2" in caplog.text
    # asked again with its training message: then it is scored like the others
    assert second[2] == (3 if fault == "NaN" else ranks_in(records, 3)[2])
    scored = [r for r in records if r["kind"] == "ranks"][-1]["clients"][2]["score"]
    assert (scored is None) == (fault == "NaN")


def test_a_node_that_joins_in_round_3_is_profiled_and_one_that_leaves_is_no_trouble():
    nodes = Nodes()
    grid = FakeGrid(NODES[:3], nodes)

    class Moving(FakeGrid):
        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "evaluate":
                    seen = message.content["config"]["server-round"]
                    self.nodes = NODES[1:] if seen == 2 else self.nodes
            return super().push_messages(messages)

    grid = Moving(NODES[:3], nodes)
    _, records, _ = run(AutoRank(2, 16, budget=8), grid=grid, rounds=3)
    assert sorted(nodes.profiled) == [0, 1, 2, 3, 4]
    assert sorted(nodes.profiled[:3]) == [0, 1, 2]
    assert sum(ranks_in(records, 2).values()) == 24
    third = ranks_in(records, 3)
    assert list(third) == [1, 2, 3, 4]
    assert sum(third.values()) == 32
    assert third[4] > third[1]


def test_reassigning_profiles_again_and_loses_nothing():
    policy = AutoRank(2, 16, reassign_every=2)
    _, records, grid = run(policy, rounds=3)
    first, third = ranks_in(records, 1), ranks_in(records, 3)
    assert ranks_in(records, 2) == first
    assert list(third.values()) == list(first.values())[::-1]
    told = [r for r in records if r["kind"] == "ranks"]
    assert [r["round"] for r in told] == [1, 3]
    # the new slice is the leading part of the one global adapter
    trains = [m for m in grid.sent if m.metadata.message_type == "train"][-5:]
    views = [Adapter.from_state_dict(from_record(m.content["arrays"]), SCALE) for m in trains]
    whole = max(views, key=lambda a: a.rank)
    for view in views:
        assert same(view, whole.with_rank(view.rank))
    profiled = [m.content["config"].get("profile", False) for m in grid.sent
                if m.metadata.message_type == "train"]  # fmt: skip
    assert profiled == [False] * 5 + [True] * 5 + [False] * 5
    # what only one client reported is not averaged as if all had
    strategy = FedLoRA(ranks=policy)
    metrics = strategy.replies.aggregate(
        [_reply(answer(1))], lambda records, _: records[0]["metrics"], strategy.ranks.metrics
    )
    assert metrics.keys() == {"loss", "num-examples"}


def _reply(metrics):
    from strategies.messages import Reply

    return Reply({}, 1.0, {"loss": 1.0, **metrics})


@pytest.mark.parametrize("wire", ["float32", "int8"])
@pytest.mark.parametrize("rule", ["rbla", "ffa"])
def test_a_byte_budget_is_kept_and_used(rule, wire):
    budget = 60_000
    policy = AutoRank(2, 16, byte_budget=budget)
    shapes = {"q": (40, 30), "v": (30, 40)}
    _, records, _ = run(policy, rounds=1, wire_dtype=wire, aggregation=rule, shapes=shapes)
    book = next(r for r in records if r["kind"] == "round")
    fixed, per_rank = policy.state_dict()["cost"]
    moved = book["bytes_down"] + book["bytes_up"]
    assert moved == pytest.approx(5 * fixed + per_rank * sum(book["ranks"]))
    if any("maximum" in note for note in policy.explain().notes):
        assert book["ranks"] == [16] * 5
        assert moved < budget
    else:
        assert budget - per_rank < moved <= budget


def test_an_impossible_byte_budget_is_said_and_the_run_goes_on(caplog):
    caplog.set_level("WARNING", logger="flwr")
    _, records, _ = run(AutoRank(2, 16, byte_budget=1000), rounds=1)
    assert set(ranks_in(records, 1).values()) == {2}
    assert "less than the head and other fixed parts" in caplog.text
    assert "every one gets its minimum" in caplog.text


def test_same_seed_same_result_whatever_the_node_ids_and_the_order_of_replies():
    found = []
    for seed in (None, 1, 2):
        rng = None if seed is None else np.random.default_rng(seed)
        nodes = Nodes({1: "NaN"})
        order = NODES if seed is None else [int(i) for i in rng.permutation(NODES)]
        grid = FakeGrid(order, nodes, rng=rng)
        arrays, records, _ = run(AutoRank(2, 16, budget=7, reassign_every=1), grid=grid, rounds=3)
        ranks = [ranks_in(records, n) for n in (1, 2, 3)]
        found.append(({k: v.data for k, v in arrays.items()}, ranks))
    assert found[0] == found[1] == found[2]


def test_without_partition_ids_ranks_still_follow_the_data():
    class Anonymous(Nodes):
        def __call__(self, message):
            content = super().__call__(message)
            if "me" in content:
                content["me"] = ConfigRecord({})
            return content

    _, records, _ = run(AutoRank(2, 16), Anonymous(), rounds=1)
    by_node = {int(r["node"]): r["rank"] for r in records if r["kind"] == "client"}
    assert [by_node[n] for n in NODES] == by_index(*learned(5))


def test_self_pruning_in_fedlora():
    arrays, records, grid = run(SelfPruningRank(8, gamma=0.5, penalty=0.1), rank=8, rounds=3)
    assert set(ranks_in(records, 1).values()) == {8}
    for message in grid.sent:
        if message.metadata.message_type == "train":
            config = message.content["config"]
            assert (config["prune-gamma"], config["prune-penalty"]) == (0.5, 0.1)
    ranks = [ranks_in(records, n) for n in (1, 2, 3)]
    assert all(b <= a for x, y in zip(ranks, ranks[1:]) for a, b in zip(x.values(), y.values()))  # noqa: B905, RUF007
    assert isinstance(arrays, ArrayRecord)


# ----- the client's side -------------------------------------------------------------------------


def test_one_line_registers_a_message_apps_profile():
    app, calls = ClientApp(), []

    def measure(context):
        calls.append(context.node_id)
        return [1.0, 1.0], [0, 1]

    register_profile(app, measure)
    FakeGrid([], None)  # messages need a run's identity
    node_config = {"partition-id": 3, "max-rank": 8, "data-path": "/secret"}
    context = Context(1, 7, node_config, RecordDict(), {})

    def ask(**config):
        content = RecordDict({"config": ConfigRecord(config)})
        message = Message(content, 7, "query")
        message.metadata.__dict__["_message_id"] = "1"
        return app(message, context).content

    assert dict(ask()["properties"]) == {"partition-id": 3, "max-rank": 8}
    assert not calls
    for _ in range(2):
        told = dict(ask(profile=True)["profile"])
        assert told == {**profile_metrics([1, 1], [0, 1]), "num-examples": 2}
    assert calls == [7]  # kept in the Flower state
    assert set(context.state["fedlora.profile"]) == {*METRICS, "num-examples"}
    profile(context.state, lambda: ([1.0], [0]), again=True)
    assert ask(profile=True)["profile"]["num-examples"] == 1

    node_config.update({"num-examples": 2})
    assert ask()["properties"]["num-examples"] == 2
    assert "num-examples" not in ask(**{"dp-noise-multiplier": 1.0})["properties"]
    node_config.update({"dp-noise-multiplier": 4.0})  # from here on the node is private
    assert dict(ask()["properties"]) == {"partition-id": 3, "max-rank": 8}
    with pytest.raises(ValueError, match="keeps its data private"):
        ask(profile=True)
