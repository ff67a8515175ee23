"""What transfers say of fixed seconds and of seconds a byte, against links that are known."""

import json

import numpy as np
import pytest
from scipy.optimize import linprog

from strategies.wallclock.transfers import Transfers

MBIT = 1e6 / 8


def observed(rng, rates, sizes, *, fixed=1.2, rounds=12, outliers=0.0, smoothing=0.1):
    """Return transfers over links of these rates (bytes a second), with pauses of 0 to 1 s."""
    transfers = Transfers(smoothing)
    for _ in range(rounds):
        for client, rate in enumerate(rates):
            size = rng.choice(sizes)
            seconds = fixed - 0.5 + rng.uniform(0, 1) + size / rate
            if rng.uniform() < outliers:
                seconds += rng.uniform(10, 60)
            transfers.add(client, size, seconds)
    return transfers


@pytest.mark.parametrize("outliers", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_links_from_half_a_megabit_to_twenty(seed, outliers):
    rng = np.random.default_rng(seed)
    rates = np.array([0.5, 1, 2, 5, 10, 20]) * MBIT
    # As a rank of 4 to 64 makes them: a transfer over the fastest takes up to four seconds.
    fit = observed(rng, rates, np.array([4, 8, 16, 32, 64]) * 150e3, outliers=outliers).fit()
    assert fit.fixed.value == pytest.approx(1.2, abs=0.3)
    assert fit.fixed.low <= fit.fixed.value <= fit.fixed.high
    for client, rate in enumerate(rates):
        estimate = fit.byte_seconds[client]
        assert estimate.value == pytest.approx(1 / rate, rel=0.15)
        assert estimate.low < estimate.value < estimate.high


def test_intervals_hold_about_as_often_as_they_say():
    rates, held = np.array([1, 2, 4, 8]) * MBIT, []
    for seed in range(60):
        transfers = observed(np.random.default_rng(seed), rates, [2e5, 1e6, 3e6], rounds=14)
        fit = transfers.fit()
        held += [e.low <= 1 / rates[i] <= e.high for i, e in fit.byte_seconds.items()]
        held.append(fit.fixed.low <= 1.2 <= fit.fixed.high)
    assert 0.8 <= np.mean(held) <= 1.0


def test_the_fit_is_the_best_there_is():
    """Least absolute deviations are a linear program, which another package solves."""
    rng = np.random.default_rng(5)
    for _ in range(5):
        clients, n = 3, 6
        x, y = rng.uniform(1, 10, (clients, n)), rng.uniform(0.5, 30, (clients, n))
        transfers = Transfers(0.2)
        for client in range(clients):
            for size, seconds in zip(x[client], y[client], strict=True):
                transfers.add(client, size, seconds)
        w = 0.8 ** np.arange(n)[::-1]
        cost, rows, right = [np.zeros(1 + clients)], [], []
        for client in range(clients):
            for i in range(n):
                k = client * n + i
                row = np.zeros(1 + clients + clients * n)
                row[[0, 1 + client]] = 1, x[client, i]
                for sign in (1, -1):  # |y − f − s x| ≤ e
                    line = sign * row
                    line[1 + clients + k] = -1
                    rows.append(line)
                    right.append(sign * y[client, i])
                cost.append([w[i]])
        best = linprog(np.concatenate(cost), A_ub=rows, b_ub=right).fun
        fit = transfers.fit()
        slopes = [fit.byte_seconds[client].value for client in range(clients)]
        lost = (w * np.abs(y - fit.fixed.value - np.array(slopes)[:, None] * x)).sum()
        assert best - 1e-9 <= lost <= best * 1.02


def test_bytes_that_never_differ_leave_both_open_and_say_so():
    transfers = Transfers(0.3)
    for _ in range(6):
        transfers.add(0, 1e6, 5.0)
        transfers.add(1, 1e6, 3.0)
    fit = transfers.fit()
    assert fit.fixed.value == 0
    assert fit.fixed.high >= 2.5
    assert fit.byte_seconds[0].high >= 5e-6
    assert fit.byte_seconds[0].low <= 2.5e-6
    # answers without content fill the gap
    transfers.add_empty([1.0, 1.0, 1.2, 9.0])
    assert transfers.fit().fixed.value == pytest.approx(1.0, abs=0.1)
    assert transfers.fit().byte_seconds[1].value == pytest.approx(2e-6, rel=0.1)


def test_a_link_that_falls_to_a_tenth_is_followed_after_two_rounds_and_one_late_reply_is_not():
    transfers = Transfers(0.3)
    for size in (1e6, 2e6, 3e6, 1e6, 2e6, 3e6):
        transfers.add(0, size, 1.0 + size * 1e-6)
    before = transfers.fit().byte_seconds[0].value
    transfers.add(0, 2e6, 1.0 + 2e6 * 1e-5)
    assert transfers.fit().byte_seconds[0].value == pytest.approx(before, rel=0.05)
    transfers.add(0, 3e6, 1.0 + 3e6 * 1e-5)
    assert transfers.fit().byte_seconds[0].value == pytest.approx(1e-5, rel=0.2)


@pytest.mark.parametrize("seed", [198, 332, 957, *range(5)])  # in the first three it is so
def test_forgetting_one_client_s_past_can_show_that_another_s_link_has_changed(seed):
    rng, transfers, sizes = np.random.default_rng(seed), Transfers(0.2), [2e5, 1e6, 3e6]
    for client in range(rng.integers(2, 5)):
        for _ in range(rng.integers(3, 7)):
            transfers.add(client, float(rng.choice(sizes)), float(rng.uniform(1, 4)))
        factor = rng.choice([1, 1, 4, 8])
        for _ in range(2):
            transfers.add(client, float(rng.choice(sizes)), float(factor * rng.uniform(1, 4)))
    fit = transfers.fit()
    again = Transfers(0.2)  # a run that goes on from here has to find the same
    again.load_state_dict(json.loads(json.dumps(transfers.state_dict())))
    assert again.fit() == fit


@pytest.mark.parametrize("factor", [10, 0.1])
@pytest.mark.parametrize("smoothing", [0.1, 0.2, 0.3])
def test_a_link_that_changes_is_followed_after_two_replies_and_one_moves_nothing(smoothing, factor):
    rng = np.random.default_rng(1)
    sizes, rates = np.array([1, 2, 4]) * 1e6, np.array([2, 4]) * MBIT
    transfers = observed(rng, rates, sizes, smoothing=smoothing, rounds=16)
    before = transfers.fit().byte_seconds[0].value
    assert before == pytest.approx(1 / rates[0], rel=0.15)
    for count, size in enumerate((2e6, 4e6, 1e6), 1):
        transfers.add(0, size, 1.2 + factor * size / rates[0])
        expected = before if count == 1 else factor / rates[0]
        assert transfers.fit().byte_seconds[0].value == pytest.approx(expected, rel=0.2)
    if smoothing < 0.3:  # there two outweigh all before them anyway
        assert len(transfers.state_dict()["seen"]["0"]) == 3  # what was before is gone
    assert len(transfers.state_dict()["seen"]["1"]) == 16


def test_a_thousand_clients_and_a_state_that_lasts():
    rng = np.random.default_rng(0)
    transfers = observed(rng, rng.uniform(1, 20, 1000) * MBIT, [1e5, 1e6], rounds=3)
    again = Transfers(0.1)
    again.load_state_dict(json.loads(json.dumps(transfers.state_dict())))
    assert again.fit() == transfers.fit()
    assert Transfers(0.3).fit().byte_seconds == {}
