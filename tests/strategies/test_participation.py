"""Sampling, the clock and checkpoints inside a run: who counts how much, and what lasts."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, MetricRecord, RecordDict

from strategies import (
    AdaptiveSampling,
    AutoRank,
    FedLoRA,
    FedMomentum,
    FedPLoRA,
    FedRotLoRA,
    FedSVD,
    presets,
)
from strategies.checkpoint import Checkpoints
from strategies.lora import Adapter, factor_of
from strategies.messages import from_record, to_record
from strategies.model import MERGED, GlobalModel
from strategies.privacy import Privacy, PrivateRun
from strategies.ranks import AutoRank as AutoRankPolicy
from strategies.ranks import ListRank, UniformRank
from strategies.sampling import FractionSampling, IndependentSampling, PlannedSampling
from strategies.saving import Saver
from strategies.wallclock import Exponential, SimulatedClock
from tests.fakes import FakeGrid, query_reply, random_adapter, same

PRESETS = [p for p in vars(presets).values() if isinstance(p, type) and issubclass(p, FedLoRA)]

NODES = [901, 17, 455, 230, 78, 333]
PARTITION = {node: i for i, node in enumerate(NODES)}
COUNTS = [10, 30, 20, 15, 5, 40]  # rows of each client


def read(record, scale=2.0) -> Adapter:
    return Adapter.from_state_dict(from_record(record), scale)


def client(message, *, seed_round=True, partition=PARTITION):
    """Move every entry by a seeded amount of this client (and round)."""
    index = partition[message.metadata.dst_node_id]
    if message.metadata.message_type == "query":
        return query_reply(**{"partition-id": index, "num-examples": COUNTS[index]})
    if message.metadata.message_type == "evaluate":
        return RecordDict({"metrics": MetricRecord({"num-examples": 10, "loss": 1.0})})
    config = message.content["config"]
    sent = read(message.content["arrays"], float(config["lora-scale"]))
    g = torch.Generator().manual_seed(index + 100 * int(config["server-round"]) * seed_round)
    state = {k: v + torch.randn(v.shape, generator=g) for k, v in sent.to_state_dict().items()}
    asked = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith(MERGED) and (factor_of(key) or "") in config["lora-send"]
    }
    metrics = {"num-examples": COUNTS[index], "loss": 0.5, "steps": 3, "seconds": 0.5}
    return RecordDict({"arrays": to_record(asked), "metrics": MetricRecord(metrics)})


def clock(**options):
    return SimulatedClock("phones", base_flops=1e9, rank_flops=1e7, steps=3, **options)


def run(grid=None, *, rounds=1, initial=None, handler=client, **options):
    ranks = ListRank([2, 4], cycle=True)
    settings = {"aggregation": "rbla", "ranks": ranks, "scale": 2.0, "query": True}
    records = []
    strategy = FedLoRA(
        **{**settings, "evaluate_fraction": 0.0, "listeners": [records.append], **options}
    )
    start = to_record((initial or random_adapter(4, seed=0)).to_state_dict())
    grid = grid or FakeGrid(NODES, handler)
    result = strategy.start(grid, start, num_rounds=rounds, timeout=1)
    model = GlobalModel.from_tensors(from_record(result.arrays), 2.0).combined()
    return model, records, strategy


def books(records, kind="round"):
    return [r for r in records if r["kind"] == kind]


@pytest.mark.parametrize("rule", ["rbla", "zero-padding", "flexlora", "fslora", "flora"])
@pytest.mark.parametrize("estimator", ["unbiased", "ratio"])
def test_coins_that_always_fall_give_full_participation(rule, estimator):
    everybody, _, _ = run(aggregation=rule, sampling=FractionSampling(1.0))
    coins = IndependentSampling(1.0, estimator=estimator)
    sampled, _, _ = run(aggregation=rule, sampling=coins)
    for module in everybody.pairs:
        one, other = everybody.delta(module), sampled.delta(module)
        assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))
    for key, tensor in everybody.dense.items():
        assert torch.allclose(tensor, sampled.dense[key], atol=1e-4)


def test_the_mean_over_many_rounds_is_the_full_update():
    """The same round drawn anew with many seeds; the clients' moves do not depend on it."""
    q = [0.5, 0.9, 0.3, 0.6, 0.4, 0.8]
    common = {"aggregation": "zero-padding", "handler": partial(client, seed_round=False)}
    full, _, _ = run(sampling=FractionSampling(1.0), **common)
    draws = [
        run(sampling=IndependentSampling(q), seed=seed, **common)[0].to_state_dict()
        for seed in range(300)
    ]
    for key, expected in full.to_state_dict().items():
        values = torch.stack([d[key] for d in draws]).double()
        error = values.std(0) / np.sqrt(len(draws))
        assert ((values.mean(0) - expected).abs() <= 5 * error + 1e-6).all(), key


def test_an_empty_draw_is_a_legal_round_and_the_clock_runs():
    coins = IndependentSampling(1e-9)
    model, records, _ = run(sampling=coins, clock=clock(idle_seconds=2.5), rounds=3)
    assert same(model, random_adapter(4, seed=0))
    assert [r["clients"] for r in books(records)] == [0, 0, 0]
    assert [r["clock_total"] for r in books(records)] == [2.5, 5.0, 7.5]


def test_weights_are_shares_of_everybody_not_of_the_draw():
    grid = FakeGrid(NODES, client)
    _, _, strategy = run(grid, sampling=IndependentSampling(0.5), rounds=2)
    present = strategy.roster.present(NODES)
    a = {c.index: COUNTS[c.index] / sum(COUNTS) for c in present}
    for c in present:
        asked, answered = (
            strategy.participation._asked.get(c.index, 0),
            strategy.participation._answered.get(c.index, 0),
        )
        assert asked == answered  # everybody answers, so nothing is made up for
        assert strategy.participation.weight(c, 0) == pytest.approx(a[c.index] / 0.5)


def test_who_answers_half_of_the_time_counts_twice():
    calls = {"n": 0}

    def moody(message):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 17:
            calls["n"] += 1
            if calls["n"] % 2:
                return Error(1, "out of memory")
        return client(message)

    _, records, strategy = run(sampling=IndependentSampling(1.0), rounds=40, handler=moody)
    unlucky = strategy.roster.clients[17]
    assert strategy.participation.weight(unlucky, 0) == pytest.approx(
        2 * 30 / sum(COUNTS), rel=0.06
    )
    assert sum(r["rejected"] for r in books(records)) == 20


def test_a_node_that_disappears_ends_nothing():
    grid = FakeGrid(NODES, client)
    records = []

    def leave(record):
        if record["kind"] == "round" and record["round"] == 2:
            grid.nodes.remove(455)

    strategy = FedLoRA(
        sampling=IndependentSampling(1.0), ranks=UniformRank(4), scale=2.0, seed=1,
        evaluate_fraction=0.0, listeners=[leave, records.append],
    )  # fmt: skip
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    strategy.start(grid, start, num_rounds=4, timeout=1)
    assert [r["accepted"] for r in books(records)] == [6, 6, 5, 5]


def test_a_rule_that_cannot_be_sampled_is_refused_before_anything_is_sent():
    grid = FakeGrid(NODES, client)
    with pytest.raises(ValueError, match=r"hetlora.*independent.*norms"):
        run(grid, aggregation="hetlora", sampling=IndependentSampling(0.5))
    with pytest.raises(ValueError, match=r"fedsa.*keeps a part"):
        run(grid, aggregation="fedsa", sampling=PlannedSampling(pilot_rounds=2))
    with pytest.raises(ValueError, match=r"server_rate.*estimator = 'unbiased'"):
        run(grid, sampling=IndependentSampling(0.5, server_rate=0.5))
    assert not grid.sent


def test_who_misses_the_deadline_is_left_out_and_said_so():
    _, open_ended, _ = run(clock=clock(), rounds=1)
    seconds = books(open_ended)[0]["clock_seconds"]
    deadline = 0.6 * seconds
    _, records, _ = run(clock=clock(deadline=deadline), rounds=1)
    (book,) = books(records)
    late = [r["client"] for r in books(records, "client") if r["status"] == "late"]
    assert late
    assert book["late"] == len(late)
    assert book["accepted"] == 6 - len(late)
    assert book["clock_seconds"] == pytest.approx(deadline, rel=1e-3)


def test_every_round_says_what_the_clock_says():
    _, records, _ = run(clock=clock(), rounds=2)
    for book in books(records):
        own = [r for r in books(records, "client") if r["round"] == book["round"]]
        assert book["bottleneck"] in {r["client"] for r in own}
        # Best shares let all finish together.
        ends = [r["compute_seconds"] + r["upload_seconds"] for r in own]
        assert ends == pytest.approx([book["clock_seconds"]] * len(own), rel=1e-4)


def evaluated(server_round, arrays):
    """A loss that falls from round to round, and with the distance from zero."""
    size = sum(float(t.norm()) for t in from_record(arrays).values())
    return MetricRecord({"loss": 3.0 - 0.1 * size / (1 + size) - 0.05 * server_round})


PLANNED = {
    "aggregation": "fslora",
    "ranks": UniformRank(4),
    "sampling": lambda: PlannedSampling(pilot_rounds=2, pilot_fractions=(1.0, 0.5), q_min=0.2),
    "clock": clock,
}
COMING = "coming and going"
SETTINGS = {
    "rbla": {"sampling": lambda: IndependentSampling(0.6)},
    "flora": {"aggregation": "flora"},
    "fedex": {"aggregation": "fedex"},
    "rolora": {"aggregation": "rolora"},
    "median": {"robust": "median", "server_optimizer": "adam"},
    "planned": PLANNED,
    COMING: {
        "aggregation": "zero-padding",
        "sampling": partial(PlannedSampling, q_min=0.3),
        "clock": lambda: clock(
            deadline=2.0,
            availability=Exponential(rng=np.random.default_rng(1), share=0.6, seconds=1),
        ),
    },
}


def fresh(settings):
    return {k: v() if callable(v) else v for k, v in settings.items()}


def whole_run(tmp_path, name, rounds, *, resume="", nodes=NODES):
    records = []
    saver = Saver(Checkpoints(tmp_path), resume_from=resume, fingerprint={"rule": name})
    strategy = FedLoRA(
        **{"ranks": ListRank([2, 4], cycle=True), "scale": 2.0, "evaluate_fraction": 0.0,
           "listeners": [records.append], "saver": saver, "query": True, **fresh(SETTINGS[name])}
    )  # fmt: skip
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    handler = partial(client, partition={node: i for i, node in enumerate(nodes)})
    grid = FakeGrid(nodes, handler)
    result = strategy.start(
        grid, start, num_rounds=rounds, timeout=1, evaluate_fn=evaluated,
        train_config=ConfigRecord({"lr": 0.1}),
    )  # fmt: skip
    saver.checkpoints.close()
    return result, records


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        *((name, stop) for name in SETTINGS for stop in (1, 3, 4, 5) if name != COMING),
        (COMING, 3),
    ],
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path, name, stop):
    straight, told = whole_run(tmp_path / "a", name, 7)
    whole_run(tmp_path / "b", name, stop)
    others = [node + 1000 for node in NODES]  # in a simulation node ids are new every time
    resumed, later = whole_run(tmp_path / "b", name, 7, resume="latest", nodes=others)
    one, two = from_record(straight.arrays), from_record(resumed.arrays)
    assert list(one) == list(two)
    assert all(torch.equal(one[k], two[k]) for k in one)
    timing = {"seconds", "train_seconds", "aggregate_seconds"}
    expected = [
        {k: v for k, v in r.items() if k not in timing} for r in books(told) if r["round"] > stop
    ]
    found = [{k: v for k, v in r.items() if k not in timing} for r in books(later)]
    if "clock" not in SETTINGS[name]:  # real seconds
        for book in (*expected, *found):
            for key in ("clock_seconds", "clock_total", "bottleneck", "expected_seconds"):
                book.pop(key, None)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(expected))
    assert straight.evaluate_metrics_serverapp == resumed.evaluate_metrics_serverapp


def test_a_plan_is_made_after_two_pilots_from_one_model():
    records = []
    strategy = FedLoRA(
        **{**fresh(PLANNED), "scale": 2.0, "evaluate_fraction": 0.0, "listeners": [records.append]}
    )
    sent = []

    def listen(message):
        if message.metadata.message_type == "train":
            sent.append(message.content["config"])
        return client(message)

    start = to_record(random_adapter(4, seed=0).to_state_dict())
    strategy.start(FakeGrid(NODES, listen), start, num_rounds=6, timeout=1, evaluate_fn=evaluated)
    ages = {int(c["server-round"]): int(c["model-round"]) for c in sent}
    assert [ages[r] for r in (1, 2, 3, 4)] == [1, 2, 1, 2]  # pilot 2 starts anew
    assert ages[5] == 3  # and the run goes on from one of them
    assert len(books(records, "pilots")) == 1
    (plan,) = books(records, "plan")
    assert plan["round"] == 5
    planned = [r["planned_seconds"] for r in books(records)[1:]]
    assert planned[:4] == [None] * 4
    assert planned[4] is not None


def test_another_setting_is_refused_or_warned_of_by_name(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    whole_run(tmp_path, "rbla", 1)
    with pytest.raises(ValueError, match=r"rule.*rbla.*flora"):
        Saver(checkpoints, resume_from="latest", fingerprint={"rule": "flora"}, fatal=["rule"])
    Saver(checkpoints, resume_from="latest", fingerprint={"rule": "flora"})
    assert "rule" in caplog.text


def test_presets_take_any_setting_of_the_strategy():
    for preset in PRESETS:
        strategy = preset(scale=2.0, seed=7, client_api="numpy")
        assert (strategy.scale, strategy.seed) == (2.0, 7)
    assert AutoRank(aggregation="flexlora").aggregation.name == "flexlora"


@pytest.mark.parametrize(
    ("preset", "rule"),
    [(FedPLoRA, "fold"), (FedRotLoRA, "fedit"), (FedSVD, "fedsvd"), (FedMomentum, "fedmomentum")],
)
def test_published_methods_run_by_their_names(preset, rule):
    own = {"max_rank": 4} if preset is FedPLoRA else {"rank": 4}
    strategy = preset(**own, scale=2.0, evaluate_fraction=0.0)
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    strategy.start(FakeGrid(NODES, client), start, num_rounds=2, timeout=1, evaluate_fn=evaluated)
    assert strategy.aggregation.name == rule
    assert strategy.round.number == 2
    assert strategy.round.accepted > 0
    assert FedRotLoRA().aggregation.align


def test_adaptive_sampling_runs_by_its_name():
    records = []
    strategy = AdaptiveSampling(
        clock=clock(), pilot_rounds=2, pilot_fractions=(1.0, 0.5), ranks=UniformRank(4),
        scale=2.0, evaluate_fraction=0.0, listeners=[records.append],
    )  # fmt: skip
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    strategy.start(FakeGrid(NODES, client), start, num_rounds=5, timeout=1, evaluate_fn=evaluated)
    (plan,) = books(records, "plan")
    assert plan["feasible"]
    assert len(plan["clients"]) == 6


def test_autorank_and_the_planner_together():
    """AutoRank says how much rank a client deserves, the planner how much of it to send."""

    def profiled(message):
        if message.metadata.message_type == "query":
            index = PARTITION[message.metadata.dst_node_id]
            own = {"partition-id": index, "num-examples": COUNTS[index]}
            own |= {"loss-entropy": index + 1.0, "label-entropy": 0.3 * index}
            return query_reply(**own, **{"gini-simpson": 0.1 * index})
        return client(message)

    records = []
    strategy = AdaptiveSampling(
        clock=clock(), pilot_rounds=2, pilot_fractions=(1.0, 0.5),
        ranks=AutoRankPolicy(2, 8), scale=2.0, evaluate_fraction=0.0,
        listeners=[records.append],
    )  # fmt: skip
    start = to_record(random_adapter(8, seed=0).to_state_dict())
    grid = FakeGrid(NODES, profiled)
    strategy.start(grid, start, num_rounds=6, timeout=1, evaluate_fn=evaluated)
    deserved = {c["client"]: c["rank"] for c in books(records, "ranks")[0]["clients"]}
    (plan,) = books(records, "plan")
    sent = {c["client"]: c["rank"] for c in plan["clients"]}
    assert deserved[0] == 2
    assert deserved[5] == 8
    assert all(sent[i] <= deserved[i] for i in sent)


def test_a_private_run_refuses_what_leaves_without_noise_and_counts_what_it_spends():
    privacy = PrivateRun(Privacy(clip=0.5, noise_multiplier=1.0))
    with pytest.raises(ValueError, match=r"scores|own rows"):
        run(privacy=privacy, evaluate_fraction=1.0)
    with pytest.raises(ValueError, match=r"planned.*numbers of rows"):
        run(privacy=privacy, sampling=PlannedSampling())
    settings = []

    def listen(message):
        if message.metadata.message_type == "train":
            settings.append(dict(message.content["config"]))
        return client(message)

    ranks = UniformRank(4)
    _, records, _ = run(privacy=privacy, ranks=ranks, handler=listen, rounds=2)
    assert {s["dp-clip"] for s in settings} == {0.5}
    one, two = (book["epsilon_local"] for book in books(records))
    assert 0 < one < two


def test_coins_hide_who_joined_behind_the_servers_noise():
    """Also a round that nobody joined must change the model."""
    privacy = PrivateRun(Privacy(clip=0.5, noise_multiplier=1.0))
    coins = IndependentSampling(1e-9, estimator="unbiased")
    model, records, _ = run(privacy=privacy, ranks=UniformRank(4), sampling=coins)
    assert books(records)[0]["clients"] == 0
    assert not same(model, random_adapter(4, seed=0))
    assert "epsilon_central" in books(records)[0]
