"""Rounds that do not wait, in virtual time: by the clock and not by the machine; saved as it is."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Error, MetricRecord, RecordDict

from strategies import FedLoRA
from strategies.checkpoint import Checkpoints
from strategies.lora import Adapter
from strategies.messages import from_record, to_record
from strategies.model import MERGED
from strategies.ranks import ListRank
from strategies.round.waiting import Waiting
from strategies.sampling import FractionSampling, IndependentSampling
from strategies.saving import Saver
from strategies.wallclock import Devices, SimulatedClock
from strategies.wallclock.availability import Availability, Presence
from strategies.wallclock.channel import PROFILES
from tests.fakes import FakeGrid, query_reply, random_adapter, same

NODES = [901, 17, 455, 230, 78, 333]
SPEEDS = [1e9, 1e9, 1e9, 1e9, 3e8, 1e8]  # 4 needs three and 5 ten times as long


def clock(speeds=SPEEDS, **options):
    devices = Devices(
        PROFILES["lab"], np.full(len(speeds), 20.0), np.array(speeds), np.ones(len(speeds)),
        ("x",) * len(speeds),
    )  # fmt: skip
    return SimulatedClock(devices, base_flops=1e9, rank_flops=0, steps=1, **options)


def client(message, nodes, bad=()):
    index = nodes.index(message.metadata.dst_node_id)
    if message.metadata.message_type == "query":
        return query_reply(**{"partition-id": index, "num-examples": 10 + index})
    config = message.content["config"]
    if index in bad:
        return Error(2, "CUDA out of memory")
    g = torch.Generator().manual_seed(index + 100 * int(config["server-round"]))
    sent = from_record(message.content["arrays"])
    state = {
        k: v + 0.1 * torch.randn(v.shape, generator=g) if v.is_floating_point() else v
        for k, v in sent.items()
        if not k.startswith(MERGED)
    }
    metrics = MetricRecord({"num-examples": 10 + index, "loss": 0.5, "steps": 1})
    return RecordDict({"arrays": to_record(state), "metrics": metrics})


def run(waiting, *, rounds=6, nodes=NODES, rng=None, handler=client, **options):
    records: list[dict] = []
    settings = {
        "aggregation": "rbla", "ranks": ListRank([2, 4], cycle=True), "scale": 2.0,
        "clock": clock(), "sampling": FractionSampling(1.0),
        "evaluate_fraction": 0.0, "listeners": [records.append],
    }  # fmt: skip
    strategy = FedLoRA(waiting=waiting, **{**settings, **options})
    grid = FakeGrid(nodes, partial(handler, nodes=nodes), rng=rng)
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    result = strategy.start(grid, start, num_rounds=rounds, timeout=5)
    model = Adapter.from_state_dict(from_record(result.arrays), 2.0)
    return model, records, strategy


def of(records, kind="client", **wanted):
    return [
        r for r in records if r["kind"] == kind and all(r.get(k) == v for k, v in wanted.items())
    ]


MODES = {
    "quorum": Waiting(quorum=4),
    "deadline": Waiting(deadline=2.5),
    "auto": Waiting(deadline="auto"),
    "more": Waiting(over_selection=0.5),
    "buffered": Waiting(mode="buffered", buffer=3, busy=5),
    "asynchronous": Waiting(mode="asynchronous", busy=4),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_order_is_the_clocks_whatever_the_machine(mode):
    sampling = {"sampling": FractionSampling(clients=4)} if mode == "more" else {}
    model, records, _ = run(MODES[mode], **sampling)
    other = [455, 333, 17, 78, 901, 230]  # the same clients under other ids
    again, more, _ = run(
        MODES[mode], nodes=other, rng=np.random.default_rng(3), **sampling
    )  # fmt: skip
    assert same(model, again)
    times = [(r["clock_total"], r["accepted"], r.get("stale")) for r in of(records, "round")]
    assert times == [(r["clock_total"], r["accepted"], r.get("stale")) for r in of(more, "round")]
    numbers = [(r["client"], r["asked"]) for r in of(records, status="ok")]
    assert len(numbers) == len(set(numbers))  # nothing counts twice


def test_a_quorum_is_the_first_four_by_the_clock():
    _, records, _ = run(MODES["quorum"], rounds=12)
    assert [r["client"] for r in of(records, round=1, status="ok")] == [0, 1, 2, 3]
    assert sorted(r["client"] for r in of(records, round=1, status="late")) == [4, 5]
    slow = of(records, status="ok", client=5)
    assert slow[0]["asked"] == 1
    assert slow[0]["staleness"] >= 3  # a reply three rounds late and more
    assert slow[0]["ended"] - slow[0]["began"] == pytest.approx(10, rel=0.05)
    seconds = [r["clock_seconds"] for r in of(records, "round")]
    assert all(1 <= s < 3 for s in seconds)


def test_a_deadline_of_which_late_replies_are_dropped_is_that_of_the_clock():
    dropped, records, strategy = run(Waiting(deadline=2.5, staleness="drop"))
    before, known, _ = run(Waiting(staleness="drop"), clock=clock(deadline=2.5))
    assert same(dropped, before)
    assert strategy.participation.clock.deadline == 2.5
    assert [r["late"] for r in of(records, "round")] == [r["late"] for r in of(known, "round")]


def test_a_new_model_after_every_three_replies_with_five_busy():
    _, records, strategy = run(MODES["buffered"], rounds=8)
    books = of(records, "round")
    assert all(b["accepted"] == 3 for b in books)
    assert any(b.get("stale") for b in books)
    assert len(strategy.flow.outstanding.orders) <= 5
    spans = [(r["began"], r["ended"]) for r in of(records, status="ok")]
    for at in np.linspace(0.5, max(e for _, e in spans) * 0.6, 20):
        assert sum(b <= at < e for b, e in spans) <= 5


def test_asynchronous_rounds_are_of_one_reply_that_moves_the_model_by_its_discount():
    waiting = Waiting(mode="asynchronous", busy=6, staleness=1e9)
    model, records, _ = run(waiting, rounds=5)
    assert all(b["accepted"] == 1 for b in of(records, "round"))
    fresh = [r for r in of(records, status="ok") if r["staleness"] == 0]
    assert len(fresh) == 1  # the first; of the others nothing is left
    first, _, _ = run(waiting, rounds=1)
    ends = {**model.to_state_dict()}
    assert all(torch.allclose(ends[k], t, atol=1e-5) for k, t in first.to_state_dict().items())


def test_with_fewer_clients_than_the_buffer_a_model_is_of_all_there_are():
    waiting = Waiting(mode="buffered", buffer=50, busy=50)
    _, records, _ = run(waiting, rounds=3)
    assert [b["accepted"] for b in of(records, "round")] == [6, 6, 6]


@pytest.mark.parametrize(
    ("rule", "wire"),
    [
        ("flora", "int8"),
        ("flexlora", "float32"),
        ("fedex", "float32"),
        ("zero-padding", "bfloat16"),
    ],
)
def test_other_rules_and_wires(rule, wire):
    model, records, _ = run(MODES["buffered"], aggregation=rule, wire_dtype=wire, rounds=4)
    assert not model.non_finite()
    assert not of(records, status="rejected")
    assert any(b.get("stale") for b in of(records, "round"))


AWAY = {0: (0.5, np.inf), 1: (0.5, 4.0)}  # from, to


class Away(Availability):
    """Client 0 goes away for good after half a second, 1 from 0.5 to 4."""

    def look(self, clients, seconds):
        here, until = [], []
        for i in clients:
            begin, end = AWAY.get(i, (np.inf, np.inf))
            here.append(not begin <= seconds < end)
            until.append(begin if seconds < begin else end if seconds < end else np.inf)
        return Presence(np.array(here), np.array(until))

    def share(self, clients, *_):
        return np.ones(len(clients))

    stays = left = share


@pytest.mark.parametrize("mode", ["quorum", "buffered"])
def test_who_goes_away_is_not_waited_for_and_is_asked_when_it_is_back(mode):
    _, records, _ = run(MODES[mode], clock=clock(availability=Away()), rounds=6)
    gone = of(records, status="rejected")
    assert {r["client"] for r in gone} == {0, 1}
    assert all("went away at 0.5 s" in r["reason"] for r in gone)
    assert not of(records, status="ok", client=0)
    assert all(r["began"] >= 4 for r in of(records, status="ok", client=1))


def test_a_client_that_fails_on_this_machine_fails_when_its_time_comes():
    model, records, _ = run(MODES["buffered"], handler=partial(client, bad={1}))
    assert {r["client"] for r in of(records, status="rejected")} == {1}
    assert not model.non_finite()


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("mode", "stop"),
    [
        ("buffered", 3),
        *(
            pytest.param(mode, stop, marks=pytest.mark.slow)
            for mode in ("quorum", "auto", "buffered", "asynchronous")
            for stop in (1, 2)
        ),
    ],
)
def test_killed_with_replies_outstanding_and_resumed_it_is_the_same_run(tmp_path, mode, stop):
    whole, records, _ = run(MODES[mode])

    def kill(record):
        if record["kind"] == "round-start" and record["round"] == stop + 1:
            raise StoppedError

    def saver(**more):
        return Saver(Checkpoints(tmp_path, every=1, keep=9), fingerprint={}, **more)

    first = saver()
    with pytest.raises(StoppedError):
        run(MODES[mode], saver=first, listeners=[kill])
    first.checkpoints.close()
    other = [node + 1000 for node in NODES]  # in a simulation node ids are new every time
    again = saver(resume_from="latest")
    resumed, more, _ = run(MODES[mode], saver=again, nodes=other)
    again.checkpoints.close()
    assert same(whole, resumed)
    rest = [r for r in of(records, status="ok") if r["round"] > stop]
    key = ("round", "client", "asked", "staleness", "began", "ended")
    assert [[r[k] for k in key] for r in rest] == [
        [r[k] for k in key] for r in of(more, status="ok")
    ]


def test_coins_with_late_replies_weigh_by_what_comes_back():
    """Client 5 answers every time, ten seconds late: what it counts is made up for."""
    _, _, strategy = run(
        Waiting(deadline=2.5, staleness=0), sampling=IndependentSampling(1.0), rounds=15,
        aggregation="zero-padding",
    )  # fmt: skip
    asked, answered = strategy.participation._asked, strategy.participation._answered
    assert answered[0] == asked[0]
    assert 0 < answered[5] < asked[5]


def test_an_older_checkpoint_begins_waiting_anew(tmp_path):
    saver = Saver(Checkpoints(tmp_path, every=1, keep=9), fingerprint={})
    run(Waiting(staleness="drop"), saver=saver, rounds=2)
    saver.checkpoints.close()
    again = Saver(Checkpoints(tmp_path, every=1, keep=9), fingerprint={}, resume_from="latest")
    _, records, _ = run(MODES["quorum"], saver=again, rounds=3)
    assert [b["round"] for b in of(records, "round")] == [3]


def test_where_rounds_wait_a_client_that_never_answers_is_refused_and_not_late():
    """The machine's seconds are none of a simulated clock's: nothing is kept for later."""

    def mute(message, nodes):
        lost = nodes.index(message.metadata.dst_node_id) == 2
        return None if lost and message.metadata.message_type == "train" else client(message, nodes)

    start = to_record(random_adapter(4, seed=0).to_state_dict())
    records: list[dict] = []
    strategy = FedLoRA(ranks=ListRank([2, 4], cycle=True), clock=clock(), evaluate_fraction=0.0,
                       scale=2.0, listeners=[records.append])  # fmt: skip
    strategy.start(FakeGrid(NODES, partial(mute, nodes=NODES)), start, num_rounds=1, timeout=1)
    (lost,) = (r for r in records if r["kind"] == "client" and r["status"] != "ok")
    assert (lost["client"], lost["status"], lost["reason"]) == (2, "rejected", "no answer")
