import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, minimize

from strategies.wallclock.objective import Objective
from strategies.wallclock.planner import (
    ClientProfiles,
    plan,
    statistical_q,
    uniform_q,
    weighted_q,
)
from strategies.wallclock.search import marginal_seconds
from strategies.wallclock.waterfill import water_fill


def make_profiles(n, seed, ranks=(2, 8, 32), bandwidth_hz=1e6):
    """Random clients; from radio-bound (1e6 Hz) to compute-bound (1e9 Hz)."""
    rng = np.random.default_rng(seed)
    return ClientProfiles(
        weights=rng.dirichlet(np.ones(n)),
        base_seconds=rng.lognormal(-2, 1, n),
        rank_seconds=rng.lognormal(-4, 1, n),
        steps=10,
        bits_per_rank=4e5,
        constant_bits=2e5,
        spectral_efficiency=rng.uniform(0.2, 7, n),
        bandwidth_hz=bandwidth_hz,
        ranks=ranks,
        max_ranks=rng.choice(ranks[1:] or ranks, n),
    )


def slack_beta(profiles, factor):
    """Return β as a multiple of the least variance there is, at full participation."""
    k = np.minimum(np.max(profiles.ranks), profiles.max_ranks)
    return factor * float((np.square(profiles.weights) * np.max(profiles.ranks) / k).sum())


class Oracle:
    """The objective written down a second time: root finder, itertools, no numpy tricks."""

    def __init__(self, profiles, alpha, beta):
        self.p, self.alpha, self.beta = profiles, alpha, beta
        self.n = len(profiles.weights)
        self.subsets = list(itertools.product([0, 1], repeat=self.n))
        self.tables = {}

    def choices(self):
        allowed = [[k for k in self.p.ranks if k <= top] for top in self.p.max_ranks]
        return itertools.product(*allowed)

    def times(self, k):
        """Round time of every subset."""
        if k not in self.tables:
            p, r = self.p, np.array(k)
            tau = p.steps * (p.base_seconds + p.rank_seconds * r)
            t = (p.constant_bits + p.bits_per_rank * r) / p.spectral_efficiency
            self.tables[k] = np.array(
                [self.one(tau[np.array(s) == 1], t[np.array(s) == 1]) for s in self.subsets]
            )
        return self.tables[k]

    def one(self, tau, t):
        if tau.size == 0:
            return 0.0
        bound = t.sum() / self.p.bandwidth_hz
        excess = lambda x: np.sum(t / (x + tau.max() - tau)) - self.p.bandwidth_hz  # noqa: E731
        return tau.max() + brentq(excess, bound * 1e-6, bound * (1 + 1e-9), rtol=1e-12)

    def total(self, q, k):
        """Vectorised over rows of q, shape (points, n)."""
        q = np.atleast_2d(q)
        seconds = np.zeros(len(q))
        for subset, time_of_set in zip(self.subsets, self.times(k), strict=True):
            chance = np.ones(len(q))
            for i, joins in enumerate(subset):
                chance = chance * (q[:, i] if joins else 1 - q[:, i])
            seconds += chance * time_of_set
        phi = max(self.p.ranks) / np.array(k)
        bracket = self.beta - (np.square(self.p.weights) * phi / q).sum(axis=1)
        with np.errstate(divide="ignore"):
            return np.where(bracket > 0, seconds * self.alpha / bracket, np.inf)


CASES = [
    (n, seed, bandwidth, factor)
    for n in (2, 3, 4)
    for seed, (bandwidth, factor) in enumerate(
        itertools.product((1e6, 1e7, 1e9), (1.3, 4)), start=n
    )
]


@pytest.mark.parametrize(("n", "seed", "bandwidth", "factor"), CASES)
def test_within_one_percent_of_brute_force(n, seed, bandwidth, factor):
    profiles = make_profiles(n, seed, bandwidth_hz=bandwidth)
    beta = slack_beta(profiles, factor)
    found = plan(profiles, 5.0, beta, rng=np.random.default_rng(0))
    oracle = Oracle(profiles, 5.0, beta)
    axis = np.geomspace(0.01, 1, {2: 300, 3: 50, 4: 18}[n])
    grid = np.array(list(itertools.product(axis, repeat=n)))
    best = min(oracle.total(grid, k).min() for k in oracle.choices())
    assert found.exact
    assert found.total_seconds <= 1.01 * best
    # and it is what it says it is
    assert found.total_seconds == pytest.approx(oracle.total(found.q, tuple(found.k))[0], rel=1e-9)
    assert found.total_seconds == pytest.approx(found.round_seconds * found.rounds)
    assert (found.k <= profiles.max_ranks).all()
    assert found.q.min() >= 0.01
    assert found.q.max() <= 1


@pytest.mark.parametrize(("n", "seed", "bandwidth", "factor"), CASES[6:12])
def test_never_worse_than_slsqp(n, seed, bandwidth, factor):
    profiles = make_profiles(n, seed, ranks=(4, 16), bandwidth_hz=bandwidth)
    profiles = replace(profiles, max_ranks=np.full(n, 16))
    beta = slack_beta(profiles, factor)
    found = plan(profiles, 5.0, beta, rng=np.random.default_rng(0))
    oracle = Oracle(profiles, 5.0, beta)
    rng = np.random.default_rng(1)
    best = np.inf
    for k in oracle.choices():
        for start in [np.zeros(n), *rng.uniform(np.log(0.05), 0, (4, n))]:
            if np.isfinite(oracle.total(np.exp(start), k)[0]):
                result = minimize(
                    lambda x, k=k: min(np.log(oracle.total(np.exp(x), k)[0]), 1e3),
                    start,
                    method="SLSQP",
                    bounds=[(np.log(0.01), 0)] * n,
                    options={"ftol": 1e-12},
                )
                best = min(best, oracle.total(np.exp(np.clip(result.x, None, 0)), k)[0])
    assert found.total_seconds <= best * (1 + 1e-6)


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("factor", [1.2, 5])
def test_never_worse_than_its_alternatives(n, factor):
    profiles = make_profiles(n, 3)
    found = plan(profiles, 5.0, slack_beta(profiles, factor), rng=np.random.default_rng(0))
    assert set(found.alternatives) == {"full", "uniform", "weighted", "closed form"}
    assert found.total_seconds <= min(found.alternatives.values())
    for name in found.alternatives:
        assert name in found.summary()


@pytest.mark.parametrize("bandwidth", [1e6, 3e7])
def test_sampled_sets_find_what_exact_ones_find(bandwidth):
    profiles = make_profiles(9, 5, bandwidth_hz=bandwidth)
    beta = slack_beta(profiles, 3)
    exact = plan(profiles, 5.0, beta, rng=np.random.default_rng(0))
    sampled = plan(profiles, 5.0, beta, rng=np.random.default_rng(0), sets=2000)
    assert (exact.exact, sampled.exact) == (True, False)
    judge = Objective(profiles, 5.0, beta, None, 0.0, None, np.random.default_rng(0))
    choice = (judge.options < sampled.k[:, None]).sum(axis=1)
    assert judge.total(sampled.q, choice) <= 1.02 * exact.total_seconds
    assert sampled.total_seconds == pytest.approx(judge.total(sampled.q, choice), rel=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [12, 30])
def test_lines_of_their_own_are_the_limit_of_a_wide_band(n):
    totals = []
    for bandwidth in (1e10, 1e12, 1e15, 1e20):
        profiles = make_profiles(n, 1, bandwidth_hz=bandwidth)
        beta = slack_beta(profiles, 3)
        found = plan(profiles, 5.0, beta, rng=np.random.default_rng(0))
        assert found.total_seconds < 0.97 * min(found.alternatives.values())
        totals.append(found.total_seconds)
    assert totals == pytest.approx([totals[0]] * 4, rel=0.01)


def test_marginal_costs_against_enumeration():
    profiles = make_profiles(7, 2)
    rng = np.random.default_rng(0)
    sampled = Objective(profiles, 1.0, 1.0, None, 0.0, 4000, rng)
    exact = Objective(profiles, 1.0, 1.0, None, 0.0, None, rng)
    q, choice = rng.uniform(0.1, 1, 7), np.zeros(7, int)
    estimate = marginal_seconds(sampled, q, choice)
    for client, option in itertools.product(range(7), range(3)):
        on, off, moved = q.copy(), q.copy(), choice.copy()
        on[client], off[client], moved[client] = 1, 0, option
        cost = exact.round_seconds(on, moved) - exact.round_seconds(off, choice)
        assert estimate[client, option] == pytest.approx(cost, rel=0.05)


def test_one_client_always_takes_part():
    profiles = make_profiles(1, 0, ranks=(8,))
    found = plan(profiles, 5.0, 4.0, rng=np.random.default_rng(0))
    # E[T] R = q T α / (β − 1/q): least at q = 2/β
    assert found.q[0] == pytest.approx(0.5)
    idle = plan(profiles, 5.0, 4.0, rng=np.random.default_rng(0), idle_seconds=1e6)
    assert idle.q[0] == 1
    for n in (4, 30):
        beta = slack_beta(make_profiles(n, 0), 5)
        plans = [
            plan(make_profiles(n, 0), 5.0, beta, rng=np.random.default_rng(0), idle_seconds=idle)
            for idle in (0.0, 1e5)
        ]
        # nobody coming is expensive now: it must be rare
        empty = [np.prod(1 - p.q) for p in plans]
        assert empty[1] < 1e-3 < empty[0] or empty[1] <= empty[0] < 1e-3


def test_identical_radio_bound_clients_are_treated_alike():
    profiles = replace(
        make_profiles(6, 0, ranks=(8,)),
        weights=np.full(6, 1 / 6),
        base_seconds=0,
        rank_seconds=0,
        spectral_efficiency=1.0,
    )
    found = plan(profiles, 5.0, 0.5, rng=np.random.default_rng(0))
    # sums of times are exact here: q* = (2/β) √K0 a √(φ/T) = (2/β) Σ(a²) n a / n
    np.testing.assert_allclose(found.q, 2 / 0.5 / 6, rtol=1e-3)


def test_phi_one_means_the_smallest_rank_is_enough():
    found = plan(make_profiles(5, 1), 5.0, 2.0, rng=np.random.default_rng(0), phi=np.ones_like)
    assert (found.k == 2).all()
    with pytest.raises(ValueError, match="phi must return"):
        plan(make_profiles(5, 1), 5.0, 2.0, rng=np.random.default_rng(0), phi=lambda k: k[0])


def test_seeded_and_warm_start():
    profiles = make_profiles(60, 4)
    beta = slack_beta(profiles, 3)
    first, second = (plan(profiles, 5.0, beta, rng=np.random.default_rng(9)) for _ in range(2))
    np.testing.assert_array_equal(first.q, second.q)
    np.testing.assert_array_equal(first.k, second.k)
    again = plan(profiles, 5.0, beta, rng=np.random.default_rng(9), warm_start=first)
    assert again.total_seconds <= first.total_seconds
    with pytest.raises(ValueError, match="warm_start is for 60 clients, not 5"):
        plan(make_profiles(5, 1), 5.0, 9.0, rng=np.random.default_rng(0), warm_start=first)


def test_a_thousand_clients_take_well_under_a_second():
    profiles = make_profiles(1000, 0, ranks=(2, 4, 8, 16, 32), bandwidth_hz=1e7)
    beta = slack_beta(profiles, 3)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        found = plan(profiles, 5.0, beta, rng=np.random.default_rng(0))
        seconds.append(time.process_time() - start)
    assert found.total_seconds < 0.95 * min(found.alternatives.values())
    assert min(seconds) < 2  # about 0.4 on an idle core; room for a busy one


def test_only_an_odd_mix_of_ranks_reaches_the_target():
    """A phi that is not monotone: each client has one good rank, and not the same."""
    profiles = replace(make_profiles(12, 0), weights=np.full(12, 1 / 12), max_ranks=None)
    good = np.arange(12) % 3

    def phi(k):
        return np.where(np.arange(3) == good[:, None], 1.0, 50.0)

    found = plan(profiles, 5.0, 1.05 / 12, rng=np.random.default_rng(0), phi=phi)
    np.testing.assert_array_equal(found.k, np.array(profiles.ranks)[good])
    assert found.rounds > 0


def test_clients_without_data_and_a_floor():
    weights = np.array([0.0, 0.5, 0.5])
    profiles = replace(make_profiles(3, 0), weights=weights)
    found = plan(profiles, 5.0, 9.0, rng=np.random.default_rng(0), q_min=0.05)
    assert found.q[0] == 0.05
    everyone = plan(profiles, 5.0, 9.0, rng=np.random.default_rng(0), q_min=1.0)
    assert everyone.q.tolist() == [1, 1, 1]


def test_lists_of_ranks_per_client():
    nested = replace(make_profiles(3, 0), ranks=[[4], [2, 8], [8, 16, 64]], max_ranks=None)
    assert nested.options().tolist() == [[4, 4, 4], [2, 8, 8], [8, 16, 64]]
    assert nested.phi(np.array([4.0, 8.0])).tolist() == [16, 8]
    assert replace(nested, full_rank=128).phi(np.array([4.0])).tolist() == [32]
    found = plan(nested, 5.0, 99.0, rng=np.random.default_rng(0))
    assert found.k[0] == 4
    assert found.k[1] in (2, 8)


def test_out_of_reach():
    profiles = make_profiles(4, 0)
    with pytest.raises(ValueError, match=r"out of reach.*is not below beta"):
        plan(profiles, 5.0, slack_beta(profiles, 0.999), rng=np.random.default_rng(0))
    tight = plan(profiles, 5.0, slack_beta(profiles, 1.001), rng=np.random.default_rng(0))
    assert np.isfinite(tight.total_seconds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [0.5, 0.5, 0.5]}, "weights must have sum 1"),
        ({"weights": []}, "weights must be a list"),
        ({"weights": [0.5, 0.6, -0.1]}, "weights must be finite .* for client 2"),
        ({"base_seconds": [1, 2]}, "base_seconds must be one number or 3"),
        ({"rank_seconds": [1, np.nan, 1]}, "rank_seconds must be finite .* client 1"),
        ({"spectral_efficiency": [1, 0, 1]}, "spectral_efficiency must be > 0.* client 1"),
        ({"bandwidth_hz": 0}, "bandwidth_hz"),
        ({"bits_per_rank": 0, "constant_bits": 0}, "must upload something"),
        ({"max_ranks": [8, 1, 8]}, "client 1 can hold no rank: it is limited to 1"),
        ({"ranks": [[1], [2]]}, "3 lists for 3 clients, got 2"),
        ({"ranks": [0, 2]}, "ranks must be whole numbers ≥ 1"),
        ({"ranks": []}, "ranks must be whole numbers ≥ 1"),
        ({"ranks": [1.5, 2]}, "ranks must be whole numbers ≥ 1"),
        ({"full_rank": 4}, "full_rank must be at least the largest rank 32"),
    ],
)
def test_bad_profiles(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make_profiles(3, 0), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 0},
        {"beta": np.nan},
        {"q_min": 0},
        {"q_min": 1.1},
        {"idle_seconds": -1},
        {"sets": 0},
    ],
)
def test_bad_arguments(changes):
    arguments = {"alpha": 1.0, "beta": 99.0, "rng": np.random.default_rng(0), **changes}
    with pytest.raises(ValueError, match=next(iter(changes))):
        plan(make_profiles(3, 0), **arguments)


def test_baselines_by_hand():
    np.testing.assert_allclose(uniform_q(4, 1), 0.25)
    np.testing.assert_allclose(weighted_q([1, 1, 2], 2), [0.5, 0.5, 1])
    np.testing.assert_allclose(weighted_q([1, 3, 16], 2), [0.25, 0.75, 1])
    np.testing.assert_allclose(weighted_q([0, 1], 1.0), [0, 1])
    np.testing.assert_allclose(statistical_q([0.5, 0.5], [3, 1], 1), [0.75, 0.25])
    np.testing.assert_allclose(statistical_q([0.5, 0.5], [1, 0], 1, q_min=0.1), [0.9, 0.1])
    np.testing.assert_allclose(statistical_q([1e-300, 3e-300], [1e300, 1e300], 1), [0.25, 0.75])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_q(3, 0), r"must lie in \(0, 3\]"),
        (lambda: uniform_q(3, 3.1), r"must lie in \(0, 3\]"),
        (lambda: weighted_q([1, -1], 1), "a .*≥ 0"),
        (lambda: weighted_q([1, np.inf], 1), "finite"),
        (lambda: weighted_q([1, 1, 1], 0.2, q_min=0.1), r"must lie in \(0.3, 3\]"),
        (lambda: statistical_q([1, 1], [1], 1), "one shape"),
        (lambda: statistical_q([1, 1], [1, -2], 1), "gradient_norms"),
    ],
)
def test_baseline_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(
    arrays(float, st.integers(1, 30), elements=st.floats(0, 1e9)),
    st.floats(0.01, 1),
    st.floats(0, 0.3),
)
def test_water_filling(weights, fill, low):
    n = len(weights)
    total = n * (low + fill * (1 - low))
    x = water_fill(weights, total, np.full(n, low), np.ones(n))
    assert x.sum() == pytest.approx(total)
    assert x.min() >= low
    assert x.max() <= 1
    weights = weights / max(weights.max(), 5e-324)  # or the level of tiny ones overflows here
    free = (x > low + 1e-9) & (x < 1 - 1e-9) & (weights > 1e-6)
    if free.any():
        level = x[free] / weights[free]
        assert np.ptp(level) <= 1e-6 * level.max()
        # the limited ones would only go further
        assert (weights[x >= 1 - 1e-9] * level.max() >= 1 - 1e-6).all()
        assert (weights[x <= low + 1e-9] * level.min() <= low + 1e-6).all()
