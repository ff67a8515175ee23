"""What is predicted of a buffered run, against playing it event by event."""

import itertools

import numpy as np
import pytest

from strategies.wallclock import Exponential, SimulatedClock, Work
from strategies.wallclock.buffered import _product_form, buffered_time
from strategies.wallclock.events import Events

COST = {"base_flops": 4e10, "rank_flops": 1e9, "steps": 10.0}
BYTES = (50_000, 20_000)


def profiles_of(clock, n, rank=8):
    weights = np.full(n, 1 / n)
    return clock.profiles(range(n), weights, [[rank]] * n, BYTES, rank, 1)


def play(clock, n, busy, buffer, orders, rank=8, power=0.5, seed=3):
    """Seconds a model, staleness, discount, answered share and shares, order by order."""
    rng, models, replies, events = np.random.default_rng(seed), 0, 0, Events(1.0)
    idle, size, begun = set(range(n)), int(BYTES[0] + BYTES[1] * rank), {}
    counts, late, worth, marks, given = np.zeros(n), [], [], [], 0
    while given < orders:
        while len(begun) < min(busy, n):
            free = sorted(idle)
            present = clock.availability.look(free, events.now)
            here = [i for i, there in zip(free, present.here, strict=True) if there]
            if not here:
                if not begun:
                    events.next(present.until.min())
                    continue
                break
            client = here[rng.integers(len(here))]
            idle.remove(client)
            given += 1
            begun[given] = client, models
            compute, upload = clock.order(Work(client, rank, size), given)
            events.start(given, compute, upload, present.until[free.index(client)])
        # Who comes back is given an order at once where fewer than wanted are busy.
        waits = len(begun) < min(busy, n)
        back = clock.availability.look(sorted(idle), events.now).until.min() if waits else np.inf
        event = events.next(back)
        if event is None:
            continue
        client, model = begun.pop(event.key)
        idle.add(client)
        if event.kind == "uploaded":
            counts[client] += 1
            late.append(models - model)
            worth.append((1 + models - model) ** -power)
            replies += 1
            if replies % buffer == 0:
                models += 1
                marks.append(events.now)
    half = len(marks) // 5  # from when it runs evenly
    pace = (marks[-1] - marks[half]) / (len(marks) - 1 - half)
    cut = len(late) // 5
    return pace, np.mean(late[cut:]), np.mean(worth[cut:]), replies / given, counts / counts.sum()


@pytest.mark.parametrize(
    ("n", "busy", "buffer"), [(12, 4, 2), (12, 12, 5), (60, 20, 10), (60, 5, 1), (60, 40, 10)]
)
def test_everybody_there_against_playing_it(n, busy, buffer):
    clock = SimulatedClock("phones", **COST, bandwidth="equal")
    found = buffered_time(profiles_of(clock, n), 8, buffer=buffer, busy=busy, alpha=1, beta=2)
    pace, late, worth, answered, shares = play(clock, n, busy, buffer, 1500)
    assert found.round_seconds == pytest.approx(pace, rel=0.1)
    assert found.staleness == pytest.approx(late, rel=0.12, abs=0.1)
    assert found.discount == pytest.approx(worth, rel=0.08)
    assert found.answered == 1
    assert answered == pytest.approx(1.0, abs=0.03)  # but for those still under way
    assert np.abs(found.shares - shares).sum() < 0.25


@pytest.mark.parametrize(("share", "busy"), [(0.8, 10), (0.5, 8)])
def test_clients_that_come_and_go_against_playing_it(share, busy):
    away = Exponential(rng=np.random.default_rng(0), share=share, seconds=120)
    clock = SimulatedClock("phones", **COST, bandwidth="equal", availability=away)
    found = buffered_time(profiles_of(clock, 50), 8, buffer=5, busy=busy, alpha=1, beta=2)
    pace, late, worth, answered, _ = play(clock, 50, busy, 5, 500)
    assert found.round_seconds == pytest.approx(pace, rel=0.12)
    assert found.answered == pytest.approx(answered, abs=0.05)
    assert found.staleness == pytest.approx(late, rel=0.2, abs=0.1)
    assert found.discount == pytest.approx(worth, rel=0.08)


@pytest.mark.parametrize(("n", "busy"), [(1, 1), (5, 2), (6, 5), (7, 3)])
def test_the_product_form_against_the_balance_of_all_states(n, busy):
    """The stationary law of the chain itself, by linear algebra over all sets of the busy."""
    held = np.random.default_rng(n).lognormal(0, 1.5, n)
    states = list(itertools.combinations(range(n), busy))
    place = {state: i for i, state in enumerate(states)}
    flow = np.zeros((len(states), len(states)))
    for state in states:
        for done in state:
            idle = [i for i in range(n) if i not in state or i == done]
            for chosen in idle:
                after = tuple(sorted({*state, chosen} - ({done} - {chosen})))
                flow[place[state], place[after]] += 1 / held[done] / len(idle)
    balance = flow.T - np.diag(flow.sum(axis=1))
    balance[0] = 1.0
    law = np.linalg.solve(balance, np.eye(len(states))[0])
    chance = [sum(law[place[s]] for s in states if i in s) for i in range(n)]
    assert _product_form(held, busy) == pytest.approx(chance / held)


def test_ten_thousand_clients_stay_in_range():
    held = np.random.default_rng(0).lognormal(0, 2, 10_000)
    rates = _product_form(held, 200)
    assert (rates * held).sum() == pytest.approx(200)
    assert (rates * held <= 1 + 1e-9).all()


def test_an_order_is_a_client_alone_on_the_band():
    clock = SimulatedClock("rural", **COST, bandwidth="equal")
    for number in (1, 2):
        work = Work(3, 8, 500_000, steps=7)
        compute, upload = clock.order(work, number)
        alone = clock.finish([work], number)
        assert compute == alone.compute_seconds[3]
        assert upload == pytest.approx(alone.upload_seconds[3])


def test_out_of_reach_and_bad_arguments():
    profiles = profiles_of(SimulatedClock("lab", **COST), 10)
    assert buffered_time(profiles, 8, buffer=1, busy=1, alpha=1, beta=0.9).total_seconds == np.inf
    assert "out" not in buffered_time(profiles, 8, buffer=5, busy=5, alpha=1, beta=1).summary()
    for wrong in ({"buffer": 0}, {"busy": 0}, {"staleness": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            buffered_time(profiles, 8, **{"buffer": 2, "busy": 2, "alpha": 1, "beta": 1, **wrong})
