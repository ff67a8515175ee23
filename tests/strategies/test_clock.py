import itertools
import json
from dataclasses import replace
from time import process_time

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq

from strategies.wallclock import (
    PROFILES,
    Devices,
    MeasuredClock,
    RoundTime,
    SimulatedClock,
    Work,
    make_clock,
    retime,
)
from strategies.wallclock.bandwidth import batch_round_seconds, without_whom_soonest
from strategies.wallclock.channel import efficiency_at, harmonic_efficiency

COST = {"base_flops": 2e9, "rank_flops": 1e8, "steps": 10.0}


def works_of(clients, **changes):
    rng = np.random.default_rng(3)
    ranks, sizes = rng.integers(1, 9, 200), rng.integers(50_000, 2_000_000, 200)
    return [Work(i, int(ranks[i]), int(sizes[i]), **changes) for i in clients]


def parts(clock, works, server_round=1):
    """Compute seconds and upload seconds at unit bandwidth, read off a round each has alone."""
    alone = [clock.finish([work], server_round) for work in works]
    tau = np.array([time.compute_seconds[w.client] for time, w in zip(alone, works, strict=True)])
    t = np.array([time.upload_seconds[w.client] for time, w in zip(alone, works, strict=True)])
    return tau, t * clock.bandwidth_hz


def oracle(tau, t, total):
    """Round time with the best shares, by another package's root finder."""
    return brentq(
        lambda T: np.sum(t / (T - tau)) - total,
        tau.max() + 1e-12,
        tau.max() + 2 * t.sum() / total,
        xtol=1e-13,
    )


# ----- simulated: one round ---------------------------------------------------------------


def test_one_round_by_hand():
    profile = replace(PROFILES["lab"], rayleigh=False, max_efficiency=100.0)
    snr_db = 10 * np.log10(np.array([3.0, 15.0]))  # 2 and 4 bit/s/Hz
    devices = Devices(profile, snr_db, np.array([1e9, 2e9]), np.ones(2), ("a", "b"))
    clock = SimulatedClock(
        devices, base_flops=1e9, rank_flops=1e8, steps=5, bandwidth="equal", bandwidth_hz=1e6
    )
    time = clock.finish([Work(0, 10, 100_000), Work(1, 0, 400_000, steps=8)], 1)
    assert time.compute_seconds == pytest.approx({0: 5 * 2.0, 1: 8 * 0.5})
    assert time.upload_seconds == pytest.approx({0: 800_000 / 2 / 5e5, 1: 3_200_000 / 4 / 5e5})
    assert (time.seconds, time.bottleneck) == (pytest.approx(10.8), 0)
    assert time.late == frozenset()


@pytest.mark.parametrize("profile", PROFILES)
def test_optimal_round_against_a_root_finder_and_leaving_one_out(profile):
    clock = SimulatedClock(profile, **COST)
    works = works_of(range(7))
    for server_round in range(1, 6):
        tau, t = parts(clock, works, server_round)
        time = clock.finish(works, server_round)
        assert time.seconds == pytest.approx(oracle(tau, t, clock.bandwidth_hz), rel=1e-9)
        finish = [time.compute_seconds[i] + time.upload_seconds[i] for i in range(7)]
        assert finish == pytest.approx([time.seconds] * 7, rel=1e-9)  # all together
        without = [oracle(np.delete(tau, i), np.delete(t, i), clock.bandwidth_hz) for i in range(7)]
        assert time.bottleneck == int(np.argmin(without))


@pytest.mark.parametrize("seed", range(40))
def test_the_bottleneck_is_that_of_trying_everybody(seed):
    """Also with equal times, uploads of nothing, and one that computes far longer."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 30))
    tau = rng.integers(0, 3, n).astype(float) if seed % 4 == 0 else rng.lognormal(0, seed % 3, n)
    upload = rng.lognormal(seed % 5 - 2, 2, n) * (rng.random(n) < (0.6 if seed % 3 == 0 else 1))
    every = batch_round_seconds(tau, upload, ~np.eye(n, dtype=bool))
    found = without_whom_soonest(tau, upload)
    assert every[found] == pytest.approx(every.min(), rel=1e-12)


def test_the_bottleneck_of_many_takes_no_square_of_them():
    rng = np.random.default_rng(0)
    start = process_time()
    without_whom_soonest(rng.uniform(0, 9, 100_000), rng.lognormal(0, 1, 100_000))
    assert process_time() - start < 2  # about 0.05; all pairs would take half an hour


def test_optimal_shares_never_lose_to_equal_ones():
    optimal, equal = (SimulatedClock("phones", **COST, bandwidth=b) for b in ("optimal", "equal"))
    for n in (1, 2, 12):
        works = works_of(range(n))
        best, baseline = optimal.finish(works, 1), equal.finish(works, 1)
        assert best.compute_seconds == baseline.compute_seconds
        assert best.seconds <= baseline.seconds * (1 + 1e-12)


def test_nobody_takes_part():
    clock = SimulatedClock("lab", **COST, idle_seconds=2.5, deadline=1.0)
    assert clock.forecast([], 1) == clock.finish([], 1) == RoundTime(2.5)


# ----- simulated: chance ------------------------------------------------------------------


def test_a_client_does_not_depend_on_the_others_nor_on_their_order():
    clients = [4, 0, 17]
    works = works_of(clients)
    clock = SimulatedClock("campus", **COST)
    together = clock.finish(works, 3)
    for work in works:
        alone = SimulatedClock("campus", **COST)
        alone.finish(works_of([99]), 2)
        tau, t = parts(alone, [work], 3)
        assert tau[0] == together.compute_seconds[work.client]
        share = t[0] / together.upload_seconds[work.client]
        assert 0 < share < clock.bandwidth_hz
    assert clock.finish(works[::-1], 3) == together
    assert SimulatedClock("campus", **COST, seed=1).finish(works, 3) != together


def test_devices_stay_and_channels_fade():
    profile = replace(PROFILES["campus"], min_efficiency=1e-6, max_efficiency=50.0)
    clock = SimulatedClock(profile, **COST)
    works = works_of(range(3))
    rounds = [parts(clock, works, r) for r in (1, 2)]
    np.testing.assert_array_equal(rounds[0][0], rounds[1][0])
    assert not np.isclose(rounds[0][1], rounds[1][1]).any()


def test_chance_of_device_fading_and_of_the_strategy_are_unrelated():
    # Zero-padded seeds would make [seed, client] and [seed, client, 0] the same generator.
    clock = SimulatedClock("campus", **COST)
    purposes = [(0, 5), (1, 5, 0), (1, 0, 5), (0, 5, 0), (2, 5)]
    draws = [clock._rng(*purpose).random() for purpose in purposes]
    draws += [np.random.default_rng([42, *purpose]).random() for purpose in purposes[:3]]
    assert len(set(draws)) == len(draws)


def test_rows_are_reused_when_there_are_more_clients_but_not_their_fades():
    devices = Devices(
        PROFILES["lab"], np.array([-3.0, 5.0]), np.array([1e9, 2e9]), np.ones(2), ("a", "b")
    )
    clock = SimulatedClock(devices, **COST)
    tau, t = parts(clock, [Work(i, 4, 1000) for i in range(4)])
    assert tau[0] == tau[2] == 2 * tau[1] == 2 * tau[3]
    assert len(set(t)) == 4


def test_half_of_the_clients_lose_their_channel_from_one_round_on():
    still = SimulatedClock("campus", **COST)
    clock = SimulatedClock("campus", **COST, change_round=5, change_factor=0.2)
    works = works_of(range(40))
    for server_round in (4, 5, 9):
        ratio = parts(clock, works, server_round)[1] / parts(still, works, server_round)[1]
        hit = np.isclose(ratio, 5.0)
        assert (hit | np.isclose(ratio, 1.0)).all()
        assert hit.sum() == (20 if server_round >= 5 else 0)
    everyone = SimulatedClock("campus", **COST, change_round=1, change_share=1.0)
    ratio = parts(everyone, works)[1] / parts(still, works)[1]
    np.testing.assert_allclose(ratio, 10.0)
    shares = [
        np.mean([SimulatedClock("lab", **COST, seed=s, change_share=0.33)._device(i)[2]
                 for i in range(10)]) for s in range(300)
    ]  # fmt: skip
    assert np.mean(shares) == pytest.approx(0.33, abs=0.01)


# ----- simulated: deadlines ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_deadline_keeps_as_many_as_any_subset_could(seed):
    works = works_of(range(6))
    free = SimulatedClock("phones", **COST, seed=seed)
    tau, t = parts(free, works)
    everybody = free.finish(works, 1).seconds
    for deadline in everybody * np.array([0.05, 0.3, 0.6, 0.9, 0.999, 1.001]):
        clock = SimulatedClock("phones", **COST, seed=seed, deadline=float(deadline))
        time = clock.forecast(works, 1)
        feasible = [
            subset
            for size in range(7)
            for subset in map(list, itertools.combinations(range(6), size))
            if size == 0 or oracle(tau[subset], t[subset], clock.bandwidth_hz) <= deadline
        ]
        kept = sorted(set(range(6)) - time.late)
        assert kept in feasible
        assert len(kept) == max(map(len, feasible))
        assert time.seconds == (deadline if time.late else everybody)
        assert set(time.compute_seconds) == set(range(6))
        assert sorted(time.upload_seconds) == kept
        for i in kept:
            assert time.compute_seconds[i] + time.upload_seconds[i] <= deadline * (1 + 1e-9)


def test_with_equal_shares_the_deadline_sorts_out_who_finishes_later():
    free = SimulatedClock("phones", **COST, bandwidth="equal").finish(works_of(range(8)), 1)
    finish = {i: free.compute_seconds[i] + free.upload_seconds[i] for i in range(8)}
    deadline = float(np.median(list(finish.values())))
    clock = SimulatedClock("phones", **COST, bandwidth="equal", deadline=deadline)
    for time in (clock.forecast(works_of(range(8)), 1), clock.finish(works_of(range(8)), 1)):
        assert time.late == {i for i, seconds in finish.items() if seconds > deadline}
        assert len(time.late) == 4
        assert time.seconds == deadline
        assert time.upload_seconds == {
            i: free.upload_seconds[i] for i in finish if i not in time.late
        }
        assert time.bottleneck == max(finish, key=finish.get)


@pytest.mark.parametrize("bandwidth", ["optimal", "equal"])
def test_late_stays_late_and_real_work_is_timed(bandwidth):
    works = works_of(range(6))
    whole = SimulatedClock("phones", **COST, bandwidth=bandwidth).finish(works, 1).seconds
    clock = SimulatedClock("phones", **COST, bandwidth=bandwidth, deadline=whole / 2)
    late = clock.forecast(works, 1).late
    assert 0 < len(late) < 6
    less = [replace(work, steps=0.01, upload_bytes=1) for work in works]
    time = clock.finish(less, 1)
    assert (time.late, time.seconds) == (late, whole / 2)
    # Next time the clock knows how many steps they do; the verdict was for that round alone.
    assert clock.forecast([replace(work, upload_bytes=1) for work in works], 2).late == frozenset()
    more = [replace(work, steps=1000.0) for work in works]
    time = clock.finish(more, 2)
    assert time.late == frozenset()
    assert time.seconds > whole


def test_everybody_can_be_late():
    clock = SimulatedClock("phones", **COST, deadline=1e-6)
    time = clock.finish(works_of(range(3)), 1)
    assert time.late == {0, 1, 2}
    assert time.seconds == 1e-6
    assert not time.upload_seconds


# ----- simulated: what the planner is told ------------------------------------------------


def test_harmonic_efficiency_against_an_integral():
    profile = PROFILES["rural"]
    for snr_db in (-15.0, 0.0, 12.0, 40.0):

        def seconds(g, snr_db=snr_db):
            return np.exp(-g) / efficiency_at(profile, np.array(snr_db), np.array(g))

        mean = sum(quad(seconds, *ends, limit=500)[0] for ends in itertools.pairwise(
            [0, 1e-3, 1e-2, 0.1, 1, 10, 60]))  # fmt: skip
        assert harmonic_efficiency(profile, np.array([snr_db]))[0] == pytest.approx(
            1 / mean, rel=2e-3
        )
    still = replace(profile, rayleigh=False)
    assert harmonic_efficiency(still, np.array([0.0]))[0] == 1.0


def test_profiles_foresee_the_mean_round():
    clock = SimulatedClock("campus", **COST, change_round=10_000)
    n, ranks = 12, [2, 4, 8]
    works = [Work(i, 4, 1_000_000 + 4 * 50_000) for i in range(n)]
    seconds = [clock.finish(works, r).seconds for r in range(1, 1001)]
    arguments = (list(range(n)), [1 / n] * n, [ranks] * n, (1e6, 5e4), 8)
    profiles = clock.profiles(*arguments, 1)
    k = np.full(n, 4.0)
    tau, upload = profiles.compute_seconds(k), profiles.upload_seconds(k)
    expected = oracle(tau, upload, 1.0)
    assert expected == pytest.approx(np.mean(seconds), rel=0.03)
    # No knowledge of the future, and none of this round's fades.
    np.testing.assert_array_equal(
        profiles.spectral_efficiency, clock.profiles(*arguments, 9_999).spectral_efficiency
    )
    after = clock.profiles(*arguments, 10_000).spectral_efficiency / profiles.spectral_efficiency
    assert sorted(np.round(after, 9).tolist())[4:8] == [0.1, 0.1, 1.0, 1.0]


@pytest.mark.parametrize("bandwidth", ["optimal", "equal"])
def test_what_is_fixed_lengthens_every_round_by_itself(bandwidth):
    options = {"base_flops": 1e12, "rank_flops": 1e10, "steps": 5.0, "bandwidth": bandwidth}
    plain = SimulatedClock("rural", **options)
    fixed = SimulatedClock("rural", fixed_seconds=7.0, **options)
    works = [Work(i, 4 * i, 10_000 * (i + 1)) for i in range(5)]
    for clock in (plain, fixed):
        clock.forecast(works, 1)
    assert fixed.finish(works, 1).seconds == pytest.approx(plain.finish(works, 1).seconds + 7)
    known = [
        clock.profiles(range(3), [1 / 3] * 3, [[4]] * 3, (100, 10), 8, 2).compute_seconds(
            np.full(3, 4.0)
        )
        for clock in (plain, fixed)
    ]
    assert known[1] == pytest.approx(known[0] + 7)


def test_profiles_count_the_steps_last_reported():
    clock = SimulatedClock("lab", **COST)
    clock.finish([Work(0, 4, 10, steps=33), Work(1, 4, 10), Work(2, 4, 10, steps=float("nan"))], 1)
    again = SimulatedClock("lab", **COST)
    again.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    for one in (clock, again):
        profiles = one.profiles([0, 1, 2, 3], [0.25] * 4, [[4]] * 4, (8, 2), 4, 2)
        assert profiles.steps == [33, 10, 10, 10]
        assert one.forecast([Work(0, 4, 10)], 2) == clock.finish([Work(0, 4, 10, steps=33)], 2)


# ----- simulated: errors, names -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_flops": -1.0}, "base_flops must be finite and ≥ 0, got -1.0"),
        ({"rank_flops": float("nan")}, "rank_flops must be finite"),
        ({"steps": 0}, "steps must be finite and > 0"),
        ({"bandwidth": "best"}, "'optimal' or 'equal', got 'best'"),
        ({"deadline": -1}, "deadline"),
        ({"idle_seconds": -1}, "idle_seconds"),
        ({"bandwidth_hz": 0.0}, "bandwidth_hz must be finite and > 0"),
        ({"change_round": -1}, "change_round must be a whole number"),
        ({"change_round": 2.5}, "change_round"),
        ({"seed": -1}, "seed"),
        ({"change_share": 1.1}, r"change_share must lie in \[0, 1\]"),
        ({"change_factor": 0}, "change_factor"),
        ({"devices": "moon"}, "unknown profile 'moon'"),
        ({"devices": Devices(PROFILES["lab"], *[np.array([])] * 3, ())}, "at least one device"),
    ],
)
def test_bad_options_of_a_simulated_clock(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedClock(**{**COST, **options})


def test_bad_works():
    clock = SimulatedClock("lab", **COST)
    with pytest.raises(ValueError, match="two of client 3"):
        clock.forecast([Work(3, 1, 1), Work(2, 1, 1), Work(3, 1, 1)], 1)
    with pytest.raises(ValueError, match="must be ≥ 0"):
        MeasuredClock().finish([Work(3, 1, -1)], 1)


def test_clocks_by_name(tmp_path):
    assert isinstance(make_clock("measured", smoothing=0.5), MeasuredClock)
    works = works_of(range(3))
    by_name, direct = make_clock("rural", **COST, seed=3), SimulatedClock("rural", **COST, seed=3)
    assert by_name.finish(works, 1) == direct.finish(works, 1)
    assert by_name.summary() == "simulated (rural, 10 MHz, optimal shares)"
    path = tmp_path / "mine.csv"
    path.write_text("snr_db,flops\n10,1e9\n3,2e9\n", encoding="utf-8")
    clock = make_clock(path, profile="phones", **COST, deadline=9, change_round=2)
    assert clock.profile is PROFILES["phones"]
    assert clock.summary() == (
        "simulated (2 devices, 20 MHz, optimal shares, deadline 9 s, channel x 0.1 for 50% "
        "from round 2)"
    )
    with pytest.raises(ValueError, match=r"expected one of measured, lab, .*did you mean 'rural'"):
        make_clock("rual", **COST)


# ----- retiming ---------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", [0.0, 3.0])
def test_a_run_retimed_by_its_own_clock_is_as_it_was(deadline):
    def fresh(name="campus"):
        return SimulatedClock(name, **COST, deadline=deadline)

    clock, rng = fresh(), np.random.default_rng(0)
    records, times = [], []
    for server_round in range(1, 9):
        clients = rng.permutation(12)[: 0 if server_round == 4 else 5].tolist()
        planned = works_of(clients)
        late = clock.forecast(planned, server_round).late
        done = []
        for work in planned:
            lost = rng.random() < 0.2
            steps = None if lost else float(rng.integers(1, 9))
            record = {
                "kind": "client", "round": server_round, "client": work.client, "rank": work.rank,
                "status": "rejected" if lost else "late" if work.client in late else "ok",
                "bytes_planned": work.upload_bytes,
                "bytes_up": 0 if lost else work.upload_bytes + 7,
            }  # fmt: skip
            records.append(record if lost else {**record, "steps": steps})
            size = work.upload_bytes + (0 if lost else 7)
            done.append(replace(work, steps=steps, upload_bytes=size, answered=not lost))
        times.append(clock.finish(done, server_round))
        records.append({"kind": "round", "round": server_round, "clients": len(clients)})
    records = [json.loads(json.dumps(record)) for record in records]
    assert any(time.late for time in times) == bool(deadline)
    again = fresh()
    assert retime(records, again) == times
    assert again.state_dict() == {"steps": {}}  # untouched
    elsewhere = retime(records, fresh("phones"))
    assert len(elsewhere) == 8
    assert sum(time.seconds for time in elsewhere) > sum(time.seconds for time in times)


def test_records_that_cannot_be_retimed():
    clock = SimulatedClock("lab", **COST)
    with pytest.raises(ValueError, match="whole number 'rank'"):
        retime([{"kind": "client", "round": 1, "client": 0}], clock)
