"""What a plan promises, against enumeration and against draws that its search has not seen."""

import numpy as np
import pytest

from strategies.wallclock.bandwidth import batch_round_seconds
from strategies.wallclock.expectation import Expectation
from strategies.wallclock.objective import Objective
from strategies.wallclock.planner import plan
from tests.strategies.test_planner import make_profiles, slack_beta


def mean_of_fresh_sets(profiles, found, sets, seed=99):
    """Round time over plain draws of the participants."""
    tau, upload = profiles.compute_seconds(found.k * 1.0), profiles.upload_seconds(found.k * 1.0)
    rng, mean = np.random.default_rng(seed), []
    for _ in range(sets // 250):
        masks = rng.random((250, len(profiles))) < found.q
        mean.append(batch_round_seconds(tau, upload, masks).mean())
    return np.mean(mean)


@pytest.mark.parametrize(
    ("n", "bandwidth", "factor"), [(200, 1e7, 3), (1000, 1e7, 4), (700, 1e6, 2), (1000, 1e9, 4)]
)
def test_the_promise_holds_on_other_sets(n, bandwidth, factor):
    """Also where a client that computes for long joins in one round of a hundred."""
    profiles = make_profiles(n, 6, bandwidth_hz=bandwidth)
    beta = slack_beta(profiles, factor)
    found = plan(profiles, 5.0, beta, rng=np.random.default_rng(0))
    mean = mean_of_fresh_sets(profiles, found, 4000)
    assert found.round_seconds == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
@pytest.mark.parametrize("bandwidth", [1e6, 1e9])
def test_the_expectation_against_enumeration(n, bandwidth):
    profiles = make_profiles(n, n, bandwidth_hz=bandwidth)
    exact = Objective(profiles, 5.0, 9.0, None, 0.3, None, np.random.default_rng(0))
    sampled = Expectation(n, 0.3)
    for seed in range(4):
        q = np.random.default_rng(seed).uniform(0.01, 1, n)
        if seed == 3:
            q[::2] = 1.0
        choice = exact.variance.argmin(axis=1)
        tau, upload = exact.at(exact.tau, choice), exact.at(exact.upload, choice)
        expected = exact.round_seconds(q, choice)
        assert sampled.seconds(tau, upload, q) == pytest.approx(expected, rel=5e-3)
