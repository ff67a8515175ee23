"""The policies that ask clients for more, with the real model and the real client app."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedlora_app import client_app
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.held_out import HeldOut
from fedlora_app.server_app import initial_model
from strategies import FedLoRA
from strategies.messages import to_record
from strategies.profiling import METRICS
from strategies.ranks import AutoRank
from tests.fakes import FakeGrid
from tests.integration.test_rules import ABOUT, FLAT, NODES, App


def run(*, rounds=2, app=None, score_fn=None, **keys):
    parts = read_config({**FLAT, "ranks.min": 2, "ranks.max": 8, **keys})
    config, policy = parts.config, parts.policy
    adapter = initial_model(parts, ABOUT)[1].adapter
    records = []
    if score_fn:
        parts.judge_by(score_fn)
    strategy = FedLoRA(
        aggregation=config.aggregation,
        ranks=policy,
        client_api="numpy",
        scale=config.lora.scale,
        listeners=[records.append],
    )
    settings = ConfigRecord({"task-info": json.dumps(ABOUT)})
    app = app or App(config)
    start = to_record(adapter.to_state_dict())
    result = strategy.start(
        FakeGrid(NODES, app), start, rounds, train_config=settings, evaluate_config=settings
    )
    done = [r for r in records if r["kind"] == "client"]
    assert [r["status"] for r in done] == ["ok"] * len(NODES) * rounds, done
    ranks = [[r["rank"] for r in done if r["round"] == n + 1] for n in range(rounds)]
    return result.arrays, ranks, records, app


@pytest.fixture
def passes(monkeypatch):
    """Count the profiling forward passes, and the rows of each."""
    rows = []
    original = client_app.per_sample_losses

    def counted(task, model, chosen, **options):
        rows.append(len(chosen))
        return original(task, model, chosen, **options)

    monkeypatch.setattr(client_app, "per_sample_losses", counted)
    return rows


def test_autorank_end_to_end(passes):
    keys = {"ranks.policy": "autorank", "ranks.profile-samples": 40}
    arrays, ranks, records, app = run(**keys)
    assert ranks[0] == ranks[1]
    assert min(ranks[0]) == 2
    assert max(ranks[0]) == 8
    assert passes == [40, 40, 40]
    (told,) = [r for r in records if r["kind"] == "ranks"]
    assert all(c["samples"] > 40 for c in told["clients"])
    # only scalars leave the client
    answers = [reply.content for m, reply in app.replies if "get_prop" in m.metadata.message_type]
    profile = answers[-1].config_records["getpropertiesres.properties"]
    assert set(profile) == {*METRICS, "num-examples", "partition-id"}
    assert all(isinstance(value, int | float) for value in profile.values())
    # a server that starts again asks again; the clients have it in their Flower state
    again, ranks_again, *_ = run(app=app, **keys)
    assert passes == [40, 40, 40]
    assert ranks_again == ranks
    assert {k: v.data for k, v in again.items()} == {k: v.data for k, v in arrays.items()}


def test_the_first_profile_is_of_the_seeded_start_whatever_the_process_did_before(passes):
    def profiles(*, clean):
        if clean:
            client_app._resident_model.cache_clear()
        told = run(rounds=1, **{"ranks.policy": "autorank", "ranks.profile-samples": 20})[2]
        return next(r for r in told if r["kind"] == "ranks")["clients"]

    first = profiles(clean=True)
    assert profiles(clean=False) == first  # the resident model was trained in between


def test_autorank_profiles_again_on_the_global_adapter(passes):
    keys = {"ranks.policy": "autorank", "ranks.profile-samples": 40, "ranks.reassign-every": 1}
    _, ranks, records, app = run(**{**keys, "ranks.budget": 5}, rounds=3)
    assert passes == [40] * 12  # the query, and three rounds
    assert [sum(r) for r in ranks] == [15, 15, 15]
    # round 1 measures what came with it, which is the start again: nothing new to tell
    told = [r for r in records if r["kind"] == "ranks"]
    assert [r["round"] for r in told] == [1, 3]
    first, third = ([c["loss-entropy"] for c in t["clients"]] for t in told)
    assert third != pytest.approx(first, rel=1e-6)
    measured = {r["loss-entropy"] for r in records if r["kind"] == "client" and r["round"] == 2}
    assert set(third) == measured
    last = [r["loss-entropy"] for r in records if r["kind"] == "client" and r["round"] == 3]
    for context in app.contexts.values():
        assert isinstance(context.state, RecordDict)
        assert context.state["fedlora.profile"]["loss-entropy"] in last


def test_a_client_without_data_gets_the_fallback():
    config = RunConfig.from_flat({**FLAT, "ranks.min": 2, "ranks.max": 8})
    app = App(config)
    original = client_app.LoRAClient.get_properties

    def broken(self, config):
        if config.get("profile") and self.node["partition-id"] == 1:
            raise RuntimeError("disk full")
        return original(self, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_app.LoRAClient, "get_properties", broken)
        _, ranks, records, _ = run(app=app, **{"ranks.policy": "autorank", "ranks.fallback": 3})
    assert ranks[0][1] == 3
    first = next(r for r in records if r["kind"] == "ranks")
    assert first["clients"][1]["score"] is None
    assert "rank 3 (fallback): client 1" in first["notes"][0]
    assert [r for r in records if r["kind"] == "ranks"][-1]["clients"][1]["score"] is not None


@pytest.mark.parametrize("judge", ["clients", "server"])
def test_quality(judge):
    keys = {"ranks.policy": "quality", "ranks.low": 2, "ranks.high": 6, "ranks.best-fraction": 0.3}
    score_fn = None
    if judge == "server":
        keys["ranks.validation-rows"] = 50
        parts = read_config({**FLAT, **keys})
        rows = parts.task.test_rows()
        test = HeldOut(parts.task, rows, parts.validation_rows)
        assert len(test.validation) == 50
        assert len(test.all) + 50 == len(rows)
        model, _ = initial_model(parts, ABOUT)
        score_fn = lambda adapter: test.validation_loss(model, adapter)  # noqa: E731
    _, ranks, records, _ = run(score_fn=score_fn, **keys)
    assert ranks[0] == [2, 2, 2]
    assert sorted(ranks[1]) == [2, 2, 6]
    told = [r for r in records if r["kind"] == "ranks"][-1]
    losses = [c["validation-loss"] for c in told["clients"]]
    assert ranks[1][int(np.argmin(losses))] == 6
    reported = ["validation-loss" in r for r in records if r["kind"] == "client"]
    assert reported == [judge == "clients"] * 3 + [False] * 3


def test_self_pruning():
    keys = {"ranks.policy": "self-pruning", "ranks.gamma": 0.5, "aggregation": "hetlora"}
    plain, *_ = run(**keys, **{"ranks.penalty": 0})
    _, ranks, _, _ = run(**keys, **{"ranks.penalty": 1000.0, "train.steps": 4}, rounds=3)
    arrays, *_ = run(**keys, **{"ranks.penalty": 1.0, "train.steps": 2})
    assert ranks[0] == [8, 8, 8]  # B = 0 cannot fall
    assert min(ranks[-1]) < 8  # a penalty that strong shrinks the tail
    assert plain.keys() == arrays.keys()


def test_the_run_config_makes_the_policy():
    parts = read_config(
        {"ranks.policy": "autorank", "ranks.budget-mb": 3, "ranks.order": "random", "seed": 5}
    )
    policy = parts.policy
    assert isinstance(policy, AutoRank)
    assert (policy.byte_budget, policy.order, policy.seed, policy.fallback) == (3e6, "random", 5, 4)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"ranks.policy": "autorank", "ranks.min": 64}, "ranks.min .64. must not exceed ranks.max"),
        ({"ranks.policy": "autorank", "ranks.fallback": 64}, "ranks.fallback .64. must not exceed"),
        ({"ranks.policy": "autorank", "ranks.budget": 2}, "not between ranks.min .4."),
        ({"ranks.policy": "autorank", "ranks.budget": 8, "ranks.budget-mb": 1}, "one of them"),
        ({"ranks.policy": "uniform", "ranks.budget": 8}, "divided by scores"),
        ({"ranks.policy": "cycle", "ranks.budget-mb": 8}, "ranks.budget-mb is divided by scores"),
        ({"ranks.policy": "quality", "ranks.low": 21}, "ranks.low .21. must not exceed ranks.high"),
        ({"ranks.policy": "quality", "aggregation": "fedit"}, "equal ranks only.*quality"),
        ({"ranks.policy": "autorank", "aggregation": "fedit"}, "equal ranks only.*autorank"),
        ({"ranks.policy": "self-pruning", "aggregation": "fedit"}, "equal ranks only.*pruning"),
        ({"ranks.policy": "self-pruning", "aggregation": "fedsa"}, "keeps B on the clients"),
        ({"ranks.policy": "self-pruning", "ranks.gamma": 1.0}, "ranks.gamma: must be at most"),
        ({"ranks.policy": "feedback", "aggregation": "fedsa"}, "keeps B on the clients"),
        ({"ranks.policy": "feedback", "ranks.min": 9}, "ranks.rank: a mean rank of 8 is not"),
        ({"ranks.policy": "random", "ranks.budget": 40.0}, "ranks.budget: a mean rank of 40"),
        ({"ranks.policy": "staircase", "ranks.budget": 8.0}, "divided by scores"),
        ({"ranks.policy": "autorank", "ranks.criteria": "rows"}, "criteria: expected some of"),
        ({"ranks.policy": "autorank", "ranks.weights": "1,2"}, "expected 3 numbers"),
        ({"ranks.policy": "capacity", "ranks.fallback": 64}, "ranks.fallback .64. must not"),
        ({"ranks.memory-share": 0.0}, "ranks.memory-share: must be above 0"),
        ({"ranks.policy": "cycle", "ranks.capacity": True, "aggregation": "fedit"}, "equal ranks"),
        ({"ranks.order": "best"}, "ranks.order: expected one of score"),
        ({"ranks.profile-timeout": 0}, "ranks.profile-timeout: must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(flat, message):
    with pytest.raises(ConfigError, match=message):
        read_config(flat)


def test_what_can_be_is_accepted():
    for flat, rank in (
        ({"ranks.policy": "autorank", "ranks.max": 16}, 16),
        ({"ranks.policy": "quality", "ranks.high": 24}, 24),
        ({"ranks.policy": "self-pruning", "ranks.max": 12}, 12),
        ({"ranks.policy": "autorank", "ranks.min": 8, "ranks.max": 8, "aggregation": "fedit"}, 8),
        ({"ranks.policy": "quality", "aggregation": "fedsa"}, 20),
        ({"ranks.policy": "feedback", "ranks.measure": "loss", "aggregation": "fedsa"}, 32),
        ({"ranks.policy": "quality", "ranks.capacity": True, "ranks.high": 24}, 24),
        ({"ranks.policy": "capacity", "ranks.max": 48}, 48),
    ):
        assert read_config(flat).policy.max_rank == rank
