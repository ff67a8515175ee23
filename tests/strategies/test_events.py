"""The queue of events, beside one that looks at everybody in small steps."""

import json
import math

import numpy as np
import pytest

from strategies.wallclock.events import Events


def drain(events, until=math.inf):
    found = []
    while (event := events.next(until)) is not None:
        found.append((event.kind, event.key, event.seconds))
    return found


def test_one_alone_has_the_whole_band():
    events = Events(2.0)
    events.start(1, 3.0, 4.0)
    assert drain(events) == [("uploaded", 1, 5.0)]
    assert len(events) == 0


def test_two_share_the_band_while_both_upload():
    """Number 1 uploads alone from 1 to 2, both from 2: 1 has 3 left, done at 8, and 2 then 1."""
    events = Events(1.0)
    events.start(1, 1.0, 4.0)
    events.start(2, 2.0, 4.0)
    assert drain(events) == [("uploaded", 1, 8.0), ("uploaded", 2, 9.0)]


def test_who_goes_away_leaves_the_band_to_the_other():
    events = Events(1.0)
    events.start(1, 0.0, 4.0, gone=2.0)
    events.start(2, 0.0, 4.0)
    assert drain(events) == [("gone", 1, 2.0), ("uploaded", 2, 5.0)]


def test_until_a_deadline_nothing_is_heard_and_the_clock_stands_there():
    events = Events(1.0)
    events.start(1, 5.0, 1.0)
    assert events.next(4.0) is None
    assert events.now == 4.0
    assert drain(events) == [("uploaded", 1, 6.0)]


def in_small_steps(jobs, band, step=1e-3):
    """Return when each is done, by looking at everybody a thousand times a second."""
    left = {k: upload for k, (_, _, upload, _) in jobs.items()}
    done, now = {}, 0.0
    while left:
        sends = [k for k in left if jobs[k][0] + jobs[k][1] <= now]
        for k in sends:
            left[k] -= step * band / len(sends)
        for k in list(left):
            if now >= jobs[k][3]:
                done[k] = "gone", now
            elif left[k] <= 0:
                done[k] = "uploaded", now
        left = {k: v for k, v in left.items() if k not in done}
        now += step
    return done


@pytest.mark.parametrize("seed", range(5))
def test_as_in_small_steps(seed):
    rng = np.random.default_rng(seed)
    jobs = {
        k: (0.0, rng.uniform(0, 3), rng.uniform(0.1, 2), rng.choice([math.inf, rng.uniform(1, 9)]))
        for k in range(12)
    }
    events = Events(1.5)
    for k, (_, compute, upload, gone) in jobs.items():
        events.start(k, compute, upload, gone)
    found = {key: (kind, seconds) for kind, key, seconds in drain(events)}
    wanted = in_small_steps(jobs, 1.5)
    assert found.keys() == wanted.keys()
    for k, (kind, seconds) in wanted.items():
        assert found[k][0] == kind
        assert found[k][1] == pytest.approx(seconds, abs=0.03)


@pytest.mark.parametrize("stop", [0, 3, 7])
def test_it_goes_on_from_its_state_to_the_last_bit(stop):
    rng = np.random.default_rng(1)
    events = Events(1.7)
    for k in range(20):
        events.start(k, rng.exponential(), rng.exponential(), rng.exponential(20))
    for _ in range(stop):
        events.next()
    events.drop(19)
    other = Events(1.7)
    state = json.loads(json.dumps(events.state_dict()))  # Infinity is Python's JSON
    other.load_state_dict(state)
    assert drain(other) == drain(events)


def test_a_key_twice_is_refused():
    events = Events(1.0)
    events.start(1, 1.0, 1.0)
    with pytest.raises(ValueError, match="order 1 is under way already"):
        events.start(1, 1.0, 1.0)


def test_soonest_is_the_order_in_which_they_come():
    events = Events(1e9)
    for k, compute in enumerate([3.0, 1.0, 2.0]):
        events.start(k, compute, 1.0)
    assert events.soonest(2) == [1, 2]
