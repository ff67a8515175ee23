"""Which way ends soonest: the choice is the least of what each promises, and makes sense."""

import numpy as np
import pytest

from strategies.wallclock import Conditions, buffered_time, choose_way, plan
from strategies.wallclock.objective import ClientProfiles


def profiles_of(n=30, slow=0, factor=50.0, **changes):
    base = np.full(n, 0.1)
    base[:slow] *= factor
    given = {
        "weights": np.full(n, 1 / n), "base_seconds": base, "rank_seconds": 0.0, "steps": 10,
        "bits_per_rank": 0.0, "constant_bits": 1e5, "spectral_efficiency": 2.0,
        "bandwidth_hz": 1e6, "ranks": [8],
    }  # fmt: skip
    return ClientProfiles(**{**given, **changes})


def choose(profiles, **options):
    rng = np.random.default_rng(0)
    return choose_way(profiles, 1.0, 1.0, rng=rng, phi=np.ones_like, q_min=0.05, **options)


def test_it_is_the_least_of_what_each_promises():
    profiles = profiles_of(slow=3)
    chosen = choose(profiles, deadlines=[40.0, 60.0], buffers=[(5, 10), (10, 10)])
    args = {"rng": np.random.default_rng(0), "phi": np.ones_like, "q_min": 0.05}
    known = {"synchronous": plan(profiles, 1.0, 1.0, **args).total_seconds}
    known["buffered"] = min(
        buffered_time(profiles, 8, buffer=k, busy=10, alpha=1, beta=1, phi=np.ones_like)
        .total_seconds
        for k in (5, 10)
    )  # fmt: skip
    for name, seconds in known.items():
        assert chosen.alternatives[name] == pytest.approx(seconds, rel=1e-6)
    assert chosen.total_seconds == min(chosen.alternatives.values())
    assert chosen.alternatives[chosen.way] == chosen.total_seconds
    assert chosen.way in chosen.summary()
    assert (chosen.deadline > 0) == (chosen.way == "deadline")
    assert (chosen.buffered is not None) == (chosen.way == "buffered")


def test_where_late_replies_count_little_rounds_stay():
    chosen = choose(profiles_of(), deadlines=[], staleness=4.0)
    assert chosen.way == "synchronous"
    assert chosen.alternatives["buffered"] >= chosen.total_seconds


def test_slow_clients_whose_data_count_are_not_waited_for():
    """A tenth that need fifty times as long, with a least probability that brings them in often."""
    profiles = profiles_of(slow=3)
    chosen = choose_way(
        profiles, 1.0, 1.0, rng=np.random.default_rng(0), phi=np.ones_like, q_min=0.5, deadlines=[]
    )
    assert chosen.way == "buffered"
    assert chosen.total_seconds < 0.5 * chosen.alternatives["synchronous"]


def test_a_deadline_that_writes_somebody_off_is_not_considered():
    profiles = profiles_of(slow=3)
    assert "deadline" not in choose(profiles, deadlines=[5.0], buffers=[]).alternatives
    met = choose(profiles, deadlines=[60.0], buffers=[])
    assert np.isfinite(met.alternatives["deadline"])


def test_who_comes_and_goes_is_counted_in_every_way():
    usual = choose(profiles_of())
    there = Conditions(there=0.5, left=lambda chances: -2.0 * np.log(chances))
    away = choose(profiles_of(conditions=there))
    for name in ("synchronous", "buffered"):
        assert away.alternatives[name] > 1.02 * usual.alternatives[name]
