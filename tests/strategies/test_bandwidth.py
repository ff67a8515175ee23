import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from strategies.wallclock.bandwidth import (
    allocate_bandwidth,
    batch_round_seconds,
    equal_shares,
    simulate_round_time,
)

# Ten decades of seconds and of bandwidth, and zero.
TIMES = st.one_of(st.just(0.0), st.floats(-5, 5).map(lambda e: 10.0**e))
UPLOADS = st.floats(-5, 5).map(lambda e: 10.0**e)
CLIENTS = st.lists(st.tuples(TIMES, UPLOADS), min_size=1, max_size=12)


def instance(seed, n=6):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 10, n), rng.lognormal(2, 1, n), rng.uniform(1, 20)


@settings(deadline=None)
@given(CLIENTS, UPLOADS)
def test_against_brentq(clients, total):
    tau, t = map(np.array, zip(*clients, strict=True))
    shares, seconds = allocate_bandwidth(tau, t, total)
    start = tau.max()
    # in u = T - max τ, and in its logarithm: the root may be tiny beside τ
    root = brentq(
        lambda e: np.log(np.sum(t / (np.exp(e) + (start - tau))) / total),
        np.log(1e-9 * t.min() / total),
        np.log(2 * t.sum() / total),
        xtol=1e-14,
        rtol=1e-14,
    )
    assert seconds == pytest.approx(start + np.exp(root), rel=1e-9)
    np.testing.assert_allclose(shares, t / (np.exp(root) + (start - tau)), rtol=1e-9)
    assert shares.sum() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_against_a_general_minimax_solver(seed):
    tau, t, total = instance(seed, 4)
    # minimise T over (shares, T) subject to every client finishing by T
    start = np.append(np.full(4, total / 4), (tau + 4 * t / total).max())
    solution = minimize(
        lambda x: x[-1],
        start,
        method="SLSQP",
        bounds=[(1e-6, None)] * 5,
        constraints=[
            {"type": "ineq", "fun": lambda x: x[-1] - tau - t / x[:-1]},
            {"type": "ineq", "fun": lambda x: total - x[:-1].sum()},
        ],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert allocate_bandwidth(tau, t, total)[1] == pytest.approx(solution.fun, rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_shares_are_faster(seed):
    tau, t, total = instance(seed)
    shares, seconds = allocate_bandwidth(tau, t, total)
    finish = tau + t / shares
    np.testing.assert_allclose(finish, seconds, rtol=1e-9)
    rng = np.random.default_rng(seed)
    for size in (1e-3, 0.1, 1.0):
        other = shares * rng.lognormal(0, size, shares.size)
        other *= total / other.sum()
        assert simulate_round_time(tau, t, other)[0] > seconds
    assert equal_shares(tau, t, total)[1] >= seconds


@pytest.mark.parametrize("seed", range(5))
def test_more_work_takes_longer_and_more_bandwidth_less(seed):
    tau, t, total = instance(seed)
    seconds = allocate_bandwidth(tau, t, total)[1]
    assert allocate_bandwidth(tau, t, total * 1.01)[1] < seconds
    for client in range(tau.size):
        more = np.eye(tau.size)[client]
        assert allocate_bandwidth(tau + more, t, total)[1] > seconds
        assert allocate_bandwidth(tau, t + more, total)[1] > seconds
        assert allocate_bandwidth(*np.delete([tau, t], client, 1), total)[1] < seconds


def test_by_hand():
    shares, seconds = allocate_bandwidth([1, 1], [2, 6], 4)  # equal τ: T = τ + Σt/f
    assert seconds == pytest.approx(3)
    assert shares == pytest.approx([1, 3])
    shares, seconds = allocate_bandwidth([3], [8], 2)
    assert (shares.tolist(), seconds) == ([2], pytest.approx(7))
    shares, seconds = allocate_bandwidth([0, 3], [2, 1], 1)  # 2/T + 1/(T-3) = 1: T = 3 + √3
    assert seconds == pytest.approx(3 + 3**0.5)


def test_edges():
    shares, seconds = allocate_bandwidth([], [], 5)
    assert (shares.size, seconds) == (0, 0)
    shares, seconds = allocate_bandwidth([3, 7], [0, 0], 5)
    assert (shares.tolist(), seconds) == ([0, 0], 7)
    # who uploads nothing needs no share, but may be the last
    shares, seconds = allocate_bandwidth([1, 9], [4, 0], 2)
    assert (shares.tolist(), seconds) == ([2, 0], 9)
    shares, seconds = allocate_bandwidth([1, 2], [4, 0], 2)
    assert (shares.tolist(), seconds) == ([2, 0], pytest.approx(3))
    # a tiny wait beside long computing keeps its digits
    shares, _ = allocate_bandwidth([1e6, 0], [1e-9, 1e-9], 1)
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    assert equal_shares([], [], 5)[1] == 0
    assert equal_shares([1, 2], [4, 4], 4) == (pytest.approx([2, 2]), 4)


def test_round_time_of_given_shares():
    tau, t = [1, 5, 2], [4, 0, 6]
    assert simulate_round_time(tau, t, [1, 0, 3]) == (5, 0)
    assert simulate_round_time(tau, t, [2, 0, 1]) == (8, 2)
    assert simulate_round_time(tau, t, [2, 0, 1], [True, True, False]) == (5, 1)
    assert simulate_round_time(tau, t, [0, 0, 1]) == (np.inf, 0)
    assert simulate_round_time(tau, t, [2, 0, 1], [False] * 3) == (0, None)
    assert simulate_round_time([], [], []) == (0, None)


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_batch_agrees_with_one_by_one(density):
    rng = np.random.default_rng(1)
    tau, t, total = rng.uniform(0, 10, 40), rng.lognormal(2, 1, 40), 3.0
    t[:3] = 0
    masks = rng.random((100, 40)) < density
    expected = [allocate_bandwidth(tau[m], t[m], total)[1] if m.any() else 1.5 for m in masks]
    seconds = batch_round_seconds(tau, t / total, masks, idle_seconds=1.5)
    np.testing.assert_allclose(seconds, expected, rtol=1e-12)
    each = rng.uniform(0.5, 2, (100, 40))  # channels of their own for every set
    expected = [
        allocate_bandwidth(tau[m], (t * e)[m], total)[1] if m.any() else 0
        for m, e in zip(masks, each, strict=True)
    ]
    np.testing.assert_allclose(batch_round_seconds(tau, t * each / total, masks), expected)
    assert batch_round_seconds(tau, t, masks[:0]).shape == (0,)
    assert batch_round_seconds(tau, t, np.zeros((2, 40), bool)).tolist() == [0, 0]


@pytest.mark.parametrize("function", [allocate_bandwidth, equal_shares])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, np.nan], [1, 1], 1), "compute_seconds .*nan for client 1"),
        (([1, 1], [np.inf, 1], 1), "upload_seconds_at_unit_bandwidth .*inf for client 0"),
        (([1, -1], [1, 1], 1), "compute_seconds .*-1.0 for client 1"),
        (([1, 1], [1, 1], 0), "total_bandwidth must be finite and > 0, got 0"),
        (([1, 1], [1, 1], np.nan), "total_bandwidth"),
        (([1, 1], [1], 1), "equally long"),
        (([[1, 1]], [[1, 1]], 1), "equally long"),
    ],
)
def test_errors(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("shares", "participants"), [([1.0], None), ([1, 1], [True]), ([1, 1], [0, 1])]
)
def test_round_time_errors(shares, participants):
    with pytest.raises(ValueError, match="expected 2 shares"):
        simulate_round_time([1, 1], [1, 1], shares, participants)
    with pytest.raises(ValueError, match="shares must be finite and ≥ 0"):
        simulate_round_time([1, 1], [1, 1], [1, -1])
