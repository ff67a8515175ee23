"""When a round is over, on a clock of the test's own, and what becomes of who is later."""

import numpy as np
import pytest
from flwr.server import SimpleClientManager

from strategies import FedLoRA
from strategies.aggregation import ZeroPadding
from strategies.checkpoint import Checkpoints
from strategies.clients import Client
from strategies.legacy import LegacyFedLoRA
from strategies.messages import to_record
from strategies.participation import MOST_MADE_UP, Participation
from strategies.privacy import Privacy, PrivateRun
from strategies.round.waiting import Waiting
from strategies.sampling import FractionSampling, IndependentSampling
from strategies.saving import Saver
from strategies.wallclock import MeasuredClock
from tests.fakes import random_adapter
from tests.strategies.timed import UNHEARD, Clock, TimedGrid, books, start


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def status(found, client):
    return [(r["round"], r["status"]) for r in books(found, "client") if r["client"] == client]


@pytest.mark.parametrize("quorum", [0.75, 3])
def test_a_quorum_closes_a_round_and_the_late_reply_counts_in_the_next(clock, quorum):
    grid = TimedGrid(clock, [1, 2, 3, 4], lambda i, _: 100.0 if i == 3 else 1.0 + i)
    _, found, model = start(grid, 1, waiting=Waiting(quorum=quorum))
    assert clock.now < 5
    assert model == pytest.approx(2)  # of 1, 2 and 3
    assert status(found, 3) == [(1, "late")]
    (book,) = books(found)
    assert (book["accepted"], book["late"], book["clients"]) == (3, 1, 4)


def test_a_late_reply_counts_once_as_what_it_has_changed(clock):
    """Client 3 needs 2.5 rounds of a second; it is not asked meanwhile."""
    grid = TimedGrid(clock, [1, 2, 3, 4], lambda i, _: 2.5 if i == 3 else 1.0)
    _, found, model = start(grid, 3, waiting=Waiting(quorum=0.75, staleness=1.0))
    assert [i for i, _ in grid.trained].count(3) == 1
    # Round 3: 1, 2, 3 in full, and 4 of three models ago, (1 + 2)^-1 of the weight.
    assert model == pytest.approx(2 + 2 + (6 + 4 / 3) / (3 + 1 / 3), abs=1e-4)
    assert status(found, 3) == [(1, "late"), (3, "ok")]
    assert [b.get("stale", 0) for b in books(found)] == [0, 0, 1]
    (late,) = (r for r in books(found, "client") if r["client"] == 3 and r["status"] == "ok")
    assert (late["asked"], late["staleness"]) == (1, 2)


def test_dropped_it_counts_never(clock):
    grid = TimedGrid(clock, [1, 2, 3, 4], lambda i, _: 2.5 if i == 3 else 1.0)
    _, found, model = start(grid, 4, waiting=Waiting(quorum=0.75, staleness="drop"))
    assert model == pytest.approx(8)
    assert all(b["accepted"] == 3 for b in books(found))


def test_a_deadline_in_seconds(clock):
    grid = TimedGrid(clock, [1, 2, 3], lambda i, _: 30.0 if i == 2 else 1.0)
    _, found, model = start(grid, 2, waiting=Waiting(deadline=5))
    assert clock.now == pytest.approx(6, abs=0.5)  # it is not asked again meanwhile
    assert model == pytest.approx(1.5 + 1.5)
    assert status(found, 2)[0] == (1, "late")


def test_who_is_late_by_the_automatic_deadline_is_waited_for_longer_the_next_time(clock):
    """A round takes a second; then client 2 needs ten. Dropped, so that it is asked again."""
    grid = TimedGrid(clock, [1, 2, 3], lambda i, r: 10.0 if i == 2 and r > 1 else 1.0)
    _, found, _ = start(grid, 7, waiting=Waiting(deadline="auto", staleness="drop"))
    assert [s for _, s in status(found, 2)][:2] == ["ok", "rejected"]
    assert "ok" in [s for _, s in status(found, 2)][2:]


def test_more_are_asked_and_the_first_are_taken(clock):
    grid = TimedGrid(clock, list(range(1, 9)), lambda i, _: 1.0 + i)
    waiting = Waiting(over_selection=0.5)
    _, found, _ = start(grid, 1, sampling=FractionSampling(clients=4), waiting=waiting)
    (book,) = books(found)
    assert (book["clients"], book["accepted"]) == (6, 4)


def test_by_default_nobody_waits_an_hour_for_the_dead(clock, caplog):
    caplog.set_level("INFO", logger="flwr")
    grid = TimedGrid(clock, [1, 2, 3], lambda i, r: UNHEARD if i == 2 and r == 2 else 20.0)
    _, found, model = start(grid, 4)
    assert clock.now < 20 * 3 + 220  # ten times what it usually takes
    assert status(found, 2)[:2] == [(1, "ok"), (2, "late")]
    assert "waiting for client 2 (node 3), up to" in caplog.text
    assert "round 2: over without client 2 (node 3)" in caplog.text
    assert model == pytest.approx(2 + 3 * 1.5)


def test_nor_in_the_first_round_once_half_have_answered(clock):
    grid = TimedGrid(clock, [1, 2, 3], lambda i, _: UNHEARD if i == 2 else 1.0)
    _, _, model = start(grid, 1)
    assert clock.now == pytest.approx(60, abs=2)
    assert model == pytest.approx(1.5)


def test_nor_in_an_evaluation(clock):
    class Mute(TimedGrid):
        def answer(self, message):
            mute = (
                message.metadata.message_type == "evaluate"
                and self.partition[message.metadata.dst_node_id] == 2
            )
            return None if mute else super().answer(message)

    grid = Mute(clock, [1, 2, 3], lambda i, _: 1.0)
    start(grid, 1, evaluate_fraction=1.0)
    assert clock.now == pytest.approx(61, abs=2)


def test_where_all_are_late_the_next_round_is_of_the_first_that_comes(clock):
    grid = TimedGrid(clock, [1, 2], lambda i, r: 7.0 + i if r == 1 else 1.0)
    _, found, model = start(grid, 3, waiting=Waiting(deadline=3, staleness=0))
    assert [b["accepted"] for b in books(found)][:1] == [0]
    trained = [(r["client"], r["asked"]) for r in books(found, "client") if r["status"] == "ok"]
    assert len(trained) == len(set(trained))
    assert model > 0


def test_a_node_that_is_back_under_a_new_id_is_asked_and_its_old_order_ends(clock):
    grid = TimedGrid(clock, [1, 2, 3], lambda i, r: UNHEARD if i == 2 and r == 1 else 1.0)
    grid.partition |= {9: 2}

    def back(record):
        if record["kind"] == "round" and record["round"] == 1:
            grid.nodes = [1, 2, 9]
            grid.lost = {3}

    found: list[dict] = []
    start(grid, 3, waiting=Waiting(quorum=0.6), listeners=[found.append, back])
    assert (2, 2) in grid.trained
    gone = [r for r in books(found, "client") if r["client"] == 2 and r["status"] == "rejected"]
    assert [(r["asked"], r["node"]) for r in gone] == [(1, "3")]


def test_the_same_reply_twice_counts_once(clock, caplog):
    caplog.set_level("WARNING", logger="flwr")

    class Twice(TimedGrid):
        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            again = [r for r in found if r.metadata.message_type == "train"]
            return [*found, *again]

    grid = Twice(clock, [1, 2], lambda i, _: 1.0)
    _, found, model = start(grid, 2, waiting=Waiting(quorum=2))
    assert model == pytest.approx(3)
    assert [b["accepted"] for b in books(found)] == [2, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quorum": 0}, "quorum: expected a share up to 1"),
        ({"quorum": 2.5}, "above 1 it is a number of replies"),
        ({"deadline": "soon"}, "deadline: expected seconds"),
        ({"staleness": -1}, "staleness: expected 0 or more"),
        ({"mode": "later"}, "mode: expected one of"),
        ({"mode": "buffered", "quorum": 0.5}, "quorum ends a synchronous round"),
        ({"mode": "buffered", "staleness": "drop"}, "nearly every reply is of an older model"),
        ({"buffer": 0, "busy": -1}, "buffer: expected a whole number from 1, got 0; busy"),
    ],
)
def test_nonsense_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Waiting(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"aggregation": "rolora", "waiting": Waiting(staleness=0.5)}, "use staleness = 'drop'"),
        ({"aggregation": "hetlora", "waiting": Waiting(mode="buffered")}, "mode = 'synchronous'"),
        ({"sampling": IndependentSampling(0.5), "waiting": Waiting(over_selection=0.3)},
         "raise the probabilities"),
        ({"sampling": IndependentSampling(0.5), "waiting": Waiting(mode="asynchronous")},
         "a coin of its own"),
        ({"privacy": PrivateRun(Privacy(1.0, 1.0)), "waiting": Waiting(staleness=0.0)},
         "counted when it is asked"),
        ({"noised_outside": True, "waiting": Waiting(quorum=0.5)}, "lacks some"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_is_refused_with_the_reason(options, said):
    grid = TimedGrid(Clock.__new__(Clock), [1], lambda i, r: 0.0)
    with pytest.raises(ValueError, match=said):
        start(grid, 1, **options)
    assert not grid.sent


def test_the_wrong_kind_is_told(clock):
    with pytest.raises(TypeError, match="waiting: expected a Waiting, got 3"):
        FedLoRA(waiting=3)


# --- what is on its way when the server dies


class KilledError(Exception):
    pass


def test_what_a_killed_server_waited_for_is_asked_for_again_and_counts_once(clock, tmp_path):
    def seconds(i, server_round):
        return 50.0 if i == 2 and clock.now < 10 else 1.0

    def saver(**more):
        return Saver(Checkpoints(tmp_path), fingerprint={}, **more)

    def kill(record):
        if record["kind"] == "round-start" and record["round"] == 3:
            raise KilledError

    first, waiting = saver(), Waiting(quorum=0.6, staleness=0)
    with pytest.raises(KilledError):
        start(TimedGrid(clock, [1, 2, 3], seconds), 5, waiting=waiting, saver=first,
              listeners=[kill])  # fmt: skip
    first.checkpoints.close()
    clock.now = 100.0
    grid = TimedGrid(clock, [11, 12, 13], seconds)  # and no reply to what was sent before
    _, found, _ = start(grid, 4, waiting=waiting, saver=saver(resume_from="latest"))
    done = [(r["client"], r["asked"]) for r in books(found, "client") if r["status"] == "ok"]
    assert done.count((2, 1)) == 1
    assert len(done) == len(set(done))
    assert grid.trained[0] == (2, 1)  # the same work, from the same model
    assert [i for i, r in grid.trained if r == 1] == [2]


def test_who_is_not_there_after_a_resume_is_not_waited_for(clock, tmp_path, caplog):
    caplog.set_level("WARNING", logger="flwr")
    first, waiting = Saver(Checkpoints(tmp_path), fingerprint={}), Waiting(quorum=0.6)
    start(TimedGrid(clock, [1, 2, 3], lambda i, _: 50.0 if i == 2 else 1.0), 2, waiting=waiting,
          saver=first)  # fmt: skip
    first.checkpoints.close()
    again = Saver(Checkpoints(tmp_path), fingerprint={}, resume_from="latest")
    grid = TimedGrid(clock, [11, 12], lambda i, _: 1.0)
    start(grid, 3, waiting=waiting, saver=again)
    assert "client 2 is not there, and its order of round 1 is dropped" in caplog.text


# --- what answers in time, late or never do to an estimate


@pytest.mark.parametrize(("chance", "late", "part"), [(0.5, 0.0, 1), (0.3, 0.4, 0.6), (1.0, 0, 1)])
def test_in_the_long_run_everybody_counts_by_its_data(chance, late, part):
    """Replies in time by chance, others late at a part of their weight, the rest lost."""
    rng, rounds = np.random.default_rng(0), 4000
    coins = IndependentSampling(1.0, estimator="unbiased")
    book = Participation(coins, MeasuredClock(), ZeroPadding())
    client, other = Client(1, 0, num_examples=10), Client(2, 1, num_examples=30)
    counted = 0.0
    for server_round in range(1, rounds + 1):
        book.choose(server_round, [client, other], [2, 2], lambda: (0.0, 0.0), 2, rng)
        draw, weight = rng.random(), book.weight(client, 0)
        if draw < chance + late:
            share = 1.0 if draw < chance else part
            counted += share * weight
            book.answered(client, share)
    assert counted / rounds == pytest.approx(0.25, rel=0.05)


def test_who_failed_twenty_times_counts_five_times_on_its_return():
    book = Participation(IndependentSampling(1.0), MeasuredClock(), ZeroPadding())
    clients = [Client(1, 0, num_examples=10), Client(2, 1, num_examples=10)]
    for server_round in range(1, 22):
        rng = np.random.default_rng(server_round)
        book.choose(server_round, clients, [2, 2], lambda: (0.0, 0.0), 2, rng)
        book.answered(clients[1])
    assert book.weight(clients[0], 0) == pytest.approx(0.5 * MOST_MADE_UP)
    assert book.weight(clients[1], 0) == pytest.approx(0.5)


# --- without rounds, on a real clock


def test_a_model_after_every_two_replies_and_everybody_counts_once(clock):
    """Clients 0, 1 and 2 answer together: the third waits for the next model, and is not lost."""
    grid = TimedGrid(clock, [1, 2, 3, 4], lambda i, _: 5.0 if i == 3 else 1.0)
    waiting = Waiting(mode="buffered", buffer=2, busy=4)
    strategy, found, model = start(grid, 10, waiting=waiting)
    assert [b["accepted"] for b in books(found)] == [2] * 10
    done = [(r["client"], r["asked"]) for r in books(found, "client") if r["status"] == "ok"]
    assert len(done) == len(set(done)) == 20
    under_way = [(o.client.index, o.asked) for o in strategy.flow.under_way()]
    assert sorted(done + under_way) == sorted(grid.trained)  # nothing is lost
    assert (3, 1) in done
    assert model > 0


def test_who_hangs_holds_up_nobody_where_rounds_overlap(clock):
    grid = TimedGrid(clock, [1, 2, 3], lambda i, _: UNHEARD if i == 2 else 1.0)
    waiting = Waiting(mode="buffered", buffer=2, busy=3)
    _, found, _ = start(grid, 5, waiting=waiting)
    assert [b["accepted"] for b in books(found)] == [2] * 5
    assert clock.now < 10


def test_with_a_larger_buffer_than_there_are_clients_alive_it_goes_on_by_reason(clock):
    grid = TimedGrid(clock, [1, 2, 3], lambda i, _: UNHEARD if i == 2 else 1.0)
    waiting = Waiting(mode="buffered", buffer=3, busy=3)
    _, found, _ = start(grid, 3, waiting=waiting)
    assert [b["accepted"] for b in books(found)] == [2] * 3
    assert clock.now < 3 * 80


def test_another_loop_is_refused_for_it_would_wait_for_everybody():
    strategy = FedLoRA(waiting=Waiting(quorum=0.5))
    with pytest.raises(ValueError, match="start of FedLoRA itself alone"):
        strategy.follow(1, to_record(random_adapter(2, seed=0).to_state_dict()))
    old = FedLoRA(client_api="numpy", waiting=Waiting(quorum=0.5), query=False)
    arrays = to_record(random_adapter(8, seed=0).to_state_dict())
    with pytest.raises(ValueError, match="start of FedLoRA itself alone"):
        LegacyFedLoRA(old, initial_arrays=arrays).initialize_parameters(SimpleClientManager())
