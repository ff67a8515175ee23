"""Whoever drives the rounds, the result is the same; why a run ended is told."""

import logging
import time
from functools import partial

import numpy as np
import pytest
from flwr.app import Error, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy

from strategies import FedLoRA
from strategies.checkpoint import Checkpoints
from strategies.messages import to_record
from strategies.ranks import ListRank, UniformRank
from strategies.records import RECORDS_VERSION
from strategies.sampling import PlannedSampling
from strategies.saving import Saver
from strategies.wallclock import SimulatedClock
from tests.fakes import FakeGrid, random_adapter
from tests.strategies.test_participation import NODES, client

START = random_adapter(4, seed=0)


class Around(Strategy):
    """A strategy around another, as people write them; Flower's own loop drives it."""

    def __init__(self, inner):
        self.inner = inner

    def configure_train(self, *args):
        return self.inner.configure_train(*args)

    def aggregate_train(self, *args):
        return self.inner.aggregate_train(*args)

    def configure_evaluate(self, *args):
        return self.inner.configure_evaluate(*args)

    def aggregate_evaluate(self, *args):
        return self.inner.aggregate_evaluate(*args)

    def summary(self):
        self.inner.summary()


def make(**settings):
    return FedLoRA(
        **{"ranks": ListRank([2, 4], cycle=True), "scale": 2.0, "query": True, **settings}
    )


def run(strategy, rounds=4, handler=client, **options):
    grid = FakeGrid(NODES, handler)
    arrays = to_record(START.to_state_dict())
    result = strategy.start(grid, arrays, num_rounds=rounds, timeout=2, **options)
    return result, grid


def data(record):
    return {k: v.data for k, v in record.items()}


def told(grid, key):
    sent = [m.content["config"] for m in grid.sent if m.metadata.message_type == "train"]
    return sorted({(int(c["server-round"]), c[key]) for c in sent})


@pytest.mark.parametrize("evaluate", [1.0, 0.0])
@pytest.mark.parametrize("rule", ["replication", "rolora", "flora", "fedex", "fslora", "flexlora"])
def test_flowers_loop_around_it_gives_the_same_bytes(rule, evaluate, tmp_path):
    found = []
    for name, around in (("own", lambda s: s), ("flower", Around)):
        saver = Saver(Checkpoints(tmp_path / name), fingerprint={})
        books = []
        strategy = make(
            aggregation=rule, evaluate_fraction=evaluate, saver=saver, listeners=[books.append]
        )
        result, grid = run(around(strategy))
        saver.checkpoints.close()
        checkpoints = [c.name for c in sorted((tmp_path / name).iterdir()) if c.is_dir()]
        rounds = [(b["round"], b["accepted"]) for b in books if b["kind"] == "round" and b["round"]]
        found.append(
            (data(result.arrays), told(grid, "lora-train"), told(grid, "model-round"),
             checkpoints, rounds, dict(result.evaluate_metrics_clientapp))
        )  # fmt: skip
    assert found[0] == found[1]
    assert found[1][2] == [(r, r) for r in range(1, 5)]
    assert found[1][4] == [(r, 6) for r in range(1, 5)]
    if rule == "rolora":
        assert [factors for _, factors in found[1][1]] == ["B", "A", "B", "A"]


def test_pilots_learn_a_loss_and_start_anew_in_flowers_loop():
    records = []
    planned = partial(PlannedSampling, pilot_rounds=2, pilot_fractions=(1.0, 0.5), q_min=0.2)
    strategy = make(
        aggregation="fslora", ranks=UniformRank(4), sampling=planned(),
        clock=SimulatedClock("phones", base_flops=1e9, rank_flops=1e7, steps=3),
        listeners=[records.append],
    )  # fmt: skip
    _, grid = run(Around(strategy), rounds=6, handler=falling)
    ages = dict(told(grid, "model-round"))
    assert [ages[r] for r in (1, 2, 3, 4, 5)] == [1, 2, 1, 2, 3]
    assert [r["round"] for r in records if r["kind"] == "plan"] == [5]


def falling(message):
    content = client(message)
    if message.metadata.message_type == "train":
        content["metrics"]["loss"] = 1.0 / float(message.content["config"]["model-round"])
    return content


def test_flowers_privacy_on_the_server_goes_around_it():
    inner = make(ranks=UniformRank(4), aggregation="zero-padding", evaluate_fraction=0)
    wrapper = DifferentialPrivacyServerSideFixedClipping(
        inner, noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=6
    )
    result, grid = run(wrapper)
    alone, _ = run(make(ranks=UniformRank(4), aggregation="zero-padding", evaluate_fraction=0))
    assert [age for _, age in told(grid, "model-round")] == [1, 2, 3, 4]
    assert data(result.arrays).keys() == data(alone.arrays).keys()


def test_what_was_saved_is_not_resumed_by_another_loop(tmp_path):
    saver = Saver(Checkpoints(tmp_path), fingerprint={})
    run(make(saver=saver))
    saver.checkpoints.close()
    again = Saver(Checkpoints(tmp_path), resume_from="latest", fingerprint={})
    with pytest.raises(ValueError, match="resumed by the start of FedLoRA itself"):
        run(Around(make(saver=again)))


# ----- why a run ends -----------------------------------------------------------------------


@pytest.fixture
def lines(caplog):
    """Return the log's lines so far."""
    logger = logging.getLogger("flwr")
    logger.propagate, before = True, logger.propagate
    with caplog.at_level(logging.INFO):
        yield lambda: [r.getMessage() for r in caplog.records]
    logger.propagate = before


def dead(*nodes):
    def answer(message):
        if message.metadata.dst_node_id in nodes and message.metadata.message_type == "train":
            return Error(7, "the disk of this site is gone")
        return client(message)

    return answer


def ends(records):
    return [(r["round"], r["reason"]) for r in records if r["kind"] == "end"]


def test_all_rounds():
    records = []
    run(make(listeners=[records.append]), rounds=2)
    assert ends(records) == [(2, "all 2 rounds are done")]


def test_should_stop_as_in_flower_1_43():
    records, seen = [], []

    def stop(server_round, result):
        seen.append((server_round, data(result.arrays)))
        return server_round == 3

    result, _ = run(make(listeners=[records.append]), rounds=9, should_stop=stop)
    assert [r for r, _ in seen] == [1, 2, 3]
    assert seen[2][1] == data(result.arrays)
    assert ends(records) == [(3, "should_stop said so")]


@pytest.mark.parametrize("stop", ["should_stop", "stop_when", "failing"])
def test_the_last_round_is_saved_whatever_ends_the_run(stop, tmp_path):
    saver = Saver(Checkpoints(tmp_path, every=100), fingerprint={})
    options = {"evaluate_fn": lambda r, _: MetricRecord({"loss": 1.0 / (1 + r)})}
    settings, handler = {}, client
    if stop == "should_stop":
        options["should_stop"] = lambda server_round, _: server_round == 5
    elif stop == "stop_when":
        settings["stop_when"] = lambda scores: scores["loss"] < 0.17
    else:
        handler = dead(*NODES[:4])
    run(make(saver=saver, **settings), rounds=9, handler=handler, **options)
    assert Checkpoints(tmp_path).load("latest").round == 5


def test_a_run_that_most_clients_have_left_ends_and_says_so(lines):
    records = []
    result, _ = run(make(listeners=[records.append]), rounds=30, handler=dead(*NODES[:4]))
    ((server_round, reason),) = ends(records)
    assert server_round == 5
    assert "less than 50% of the clients asked sent a good reply" in reason
    assert "the disk of this site is gone" in reason
    assert sum("never took part: client 0 (node 901), client 1" in line for line in lines()) == 1
    assert result.arrays is not None
    assert records[-1]["never_took_part"][0] == "client 0 (node 901)"


@pytest.mark.parametrize("evaluate", [1.0, 0.0])
def test_another_loop_ends_such_a_run_too_and_keeps_its_last_round(evaluate, tmp_path):
    records = []
    saver = Saver(Checkpoints(tmp_path, every=100), fingerprint={})
    inner = make(listeners=[records.append], saver=saver, evaluate_fraction=evaluate)
    with pytest.raises(RuntimeError, match="ended after round 5: in 5 rounds, one after the other"):
        run(Around(inner), rounds=30, handler=dead(*NODES[:4]))
    assert [r for r, _ in ends(records)] == [5]
    assert Checkpoints(tmp_path).load("latest").round == 5


@pytest.mark.parametrize(("least", "rounds"), [(0.0, 12), (0.3, 12), (0.34, 5), (1.0, 5)])
def test_the_share_is_a_setting(least, rounds):
    records = []
    run(make(listeners=[records.append], min_answering=least), rounds=12, handler=dead(*NODES[:4]))
    assert ends(records)[0][0] == rounds


def test_a_few_bad_rounds_end_nothing():
    def flaky(message):
        bad = message.metadata.message_type == "train"
        bad = bad and int(message.content["config"]["server-round"]) % 5
        return dead(*NODES)(message) if bad else client(message)

    records = []
    run(make(listeners=[records.append]), rounds=12, handler=flaky)
    assert ends(records)[0][0] == 12


def test_nobody_was_ever_accepted(lines):
    result, _ = run(make(), rounds=2, handler=dead(*NODES))
    assert data(result.arrays) == data(to_record(START.to_state_dict()))
    assert "no reply was ever accepted: the model is the initial one" in lines()


def test_a_finished_run_is_resumed_in_plain_words(tmp_path, lines):
    saver = Saver(Checkpoints(tmp_path), fingerprint={})
    run(make(saver=saver), rounds=3)
    saver.checkpoints.close()
    again = Saver(Checkpoints(tmp_path), resume_from="latest", fingerprint={})
    run(make(saver=again), rounds=3)
    assert lines()[-1] == "0 rounds in 0:00: all 3 rounds were done before"


def test_the_clients_own_scores_are_shown_where_the_server_has_none(lines):
    run(make(), rounds=1)
    (line,) = [text for text in lines() if text.startswith("round 1/1")]
    assert "own data: test loss 1.000" in line


def test_the_name_that_hugging_face_gives_the_loss(lines):
    def answer(message):
        content = client(message)
        if message.metadata.message_type == "train":
            content["metrics"]["train_loss"] = content["metrics"].pop("loss")
        return content

    run(make(evaluate_fraction=0), rounds=1, handler=answer)
    (line,) = [text for text in lines() if text.startswith("round 1/1")]
    assert "loss 0.500" in line


def test_the_initial_model_is_evaluated_while_the_first_clients_train():
    steps = []

    def trains(message):
        steps.append(message.metadata.message_type)
        return client(message)

    def evaluate(server_round, arrays):
        steps.append(f"evaluate {server_round}")
        return MetricRecord({"loss": 1.0})

    records = []
    settings = {"listeners": [records.append], "evaluate_fraction": 0.0}
    result, _ = run(make(**settings), rounds=1, handler=trains, evaluate_fn=evaluate)
    assert steps[-2:] == ["evaluate 0", "evaluate 1"]
    assert steps.index("train") < steps.index("evaluate 0")
    assert list(result.evaluate_metrics_serverapp) == [0, 1]
    assert records[0] == {"kind": "start", "round": 0, "version": RECORDS_VERSION, "scores": []}
    told = [(r["kind"], r["round"]) for r in records]
    assert told.index(("round", 0)) < told.index(("client", 1))
    assert records[told.index(("round", 0))]["server_loss"] == 1.0


def test_an_error_in_the_first_evaluation_is_not_lost():
    def evaluate(server_round, arrays):
        raise ValueError("no test rows")

    with pytest.raises(ValueError, match="no test rows"):
        run(make(), rounds=1, evaluate_fn=evaluate)


def test_a_run_of_no_rounds_is_evaluated_all_the_same():
    result, _ = run(make(), rounds=0, evaluate_fn=lambda r, _: MetricRecord({"loss": 2.0}))
    assert result.evaluate_metrics_serverapp[0]["loss"] == 2.0


@pytest.mark.parametrize("led", [True, False])
def test_a_listener_may_say_why_the_run_ends(led):
    records = []

    def enough(record):
        records.append(record)
        return "the budget is spent" if record["kind"] == "client" else None

    strategy = make(listeners=[enough])
    if led:
        run(strategy, rounds=9)
    else:
        with pytest.raises(RuntimeError, match="ended after round 1: the budget is spent"):
            run(Around(strategy), rounds=9)
    assert ends(records) == [(1, "the budget is spent")]


def scores(server_round, arrays):
    """Return scores that depend on every number of the model, after a while."""
    time.sleep(0.05)
    total = sum(float(np.abs(array.numpy()).sum()) for array in arrays.values())
    return MetricRecord({"loss": total, "round": float(server_round)})


def watched(folder, *, overlap, resume="", rounds=4, **settings):
    """Run with a checkpoint each round; return the result, the records and the saved states."""
    records = []
    saver = Saver(Checkpoints(folder, every=1, keep=9), resume_from=resume, fingerprint={})
    strategy = make(
        evaluate_overlap=overlap, listeners=[lambda r: records.append(r)], saver=saver,
        **settings,
    )  # fmt: skip
    result, _ = run(strategy, rounds, evaluate_fn=scores)
    saver.checkpoints.close()
    saved = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*")) if file.is_file() and "lock" not in file.name
    }  # fmt: skip
    return result, records, saved


def same_but_for_times(record):
    times = {"clock_total", "bottleneck"}  # who was slowest is a matter of time too
    return {k: v for k, v in record.items() if "seconds" not in k and k not in times}


def test_a_round_evaluated_during_the_next_gives_the_same(tmp_path):
    one, before, saved = watched(tmp_path / "one", overlap=False)
    two, after, saved_too = watched(tmp_path / "two", overlap=True)
    assert data(one.arrays) == data(two.arrays)
    for name in ("evaluate_metrics_serverapp", "evaluate_metrics_clientapp"):
        assert getattr(one, name) == getattr(two, name)
    first, second = ([same_but_for_times(r) for r in records if r["kind"] != "arrived"]
                     for records in (before, after))  # fmt: skip
    begun = [r for r in first if r["kind"] == "round" and r["round"] == 0]
    assert begun == [r for r in second if r["kind"] == "round" and r["round"] == 0]
    assert first == second
    assert saved.keys() == saved_too.keys()
    weights = [name for name in saved if name.endswith(".safetensors")]
    assert len(weights) == 4
    assert all(saved[name] == saved_too[name] for name in weights)


def test_a_run_resumed_from_an_overlapped_round_ends_the_same(tmp_path):
    whole, _, saved = watched(tmp_path / "whole", overlap=True)
    part, _, _ = watched(tmp_path / "part", overlap=True, rounds=2)
    rest, _, saved_too = watched(tmp_path / "part", overlap=True, resume="latest")
    assert data(whole.arrays) == data(rest.arrays)
    assert whole.evaluate_metrics_serverapp == rest.evaluate_metrics_serverapp
    assert saved.keys() == saved_too.keys()
    assert 2 in part.evaluate_metrics_serverapp


def test_a_round_that_fails_leaves_the_one_before_it_evaluated_and_saved(tmp_path):
    class Failing(FedLoRA):
        def configure_train(self, server_round, *args):
            if server_round == 3:
                raise RuntimeError("no")
            return super().configure_train(server_round, *args)

    records = []
    strategy = Failing(
        ranks=ListRank([2, 4], cycle=True), scale=2.0, evaluate_overlap=True,
        listeners=[lambda r: records.append(r)],
        saver=Saver(Checkpoints(tmp_path, every=1, keep=9), fingerprint={}),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no"):
        run(strategy, 4, evaluate_fn=scores)
    assert Checkpoints(tmp_path).load().round == 2
    assert [r["round"] for r in records if r["kind"] == "round"] == [0, 1, 2]


@pytest.mark.parametrize("waits", ["stop_when", "should_stop", "sampler"])
def test_who_waits_for_scores_gets_them_before_the_next_round(waits, tmp_path):
    asked = []

    def stop(*_):
        asked.append(True)
        return len(asked) == 2

    options, settings = {}, {}
    if waits == "stop_when":
        settings["stop_when"] = stop
    elif waits == "should_stop":
        options["should_stop"] = stop
    else:
        settings["sampling"] = PlannedSampling(alpha=1.0, beta=1.0)
        settings["clock"] = SimulatedClock("lab", base_flops=1e9, rank_flops=1e6, steps=1)
    strategy = make(evaluate_overlap=True, **settings)
    run(strategy, 4, evaluate_fn=scores, **options)
    assert strategy.round.number == (4 if waits == "sampler" else 2)
    assert strategy.evaluations_can_wait == (waits == "should_stop")
