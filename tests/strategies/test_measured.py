import json

import numpy as np
import pytest

from strategies.wallclock import MeasuredClock, RoundTime, Work, plan


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
    clock.finish([done(0, 10.0, 12.0), done(1, 30.0, 30.5)], 1)
    clock.finish([done(0, 40.0, 44.0, steps=20.0, size=4000)], 2)
    step = 0.75 * 1.0 + 0.25 * 2.0
    byte = 0.75 * 0.002 + 0.25 * 0.001
    known = [20 * step + byte * 500, 10 * 3.0 + 0.0005 * 500]
    works = [Work(i, 4, 500) for i in range(3)]
    time = clock.forecast(works, 3)
    finish = [time.compute_seconds[i] + time.upload_seconds[i] for i in range(3)]
    unknown = 15 * (step + 3.0) / 2 + (byte + 0.0005) / 2 * 500
    assert finish == pytest.approx([*known, unknown])
    assert (time.seconds, time.bottleneck) == (pytest.approx(unknown), 2)
    # a plan's own count of steps goes before that of the last round
    assert clock.forecast([Work(0, 4, 0, steps=2)], 3).seconds == pytest.approx(2 * step)
    profiles = clock.profiles([0, 1, 2], [1 / 3] * 3, [[4]] * 3, (100, 100), 4, 3)
    total = profiles.compute_seconds(np.full(3, 4.0)) + profiles.upload_seconds(np.full(3, 4.0))
    assert total == pytest.approx(finish)


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
