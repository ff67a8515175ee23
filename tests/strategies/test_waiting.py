"""When a round is over, on a clock of the test's own, and what becomes of who is later."""

import pytest

from strategies import FedLoRA
from strategies.privacy import Privacy, PrivateRun
from strategies.round.waiting import Waiting
from strategies.sampling import FractionSampling, IndependentSampling
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
