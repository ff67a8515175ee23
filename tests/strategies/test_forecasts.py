"""When the last reply of a round is there, against rounds that are drawn and seen."""

import json

import numpy as np
import pytest

from strategies.wallclock.clock import Work
from strategies.wallclock.forecasts import FEWEST, MEMORY, Forecasts
from strategies.wallclock.measured import MeasuredClock


def taught(errors):
    forecasts = Forecasts()
    for error in errors:
        forecasts.expect({7: 10.0})
        forecasts.learn(7, 10.0 + error)
    return forecasts


@pytest.mark.parametrize("seed", range(6))
def test_half_of_all_rounds_take_longer(seed):
    rng = np.random.default_rng(seed)
    errors = rng.normal(0.3, 1.0, MEMORY)
    guesses = [rng.uniform(5, 9, int(size)) for size in rng.choice([1, 1, 1, 4, 9], 12)]
    late = rng.choice(errors, (20_000, 12))
    rounds = (np.column_stack([rng.choice(own, 20_000) for own in guesses]) + late).max(axis=1)
    assert np.mean(rounds > taught(errors).latest(guesses)) == pytest.approx(0.5, abs=0.02)


def test_many_alike_take_longer_than_each_and_one_does_not():
    forecasts = taught([-1.0, -0.5, 0.0, 0.5, 1.0])
    one, many = (forecasts.latest([np.array([8.0])] * count) for count in (1, 40))
    assert one == pytest.approx(8.0)
    assert many == pytest.approx(9.0)


def test_without_enough_errors_it_is_the_latest_of_those_expected():
    guesses = [np.array([3.1]), np.array([4.7]), np.array([0.2])]
    for count in range(FEWEST):
        assert taught([5.0] * count).latest(guesses) == 4.7
    assert taught([5.0] * FEWEST).latest(guesses) == pytest.approx(9.7)


def test_one_reply_that_is_very_late_moves_it_little():
    rng = np.random.default_rng(0)
    errors, guesses = rng.normal(0, 0.5, MEMORY - 1), [np.array([10.0])] * 12
    before, after = taught(errors).latest(guesses), taught([*errors, 600.0]).latest(guesses)
    assert 0 <= after - before < 0.5


def test_it_is_never_before_the_round_began():
    assert taught([-10.0] * FEWEST).latest([np.array([2.0])]) == 0.0


def rounds(clock, draw, count):
    """Run rounds of clients 0 to 11 as drawn; return when each was expected, and when it was."""
    told = []
    for number in range(1, count + 1):
        works = [Work(i, 4, 1000, steps=2.0) for i in range(12)]
        expected = clock.begin(works, number, network=True, empty=()).seconds
        done = [
            Work(i, 4, 1000, steps=2.0, train_seconds=1.0, held_seconds=1.0, elapsed_seconds=took)
            for i, took in enumerate(draw())
        ]
        told.append((expected, clock.finish(done, number).seconds))
    return np.array(told)


def test_rounds_of_clients_that_are_alike_last_as_long_as_expected():
    rng = np.random.default_rng(3)
    expected, took = rounds(MeasuredClock(), lambda: 5 + rng.gamma(4, 0.5, 12), 60)[10:].T
    assert took.sum() / expected.sum() == pytest.approx(1.0, abs=0.05)
    assert 0.3 < np.mean(took > expected) < 0.7


def test_who_was_not_heard_of_may_be_as_slow_as_the_slowest():
    clock = MeasuredClock()
    heard = [Work(i, 4, 1000, train_seconds=1.0, elapsed_seconds=2.0 + 9 * (i == 2), steps=2.0)
             for i in range(3)]  # fmt: skip
    clock.begin([Work(i, 4, 1000) for i in range(3)], 1, network=True, empty=())
    clock.finish(heard, 1)
    slow, quick = (clock.forecast([Work(i, 4, 1000)], 2).seconds for i in (2, 0))
    new = [Work(i, 4, 1000) for i in range(3, 12)]
    assert clock.forecast(new, 2).seconds == pytest.approx(slow)  # one of nine is, almost surely
    assert clock.forecast(new[:1], 2).seconds == pytest.approx(quick)


def test_a_late_reply_teaches_nothing_about_the_round_at_hand():
    clock, works = MeasuredClock(), [Work(0, 4, 1000, steps=2.0)]
    reply = Work(0, 4, 1000, steps=2.0, train_seconds=1.0, elapsed_seconds=3.0)
    clock.finish([reply], 1)
    for number in range(2, 9):
        clock.begin(works, number, network=True, empty=())
        clock.learn([Work(0, 4, 1000, steps=2.0, train_seconds=1.0, elapsed_seconds=3.0)], number)
    assert clock.state_dict()["forecasts"] == {"errors": []}


def test_who_did_not_answer_teaches_nothing():
    clock = MeasuredClock()
    rng = np.random.default_rng(0)
    rounds(clock, lambda: rng.uniform(3, 4, 12), 3)
    before = clock.state_dict()["forecasts"]
    works = [Work(i, 4, 1000) for i in range(12)]
    clock.begin(works, 4, network=True, empty=())
    clock.finish([Work(0, 4, 1000, elapsed_seconds=90.0, answered=False)], 4)
    assert clock.state_dict()["forecasts"] == before


def test_a_resumed_clock_expects_the_same():
    rng = np.random.default_rng(5)
    clock, again, old = MeasuredClock(), MeasuredClock(), MeasuredClock()
    rounds(clock, lambda: rng.uniform(3, 8, 12), 4)
    state = json.loads(json.dumps(clock.state_dict()))
    again.load_state_dict(state)
    works = [Work(i, 4, 1000) for i in range(14)]
    assert again.forecast(works, 5) == clock.forecast(works, 5)
    del state["forecasts"]  # as a checkpoint of before has none
    old.load_state_dict(state)
    assert old.forecast(works, 5).seconds < clock.forecast(works, 5).seconds
