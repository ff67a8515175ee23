"""The largest rank a node can train: measured, counted, bounded, and who says otherwise."""

import json
import math

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from strategies import FedLoRA
from strategies.capacity import (
    CAPACITY_KEY,
    DEVICE_FREE_BYTES,
    ECHO_KEY,
    ELAPSED_KEY,
    FREE_BYTES,
    PROBE_RANK,
    PROBE_SECONDS,
    PROCESS_SECONDS,
    STEP_SECONDS,
    Capacity,
    RankCost,
    checked_capacity,
    largest_rank,
)
from strategies.client import MEASURED_KEY, capacity, register_identity
from strategies.clients import Client
from strategies.profiling import METRICS
from strategies.ranks import AutoRank, CapacityRank, ListRank, UniformRank
from strategies.ranks.capacity import ECHO_BYTES
from strategies.sampling import PlannedSampling
from strategies.wallclock import SimulatedClock, rank_memory, saved_bytes
from tests.fakes import FakeGrid, query_reply, random_adapter
from tests.strategies.test_claims import to_record, training

COST = RankCost(
    base_flops=1e9, rank_flops=1e7, steps=10, base_bytes=1e8, rank_bytes=1e6,
    fixed_moved=1e5, rank_moved=1e4,
)  # fmt: skip


def answer(free=1e9, seconds=0.01, **more):
    measured = {FREE_BYTES: free, STEP_SECONDS: seconds, PROBE_RANK: 1}
    return {**measured, PROBE_SECONDS: 0.1, PROCESS_SECONDS: 1e3, **more}


def fits(rank, known, share, seconds):
    """Whether a rank fits, by the definition and nothing else."""
    free = known.free_bytes if known.device_free_bytes is None else known.device_free_bytes
    if COST.base_bytes + COST.rank_bytes * rank > share * free:
        return False
    moved = COST.fixed_moved + COST.rank_moved * rank
    if known.device_free_bytes is not None and moved > share * known.free_bytes:
        return False
    speed = (COST.base_flops + COST.rank_flops * known.rank) / known.step_seconds
    took = COST.steps * (COST.base_flops + COST.rank_flops * rank) / speed
    took += moved / known.link if known.link else 0.0
    return not seconds or took <= seconds


@pytest.mark.parametrize("free", [1e8, 3e8, 4e8, 1e9])
@pytest.mark.parametrize("device", [None, 2.5e8, 1e10])
@pytest.mark.parametrize("link", [None, 1e5, 1e6])
@pytest.mark.parametrize("seconds", [0.0, 0.15, 1.3, 5.0])
def test_the_largest_rank_is_the_last_that_fits(free, device, link, seconds):
    known = Capacity(free, device, 0.01, 1, link)
    found = largest_rank(known, COST, memory_share=0.5, seconds=seconds)
    assert found is not None
    tried = [rank for rank in range(1, 60_000) if fits(rank, known, 0.5, seconds)]
    assert found == (tried[-1] if tried else 0)


def test_a_rank_that_costs_nothing_has_no_limit():
    free = RankCost(1e9, 0.0, 10, 1e8, 0.0)
    assert largest_rank(Capacity(1e9, None, 0.01, 1), free) is None
    assert largest_rank(Capacity(1e8, None, 0.01, 1), free) == 0


# ----- what nodes say ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({FREE_BYTES: 1e30}, "free-bytes is 1e.30, expected 0 to"),
        ({FREE_BYTES: math.nan}, "free-bytes is nan"),
        ({FREE_BYTES: -1.0}, "free-bytes"),
        ({FREE_BYTES: "much"}, "expected a number"),
        ({FREE_BYTES: True}, "expected a number"),
        ({DEVICE_FREE_BYTES: math.inf}, "device-free-bytes"),
        ({STEP_SECONDS: 0}, "step-seconds"),
        ({PROBE_RANK: 0}, "probe-rank"),
        ({PROBE_SECONDS: -3}, "probe-seconds"),
        ({PROBE_SECONDS: None}, "probe-seconds is None"),
    ],
)
def test_nonsense_is_refused_by_name(lie, said):
    with pytest.raises(ValueError, match=said):
        checked_capacity({**answer(), **lie})
    with pytest.raises(ValueError, match="free-bytes is missing"):
        checked_capacity({})


def test_the_link_is_timed_by_what_comes_back():
    echo = "x" * 1000
    timed = {ELAPSED_KEY: 0.6, ECHO_KEY: echo}
    assert checked_capacity({**answer(), **timed}, echo).link == pytest.approx(2000 / 0.5)
    for other in ({ECHO_KEY: "y" * 1000}, {ECHO_KEY: 1}, {ELAPSED_KEY: None}):
        assert checked_capacity({**answer(), **timed, **other}, echo).link is None
    young = {**answer(), **timed, PROCESS_SECONDS: 0.4}  # and so the process began for this
    assert checked_capacity(young, echo).link == pytest.approx(2000 / 0.2)
    # Who says it was busy for longer than it took gains a bounded amount.
    busy = {**answer(), **timed, PROBE_SECONDS: 1e4}
    assert checked_capacity(busy, echo).link == pytest.approx(2000 / 0.0006)


def learned(policy, *answers, caps=None):
    caps = caps or [None] * len(answers)
    here = [Client(100 + i, i, cap) for i, cap in enumerate(caps)]
    for client, said in zip(here, answers, strict=True):
        try:
            policy.learn(client, said, 1)
        except ValueError as error:
            assert "free-bytes" in str(error)  # noqa: PT017
    return here


def test_everyone_gets_what_it_can_train_and_node_config_wins():
    policy = CapacityRank(32, cost=COST, fallback=4)
    answers = [answer(2.2e8), answer(1e12), answer(1e3), None, {FREE_BYTES: 1e40}, answer(2.2e8)]
    here = learned(policy, *answers, caps=[None, None, None, None, None, 64])
    assert policy.choose(here, 1) == [10, 32, 1, 4, 4, 32]
    notes = policy.explain().notes
    assert notes[0].startswith("no usable measurement, so rank 4 at most: client 3 (node 103)")
    assert "no rank at all, so rank 1 at most: client 2" in notes[1]
    assert policy.explain().clients[0]["limit"] == 10
    lower = [Client(100, 0, 3)]
    assert policy.choose(lower, 2) == [3]
    assert policy.to_profile(here, 2) == []
    policy.forget(0)
    assert policy.to_profile(here, 3) == [here[0]]


def test_a_policy_within_divides_its_budget_among_those_who_can():
    inner = AutoRank(2, 32, budget=8)
    policy = CapacityRank(within=inner, cost=COST)
    same = dict(zip(METRICS, (3.0, 1.0, 0.5), strict=True))
    weak, strong = {**answer(2.08e8), **same}, {**answer(1e12), **same}
    here = learned(policy, weak, strong, strong, strong)
    assert policy.choose(here, 1) == [4, 10, 9, 9]
    assert policy.max_rank == 32
    assert policy.core is inner
    assert set(policy.explain().clients[0]) > {"limit", "score", *METRICS}
    again = CapacityRank(within=AutoRank(2, 32, budget=8), cost=COST)
    again.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert again.choose(here, 2) == [4, 10, 9, 9]
    assert {CAPACITY_KEY, ECHO_KEY, "profile"} <= policy.profile_settings().keys()
    assert "within capacity (50% of the free memory, up to 32)" in policy.summary()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_rank": 2, "fallback": 4}, "must not exceed max_rank"),
        ({"memory_share": 0}, "memory_share"),
        ({"seconds": -1}, "seconds"),
        ({"min_rank": 0}, "min_rank"),
    ],
)
def test_what_it_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        CapacityRank(**options)
    with pytest.raises(ValueError, match="expected what a rank costs"):
        CapacityRank().choose([Client(1, 0)], 1)


# ----- in a run ------------------------------------------------------------------------------


def run(policy, answers, **options):
    train, told = training("AB"), []

    def handler(message):
        node = message.metadata.dst_node_id
        if message.metadata.message_type != "query":
            return train(message)
        (config,) = message.content.config_records.values()
        said = {"partition-id": node - 1}
        if config.get(CAPACITY_KEY):
            assert len(config[ECHO_KEY]) == ECHO_BYTES
            said |= {
                **answers[node - 1],
                PROBE_SECONDS: 0,
                ECHO_KEY: config[ECHO_KEY],
                ELAPSED_KEY: 1e-9,
            }
        return query_reply(**said)

    strategy = FedLoRA(
        ranks=policy, listeners=[told.append], scale=2.0, evaluate_fraction=0.0, **options
    )
    arrays = to_record(random_adapter(8, seed=0).to_state_dict())
    strategy.start(FakeGrid([1, 2, 3], handler), arrays, num_rounds=2, timeout=5)
    return strategy, told


def test_a_run_asks_once_times_the_link_and_says_why():
    policy = CapacityRank(8, cost=COST)
    _, told = run(policy, [answer(2.06e8), answer(2.1e8), answer(1e12)])
    assert [r["rank"] for r in told if r["kind"] == "client"] == [3, 5, 8] * 2
    (record,) = [r for r in told if r["kind"] == "ranks"]
    assert record["policy"] == "capacity"
    assert [entry["limit"] for entry in record["clients"]] == [3, 5, 8]
    for entry in record["clients"]:  # not by the second that it claims
        assert 0 < entry["link-mb"] < 1e5
    assert policy._moved[1] > 0  # what a rank moves is the packing's


def test_the_planner_sees_the_limits():
    policy = CapacityRank(within=UniformRank(8), cost=COST)
    answers = [answer(2.06e8), answer(2.1e8), answer(1e12)]
    sampler = PlannedSampling(alpha=1.0, beta=3.0, sketch_cost=0.25)
    clock = SimulatedClock("lab", base_flops=1e9, rank_flops=1e7, steps=5, seed=1)
    _, told = run(policy, answers, sampling=sampler, clock=clock, aggregation="fslora")
    (plan,) = [r for r in told if r["kind"] == "plan"]
    assert plan["feasible"]
    limits = {0: 3, 1: 5, 2: 8}
    assert all(1 <= one["rank"] <= limits[one["client"]] for one in plan["clients"])
    policy = CapacityRank(within=ListRank([2, 8, 4]), cost=COST)
    _, told = run(policy, answers)
    assert [r["rank"] for r in told if r["kind"] == "client"] == [2, 5, 4] * 2


# ----- on a node -----------------------------------------------------------------------------


def test_a_node_measures_once_and_echoes_each_time():
    made, state = [], RecordDict()

    def make_step():
        made.append(0)
        return lambda: made.append(1)

    assert capacity(state, {}, make_step) == {}
    first = capacity(state, {CAPACITY_KEY: True, ECHO_KEY: "abc"}, make_step, rank=2)
    assert made == [0, 1, 1, 1, 1, 1, 1]  # a first one, and five that are timed
    assert first[ECHO_KEY] == "abc"
    assert first[PROBE_RANK] == 2
    assert checked_capacity(first).free_bytes > 1e6
    assert capacity(state, {CAPACITY_KEY: True}, make_step).keys() == first.keys() - {ECHO_KEY}
    assert len(made) == 7
    assert MEASURED_KEY in state


def test_a_message_api_app_answers_and_a_private_node_does_not():
    app = ClientApp()
    register_identity(
        app, capacity_of=lambda context, config: capacity(context.state, config, lambda: int)
    )
    for node, says in (({"max-rank": 4}, True), ({"dp-noise-multiplier": 1.0}, False)):
        context = Context(1, 1, node, RecordDict(), {})
        for asked in (True, False):
            settings = ConfigRecord({CAPACITY_KEY: asked, ECHO_KEY: "abc"})
            message = Message(RecordDict({"config": settings}), 1, "query")
            message.metadata.__dict__["_message_id"] = "1"
            found = app(message, context).content.config_records["properties"]
            assert (STEP_SECONDS in found) == (says and asked)


class Toy(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.A, self.B = nn.Linear(16, rank, bias=False), nn.Linear(rank, 16, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.B(self.A(x))


def test_memory_is_counted_as_by_hand():
    def step_at(rank):
        toy.A, toy.B = nn.Linear(16, rank, bias=False), nn.Linear(rank, 16, bias=False)
        x = torch.randn(8, 16)
        return lambda: toy(x).sum().backward()

    toy = Toy(1)
    # Kept: the input, for A's gradient, and what is between A and B, for B's.
    assert saved_bytes(step_at(1), toy) == 4 * (8 * 16 + 8 * 1)
    base, each = rank_memory(step_at, toy)
    assert each == 16 * (16 + 16) + 4 * 8
    assert base == 4 * 8 * 16
    with pytest.raises(ValueError, match="low < high"):
        rank_memory(step_at, toy, 4, 4)
