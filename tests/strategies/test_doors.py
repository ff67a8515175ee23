"""What ``FedLoRA`` says to wrong arguments, and whom it lets take part."""

import numpy as np
import pytest
import torch

import strategies
from strategies import FedLoRA
from strategies.aggregation import FLoRA, make_aggregator
from strategies.clients import Client, Roster
from strategies.doors import FEDAVG
from strategies.lora import Adapter
from strategies.messages import from_record, to_record
from strategies.participation import MOST_MADE_UP, Participation
from strategies.ranks import ListRank, QualityRank, SelfPruningRank, UniformRank
from strategies.sampling import IndependentSampling
from strategies.trained import Trained
from strategies.wallclock import MeasuredClock
from tests.fakes import FakeGrid, message_reply, query_reply, random_adapter
from tests.strategies.test_participation import NODES, client


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranks": 8}, r"ranks: expected a RankPolicy or its name, got 8; .*UniformRank\(8\)"),
        ({"ranks": [2, 4, 8]}, r"ranks: .*got \[2, 4, 8\]; .*ListRank"),
        ({"ranks": strategies.AutoRank()}, "got AutoRank, which is a whole strategy"),
        ({"ranks": UniformRank}, "the class UniformRank itself"),
        ({"aggregation": strategies.FlexLoRA()}, "aggregation: expected an Aggregator.*preset"),
        ({"aggregation": 7}, "aggregation: expected an Aggregator or its name, got 7"),
        ({"sampling": 0.5}, r"sampling: .*got 0.5; .*FractionSampling\(0.5\)"),
        ({"clock": "lab"}, r"clock: expected a Clock, got 'lab'; .*SimulatedClock"),
        ({"ranks": None}, "ranks: expected a RankPolicy or its name, got None"),
        ({"ranks": "list"}, r"ranks: the name 'list' alone does not say enough.*ListRank\("),
        ({"sampling": strategies.AdaptiveSampling()}, "sampling: .*which is a whole strategy"),
        ({"sampling": strategies.AutoRank}, "class AutoRank, which makes a whole strategy"),
        ({"clock": MeasuredClock}, r"clock: .*the class MeasuredClock itself \(call it\)"),
        ({"listeners": "log.txt"}, "listeners: expected a list of callables, got 'log.txt'"),
        ({"listeners": print}, "listeners: expected a list of callables, got .*print"),
        ({"listeners": [1]}, "listeners: expected callables, got 1"),
        ({"scores": "accuracy"}, r"scores: expected a list of Score, got 'accuracy'; .*Score\("),
        ({"scores": ["accuracy"]}, "scores: expected Score, got 'accuracy'"),
        ({"saver": "runs"}, r"saver: expected a Saver, got 'runs'; .*Saver\(Checkpoints"),
        ({"privacy": 0.5}, r"privacy: expected a PrivateRun, got 0.5; .*PrivateRun\(Privacy"),
        ({"privacy": False}, "privacy: expected a PrivateRun, got False"),
        ({"stop_when": 0.9}, "stop_when: expected a callable, got 0.9; .*lambda scores"),
        ({"seed": "x"}, "seed: expected a whole number, got 'x'"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"scale": True}, "scale: expected a number, got True"),
        ({"min_replies": 2.5}, "min_replies: expected a whole number, at least 1, got 2.5"),
        ({"evaluate_fraction": "all"}, "evaluate_fraction: expected a number, 0 to 1, got 'all'"),
        ({"query": "no"}, "query: expected True or False, got 'no'"),
        ({"wire_dtype": 16}, "wire_dtype: expected a text, got 16"),
        ({"query_timeout": None}, "query_timeout: expected a number, seconds, 0 or more, got None"),
        ({"train_metrics_aggr_fn": "mean"}, "train_metrics_aggr_fn: expected a callable"),
        ({"evaluate_fractoin": 1}, "did you mean 'evaluate_fraction'"),
        *(({name: 1}, f"{name!r} of FedAvg is ") for name in FEDAVG),
    ],
)
def test_one_sentence_says_what_was_expected(settings, said):
    with pytest.raises(TypeError, match=said):
        FedLoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"aggregation": "flexlroa"}, "aggregation: expected one of .*did you mean 'flexlora'"),
        ({"ranks": "8"}, "ranks: expected one of uniform, .*got '8'"),
        ({"scale": float("nan")}, "scale: expected a number above 0, got nan"),
        ({"seed": -1}, "seed: expected a whole number of 0 or more, got -1"),
        ({"query_timeout": -1}, "query_timeout: expected seconds, 0 or more, got -1"),
        ({"client_api": None}, "client_api: expected 'message' or 'numpy', got None"),
    ],
)
def test_one_sentence_says_what_may_be(settings, said):
    with pytest.raises(ValueError, match=said):
        FedLoRA(**settings)


def test_what_counts_as_a_number_and_as_nothing_is_taken():
    strategy = FedLoRA(
        seed=np.int64(3), scale=np.float32(2.0), saver=None, profile_timeout=None, listeners=()
    )
    assert (strategy.seed, strategy.scale, strategy.census.profile_timeout) == (3, 2.0, 60.0)
    with pytest.raises(TypeError, match="every argument has a name, got 'flexlora' without one"):
        FedLoRA("flexlora")


def test_presets_refuse_the_same():
    with pytest.raises(TypeError, match="'fraction_train' of FedAvg is sampling="):
        strategies.FLoRA(fraction_train=0.5)


def check(start, **settings):
    FedLoRA(scale=2.0, **settings).check(to_record(start.to_state_dict()))


def test_models_that_cannot_work_are_refused_before_anything_is_sent():
    start = random_adapter(16, seed=0)
    with pytest.raises(ValueError, match=r"fedit.*rank 16 .*gives 8; .* with r = 8"):
        check(start, aggregation="fedit", ranks=UniformRank(8))
    check(start, aggregation="fedit", ranks=UniformRank(16))
    for judge in (QualityRank(2, 4, score_fn=lambda a: 0.0), SelfPruningRank(4)):
        with pytest.raises(ValueError, match=r"judges whole adapters .* fedsa keeps B"):
            check(start, aggregation="fedsa", ranks=judge)
    check(start, aggregation="fedsa", ranks=QualityRank(2, 4))
    with pytest.raises(ValueError, match="the initial arrays hold no LoRA module"):
        check(start.only_dense())
    check(start.only_dense(), head_only=True)
    biased = Adapter(start.pairs, {**start.dense, "tall.lora_B.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match="lora_bias"):
        check(biased, aggregation="fslora", ranks=UniformRank(16))
    check(biased, aggregation="rbla", ranks=UniformRank(16))


@pytest.mark.parametrize("part", [2, 7])
def test_self_pruning_shrinks_what_is_held_not_what_is_sent(part):
    policy = SelfPruningRank(20, gamma=0.55)
    clients = [Client(1, 0), Client(2, 1, max_rank=10)]
    assert policy.choose(clients, 1) == [20, 20]
    sent = random_adapter(part, seed=0)
    smaller = Adapter.from_state_dict({k: t / 2 for k, t in sent.to_state_dict().items()}, 2.0)
    for c in clients:
        policy.observe(Trained(c, smaller, sent, {}, 1))
    assert policy.choose(clients, 2) == [11, 6]


def run(seed, rule="flora"):
    strategy = FedLoRA(aggregation=rule, ranks=UniformRank(4), scale=2.0, seed=seed,
                       evaluate_fraction=0)  # fmt: skip
    arrays = to_record(random_adapter(4, seed=0).to_state_dict())
    return from_record(strategy.start(FakeGrid(NODES, client), arrays, 1, timeout=2).arrays)


def test_fresh_factors_follow_the_seed_of_the_run():
    one, again, other = run(1), run(1), run(2)
    key = "tall.lora_A.weight"
    assert torch.equal(one[key], again[key])
    assert not torch.equal(one[key], other[key])
    own = [run(seed, FLoRA(seed=5))[key] for seed in (1, 2)]
    assert torch.equal(*own)


def test_who_was_long_away_does_not_carry_the_model_off_at_its_return():
    taking = Participation(IndependentSampling(1.0), MeasuredClock(), make_aggregator("rbla"))
    clients = [Client(i, i, num_examples=10) for i in range(4)]
    for server_round in range(1, 21):
        args = (clients, [4] * 4, lambda: (0.0, 0.0), 4, np.random.default_rng(0))
        for chosen, _ in taking.choose(server_round, *args):
            if chosen.index or server_round < 2:
                taking.answered(chosen)
    taking.choose(21, *args)
    assert taking.weights[0] == pytest.approx(0.25 * MOST_MADE_UP)
    assert taking.weights[1] == pytest.approx(0.25)


# ----- who is who ---------------------------------------------------------------------------


def places(roster, nodes):
    return {c.node_id: c.index for c in roster.present(nodes)}


def test_a_restarted_node_waits_for_its_old_self_to_be_gone():
    roster = Roster()
    roster.join({10: {"partition-id": 0}, 11: {"partition-id": 1, "max-rank": 4}})
    roster.join({99: {"partition-id": 1}}, present=[10, 11, 99])
    assert places(roster, [10, 11, 99]) == {10: 0, 11: 1}
    assert roster.doubles == {99: 1}
    assert roster.unknown([10, 99]) == [99]
    roster.join({99: {"partition-id": 1}}, present=[10, 99])
    assert places(roster, [10, 99]) == {10: 0, 99: 1}
    assert roster.clients[99].max_rank == 4


def test_nodes_without_a_name_take_the_places_of_such_that_are_gone():
    roster = Roster()
    roster.join({5: {}, 6: {}, 7: {"partition-id": 2}})
    kept = Roster()
    kept.load_state_dict(roster.state_dict())
    kept.join({25: {}, 26: {}, 27: {}}, present=[25, 26, 27])  # a simulation's new ids
    assert places(kept, [25, 26, 27]) == {25: 0, 26: 1, 27: 3}


def test_who_joins_late_and_has_no_rank_is_left_out_by_name():
    def answer(message):
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            return query_reply(**{"partition-id": node})
        return message_reply(random_adapter(2, seed=node))

    grid = FakeGrid([0, 1], answer)

    def join(record):
        if record["kind"] == "round" and record["round"] == 1:
            grid.nodes.append(2)

    records = []
    strategy = FedLoRA(ranks=ListRank([2, 2]), scale=2.0, evaluate_fraction=0,
                       listeners=[join, records.append])  # fmt: skip
    strategy.start(grid, to_record(random_adapter(2, seed=9).to_state_dict()), 3, timeout=2)
    assert [r["accepted"] for r in records if r["kind"] == "round"] == [2, 2, 2]
