import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from strategies.wallclock import ClientProfiles, MeasuredClock, RoundTime, Work, plan
from strategies.wallclock.planner import expected_seconds


def done(client, train, elapsed, *, steps=10.0, size=1000, rank=4, answered=True):
    return Work(client, rank, size, steps, train, elapsed, answered)


def test_measured_round():
    clock = MeasuredClock()
    time = clock.finish(
        [done(2, 3.0, 5.0), done(0, 4.0, 4.5), done(7, 6.0, 5.9), done(9, None, 1.0),
         done(4, float("nan"), None)], 1,
    )  # fmt: skip
    assert time.compute_seconds == {0: 4.0, 2: 3.0, 7: 5.9, 9: 1.0}
    assert time.upload_seconds == pytest.approx({0: 0.5, 2: 2.0, 7: 0.0, 9: 0.0})
    assert (time.seconds, time.bottleneck, time.late) == (5.9, 7, frozenset())
    assert clock.finish([], 2) == RoundTime(0.0)
    # Somebody who never answered was waited for, but says nothing of its speed.
    before = clock.state_dict()
    time = clock.finish([done(2, None, 60.0, answered=False)], 3)
    assert (time.seconds, time.bottleneck) == (60.0, 2)
    assert clock.state_dict() == before


def test_estimates_are_smoothed_and_unknown_clients_are_as_the_mean():
    clock = MeasuredClock(smoothing=0.25)
    # Every reply takes half a second, and each byte 1 ms or 2 ms.
    for number, size in enumerate((1000, 4000, 2000)):
        clock.finish(
            [done(0, 10.0 * (number + 1), 10.5 * (number + 1), steps=10.0 * (number + 1), size=0),
             done(1, 30.0, 30.5 + 0.001 * size, size=size),
             done(2, 30.0, 30.5 + 0.002 * size, size=size)], number + 1,
        )  # fmt: skip
    works = [Work(i, 4, 500) for i in range(4)]
    time = clock.forecast(works, 4)
    assert time.fixed_seconds == pytest.approx(0.5, abs=0.05)
    assert time.compute_seconds == pytest.approx({0: 30.0, 1: 30.0, 2: 30.0, 3: 50 / 3 * 7 / 3})
    assert time.upload_seconds[1] == pytest.approx(0.5, abs=0.02)
    assert time.upload_seconds[2] == pytest.approx(1.0, abs=0.02)
    mean = sum(time.upload_seconds[i] for i in range(3)) / 3
    assert time.upload_seconds[3] == pytest.approx(mean)
    assert time.mb_seconds[1].value == pytest.approx(1000, rel=0.05)
    assert time.mb_seconds[1].low <= 1000 <= time.mb_seconds[1].high
    assert 3 not in time.mb_seconds
    total = {i: time.compute_seconds[i] + time.upload_seconds[i] for i in range(4)}
    assert time.bottleneck == max(total, key=total.get)
    assert time.seconds == pytest.approx(max(total.values()) + time.fixed_seconds)
    # a plan's own count of steps goes before that of the last round
    assert clock.forecast([Work(0, 4, 0, steps=2)], 3).compute_seconds[0] == pytest.approx(2.0)
    profiles = clock.profiles([0, 1, 2, 3], [1 / 4] * 4, [[4]] * 4, (100, 100), 4, 3)
    found = profiles.compute_seconds(np.full(4, 4.0)) + profiles.upload_seconds(np.full(4, 4.0))
    assert found == pytest.approx([total[i] + time.fixed_seconds for i in range(4)])


def test_what_a_client_read_before_its_first_reply_is_not_expected_again():
    clock = MeasuredClock(smoothing=0.25)
    works = [Work(0, 4, 500, steps=10)]
    for held, expected in [
        (14.0, 4.0),  # ten seconds of them model and rows: only the training counts
        (5.0, 5.0),  # what holds a reply each time does, from the second on
        (9.0, 6.0),  # and is smoothed after it
    ]:
        clock.finish([replace(done(0, 4.0, held + 1, steps=10), held_seconds=held)], 1)
        assert clock.forecast(works, 2).compute_seconds[0] == pytest.approx(expected)
        resumed = MeasuredClock(smoothing=0.25)
        resumed.load_state_dict(json.loads(json.dumps(clock.state_dict())))
        clock = resumed


@pytest.mark.parametrize("shared", [False, True])
def test_a_plan_lies_between_what_the_intervals_say(shared):
    clock, rng = MeasuredClock(shared_band=shared), np.random.default_rng(3)
    for number in range(6):
        sizes = rng.integers(1000, 9000, 3)
        waits = 0.5 + rng.uniform(0, 0.6, 3) + 1e-4 * sizes * [1, 2, 3]
        works = [done(i, 2.0, 2.0 + waits[i], size=int(sizes[i])) for i in range(3)]
        clock.finish(works, number + 1)
    about = [0, 1, 2], [0.5, 0.3, 0.2], [[2, 4]] * 3, (100, 2000), 4, 7
    made = plan(clock.profiles(*about), 1.0, 2.0, rng=rng)
    low, value, high = (
        expected_seconds(c.profiles(*about), made.q, made.k) for c in with_ends(clock)
    )
    assert low < value < high
    assert value == pytest.approx(made.round_seconds)
    if not shared:  # by hand: the mean over who joins of the slowest
        fit = clock._transfers.fit()
        for end, found in (("low", low), ("high", high)):
            alone = [
                2.0 + getattr(fit.fixed, end) + getattr(fit.byte_seconds[i], end) * (100 + 2000 * k)
                for i, k in enumerate(made.k)
            ]
            wanted = 0.0
            for there in itertools.product([0, 1], repeat=3):
                chance = np.prod([q if x else 1 - q for x, q in zip(there, made.q, strict=True)])
                wanted += chance * max(s * x for s, x in zip(alone, there, strict=True))
            assert found == pytest.approx(wanted, rel=1e-6)


def with_ends(clock):
    low, high = clock.ends()
    return low, clock, high


def test_what_a_plan_promises_is_found_again_for_many_clients():
    profiles = ClientProfiles(
        weights=[1 / 14] * 14, base_seconds=np.linspace(1, 3, 14), rank_seconds=0.1, steps=2,
        bits_per_rank=1e6, constant_bits=1e5, spectral_efficiency=np.linspace(1, 4, 14),
        bandwidth_hz=1e6, ranks=[[2, 4, 8]] * 14, full_rank=8,
    )  # fmt: skip
    made = plan(profiles, 1.0, 2.0, rng=np.random.default_rng(0), idle_seconds=0.5)
    found = expected_seconds(profiles, made.q, made.k, idle_seconds=0.5)
    assert found == made.round_seconds


def test_what_surrounds_training_at_the_client_is_not_the_network():
    clock = MeasuredClock()
    work = replace(done(0, 2.0, 9.0), held_seconds=5.0)
    time = clock.finish([work], 1)
    assert time.compute_seconds == {0: 5.0}
    assert time.upload_seconds == {0: 4.0}
    # one that says what cannot be is not believed
    time = clock.finish([replace(work, held_seconds=-1.0)], 2)
    assert time.compute_seconds == {0: 2.0}


def test_answers_without_content_say_what_is_fixed():
    clock = MeasuredClock()
    works = [done(i, 1.0, 1.0 + 1.5 + i, size=1000 * i) for i in (1, 2)]
    clock.begin(works, 1, network=True, empty=[1.5, 1.4, 1.5, 30.0])
    time = clock.finish(works, 1)
    assert time.fixed_seconds == pytest.approx(1.5, abs=0.1)
    assert time.mb_seconds[2].value == pytest.approx(1000, rel=0.1)
    assert time.fixed_between[0] <= 1.5 <= time.fixed_between[1]


def test_without_a_network_clients_wait_for_their_turn():
    clock = MeasuredClock()
    assert not clock.begin([Work(0, 4, 1000)], 1, network=False, empty=()).queued  # nothing known
    time = clock.finish([done(0, 1.0, 11.0), done(1, 1.0, 3.0)], 1)
    assert time.queued
    assert time.upload_seconds == {0: 10.0, 1: 2.0}
    assert not time.mb_seconds
    assert time.fixed_seconds == 0


def test_what_is_measured_at_one_rank_holds_at_another():
    def real(client, rank, size):  # seconds of a client whose step grows by 5 % a rank
        return 8 * 0.1 * (client + 1) * (1 + 0.05 * rank), 1e-6 * size

    clock = MeasuredClock(rank_share=0.05)
    works = []
    for client, rank in enumerate((2, 8, 16)):
        size = 1000 + 500 * rank
        train, transfer = real(client, rank, size)
        works.append(done(client, train, train + transfer, steps=8, size=size, rank=rank))
    clock.finish(works, 1)
    profiles = clock.profiles([0, 1, 2], [0.2, 0.3, 0.5], [[1, 4]] * 3, (1000, 500), 16, 2)
    for rank in (1, 4):
        k = np.full(3, float(rank))
        expected = [sum(real(client, rank, 1000 + 500 * rank)) for client in range(3)]
        assert profiles.compute_seconds(k) == pytest.approx(expected)
        assert (profiles.upload_seconds(k) <= 2e-9).all()
    # Full participation waits for the slowest: the uploads that are left take no time.
    everybody = plan(profiles, 1.0, 50.0, q_min=1.0, rng=np.random.default_rng(0))
    assert everybody.round_seconds == pytest.approx(profiles.compute_seconds(everybody.k).max())


def test_a_shared_band_predicts_the_round_it_measured():
    clock = MeasuredClock(shared_band=True)
    works = [done(i, 1.0, 1.0 + 2.0 * (i + 1), size=1000 * (i + 1)) for i in range(3)]
    measured = clock.finish(works, 1)
    expected = clock.forecast([Work(i, 4, 1000 * (i + 1)) for i in range(3)], 2)
    assert expected.seconds == pytest.approx(measured.seconds)
    assert expected.upload_seconds == pytest.approx(measured.upload_seconds)
    profiles = clock.profiles([0, 1, 2], [1 / 3] * 3, [[4]] * 3, (600, 100), 4, 2)
    np.testing.assert_allclose(profiles.upload_seconds(np.full(3, 4.0)), 2.0 / 3)
    assert profiles.bandwidth_hz == 1.0


def test_a_late_reply_teaches_no_rate_of_a_shared_band():
    for shared, rates in ((True, []), (False, [0])):
        clock = MeasuredClock(shared_band=shared)
        clock.learn([done(0, 10.0, 60.0)], 2)
        time = clock.forecast([Work(0, 4, 1000)], 3)
        assert time.compute_seconds == {0: 10.0}
        assert list(time.mb_seconds) == rates


def test_measured_state_survives_json_and_goes_on_alike():
    clock, again = MeasuredClock(), MeasuredClock()
    clock.finish([done(0, 1 / 3, 0.7), done(11, 0.1, 0.2, steps=None)], 1)
    again.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert again.state_dict() == clock.state_dict()
    planned = [Work(i, 4, 100 * i) for i in (0, 5, 11, 3)]
    for one in (clock, again):
        one.finish([done(0, 0.4, 0.9), done(5, 2.0, 2.2)], 2)
    assert again.forecast(planned, 3) == clock.forecast(planned, 3)
    assert clock.summary() == "measured (lines of their own, smoothing 0.3)"


def test_a_state_of_before_transfers_were_looked_at():
    clock = MeasuredClock()
    clock.load_state_dict(
        {"clients": {"0": {"step_seconds": 1.0, "byte_seconds": 0.002, "steps": 10.0}}}
    )
    time = clock.forecast([Work(0, 4, 1000)], 2)
    assert (time.compute_seconds, time.upload_seconds) == ({0: 10.0}, {0: 2.0})
    clock.finish([done(0, 10.0, 13.0)], 2)
    assert clock.forecast([Work(0, 4, 1000)], 3).upload_seconds == {0: 3.0}


def test_nothing_measured_yet():
    clock = MeasuredClock()
    time = clock.forecast([Work(0, 1, 1)], 1)
    assert np.isnan(time.seconds)
    assert time.late == frozenset()
    with pytest.raises(ValueError, match="plan after the first round"):
        clock.profiles([0], [1.0], [[1]], (1, 1), 1, 1)


@pytest.mark.parametrize(
    "options", [{"smoothing": 0}, {"smoothing": 1.5}, {"rank_share": -1}, {"rank_share": np.inf}]
)
def test_bad_options_of_a_measured_clock(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MeasuredClock(**options)
