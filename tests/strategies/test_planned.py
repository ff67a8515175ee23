"""The planned sampler in a made-up world whose rounds to a loss are α / (β − s) by construction."""

import json
from dataclasses import replace

import numpy as np
import pytest

from strategies.clients import Client
from strategies.sampling import Outlook, PlannedSampling
from strategies.sampling.refining import Refining
from strategies.wallclock.bandwidth import allocate_bandwidth
from strategies.wallclock.clock import Clock, RoundTime, Work
from strategies.wallclock.measured import MeasuredClock
from strategies.wallclock.objective import ClientProfiles

BETA = 0.6
ROUNDS = 6  # of a pilot
PILOTS = {"pilot_rounds": ROUNDS, "pilot_fractions": (0.5, 0.2)}


class FakeClock(Clock):
    """Knows everybody's speed exactly; half of the channels change at a given round."""

    def __init__(self, n, change=10**9, seed=0):
        rng = np.random.default_rng(seed)
        self.efficiency = rng.uniform(0.2, 6, n)
        self.base = rng.lognormal(-2, 1, n)
        self.change = change
        self.asked = []

    def channel(self, server_round):
        return self.efficiency if server_round < self.change else self.efficiency[::-1]

    def profiles(self, clients, weights, ranks, upload_bytes, full_rank, server_round):
        self.asked.append(server_round)
        i = list(clients)
        fixed, per_rank = upload_bytes
        return ClientProfiles(
            weights=weights,
            base_seconds=self.base[i],
            rank_seconds=0.02,
            steps=10,
            bits_per_rank=8 * per_rank,
            constant_bits=8 * fixed,
            spectral_efficiency=self.channel(server_round)[i],
            bandwidth_hz=1e6,
            ranks=ranks,
            full_rank=full_rank,
        )

    def forecast(self, works, server_round):
        return RoundTime(0.0)

    finish = forecast


class World:
    """Clients whose model gets ``β − Σ a² φ / q`` further in every round."""

    def __init__(self, n=20, *, beta=BETA, change=10**9, sketches=False, loss_at_start=True):
        self.clock = FakeClock(n, change)
        self.counts = 20 + (np.arange(n) * 37) % 29
        self.present = list(range(n))
        self.given = [16] * n
        self.beta, self.sketches, self.loss_at_start = beta, sketches, loss_at_start
        self.progress, self.aside = 0.0, None

    def outlook(self, server_round):
        everyone = [Client(100 + i, i) for i in self.present]
        a = self.counts[self.present] / self.counts[self.present].sum()
        ranks = [self.given[i] for i in self.present]
        return Outlook(
            server_round, everyone, a, ranks, self.clock, (2e4, 5e4), self.sketches, 16
        )  # fmt: skip

    def loss(self):
        return 2 * np.exp(-0.3 * self.progress)

    def play(self, sampler, rounds, *, losses=True):
        """Run some rounds and return all that the sampler said."""
        trace = []
        for server_round in rounds:
            if losses and server_round == 1 and self.loss_at_start:
                sampler.learn_loss(0, self.loss())
            trace.append(self.round(sampler, server_round, losses))
        return trace

    def round(self, sampler, server_round, losses):
        restart = sampler.restart(server_round)
        if restart == "start":
            self.aside, self.progress = self.progress, 0.0
        elif restart == "back":
            self.progress = self.aside
        view = self.outlook(server_round)
        began = self.loss()
        sampler.prepare(view)
        q = sampler.probabilities(view.clients)
        k = np.array(sampler.ranks(view.clients, view.ranks))
        chosen = sampler.sample(view.clients, server_round, np.random.default_rng(server_round))
        phi = 16 / k if self.sketches else 1.0
        self.progress += self.beta - float((view.weights**2 * phi / q).sum())
        if losses:
            sampler.learn_loss(server_round, self.loss() if self.loss_at_start else began)
        return {
            "round": server_round,
            "restart": restart,
            "chosen": [client.index for client in chosen],
            "q": q.tolist(),
            "k": k.tolist(),
            "planned": sampler.planned_seconds,
            "told": told(sampler),
        }


def told(sampler):
    found = []
    while (record := sampler.record()) is not None:
        json.dumps(record, allow_nan=False)
        found.append({**record, "planner_seconds": 0})
    return found


def span(first, last):
    return range(first, last + 1)


def kinds(trace):
    return [(t["round"], record["kind"]) for t in trace for record in t["told"]]


# ----- the life of a run ----------------------------------------------------------------------


@pytest.mark.parametrize("loss_at_start", [True, False])
def test_pilots_recover_beta_then_a_plan(loss_at_start):
    world = World(loss_at_start=loss_at_start)
    sampler = PlannedSampling(**PILOTS)
    assert sampler.wants_loss
    trace = world.play(sampler, span(1, 2 * ROUNDS + 3))
    assert not sampler.wants_loss
    for t in trace[:ROUNDS]:
        assert set(t["q"]) == {0.5}
        assert t["planned"] is None
    for t in trace[ROUNDS : 2 * ROUNDS]:
        assert set(t["q"]) == {0.2}
    assert [t["round"] for t in trace if t["restart"] == "start"] == [ROUNDS + 1]
    # The first pilot, with less variance, got further.
    assert [t["round"] for t in trace if t["restart"] == "back"] == [2 * ROUNDS + 1]
    assert kinds(trace) == [(13, "pilots"), (13, "plan")]
    pilots, plan = trace[2 * ROUNDS]["told"]
    assert pilots["reliable"]
    assert pilots["continued"] == 1
    assert pilots["beta"] == pytest.approx(BETA, rel=0.1)
    a = world.outlook(1).weights
    assert pilots["variances"] == pytest.approx([(a**2).sum() / 0.5, (a**2).sum() / 0.2])
    assert plan["feasible"]
    assert plan["cause"] == "first plan"
    assert plan["total_seconds"] <= min(plan["alternatives"].values())
    assert plan["beta"] == pilots["beta"]
    assert [c["q"] for c in plan["clients"]] == trace[-1]["q"]
    assert {c["rank"] for c in plan["clients"]} == {16}
    assert trace[-1]["planned"] == plan["round_seconds"]
    assert np.ptp(trace[-1]["q"]) > 0.1
    assert np.mean(trace[-1]["q"]) < 1


def test_the_second_model_is_kept_where_it_is_better():
    world = World()
    sampler = PlannedSampling(pilot_rounds=ROUNDS, pilot_fractions=(0.2, 0.5))
    trace = world.play(sampler, span(1, 2 * ROUNDS + 1))
    assert [t["restart"] for t in trace if t["restart"]] == ["start"]
    pilots = trace[-1]["told"][0]
    assert pilots["continued"] == 2
    assert pilots["beta"] == pytest.approx(BETA, rel=0.1)


def test_beta_counts_sketches():
    world = World(sketches=True, n=30)
    world.given = [8] * 30
    trace = world.play(PlannedSampling(**PILOTS), span(1, 2 * ROUNDS + 1))
    pilots = trace[-1]["told"][0]
    assert pilots["beta"] == pytest.approx(BETA, rel=0.1)
    a = world.outlook(1).weights
    assert pilots["variances"][0] == pytest.approx(2 * (a**2).sum() / 0.5)


def test_losses_of_some_rounds_are_enough():
    every, some = (PlannedSampling(**PILOTS) for _ in range(2))
    World().play(every, span(1, 2 * ROUNDS))
    for server_round, loss in every.pilots.losses.items():
        if server_round % 2 == 0:
            some.learn_loss(server_round, loss)
    some.learn_loss(3, float("nan"))
    World().play(some, span(1, 2 * ROUNDS), losses=False)
    estimates = [s.pilots.estimate() for s in (every, some)]
    assert estimates[1].beta == pytest.approx(estimates[0].beta, rel=0.1)
    assert estimates[1].beta == pytest.approx(BETA, rel=0.1)


def test_known_constants_need_no_pilots():
    world = World(n=8)
    sampler = PlannedSampling(alpha=3.0, beta=0.5)
    assert not sampler.wants_loss
    trace = world.play(sampler, span(1, 4))
    assert kinds(trace) == [(1, "plan")]
    assert all(t["restart"] is None for t in trace)
    # What a round really takes, over coins as they fall, is what was promised (exact: n < 11).
    view = world.outlook(1)
    speeds = world.clock.profiles(range(8), view.weights, [[16]] * 8, view.upload_bytes, 16, 1)
    k = np.full(8, 16.0)
    tau, upload = speeds.compute_seconds(k), speeds.upload_seconds(k)
    seconds = []
    for t in range(3000):
        joined = sampler.sample(view.clients, 1, np.random.default_rng([9, t]))
        i = [client.index for client in joined]
        seconds.append(allocate_bandwidth(tau[i], upload[i], 1.0)[1])
    error = np.std(seconds) / np.sqrt(len(seconds))
    assert abs(np.mean(seconds) - sampler.planned_seconds) < 4 * error


def test_slow_channels_are_asked_less():
    world = World()
    world.clock.efficiency = np.where(np.arange(20) < 10, 0.05, 6.0)
    world.clock.base[:] = 0.01
    q = world.play(PlannedSampling(alpha=3.0, beta=0.6), [1])[0]["q"]
    assert np.mean(q[:10]) < 0.5 * np.mean(q[10:])


# ----- without pilots -------------------------------------------------------------------------


def test_a_run_is_planned_from_its_first_round():
    """As with α = β = 1 given, for as long as the losses say nothing else."""
    world, given = World(), World()
    sampler = PlannedSampling()
    assert not sampler.wants_loss
    assert "refined as it goes" in sampler.summary()
    trace = world.play(sampler, span(1, 5))
    assert all(t["restart"] is None for t in trace)
    assert kinds(trace) == [(1, "plan")]
    assert sampler.convergence == (1.0, 1.0)
    fixed = given.play(PlannedSampling(alpha=1.0, beta=1.0), span(1, 5))
    assert [t["q"] for t in trace] == [t["q"] for t in fixed]


def test_a_guess_that_not_even_everybody_meets_is_widened():
    world = World(n=8, sketches=True)
    world.given = [1, 2] * 4
    sampler = PlannedSampling()
    (record,) = world.play(sampler, [1])[0]["told"]
    assert record["feasible"]
    view = world.outlook(1)
    least = float((view.weights**2 * 16 / np.array(world.given)).sum())
    assert record["beta"] == pytest.approx(2 * least) != 1.0


@pytest.mark.parametrize("loss_at_start", [True, False])
def test_losses_of_the_run_move_beta_and_the_plan(loss_at_start):
    """In a world where the variance of the draw, as it fell, holds the model up."""
    world = Falling(beta=0.35, loss_at_start=loss_at_start)
    sampler = PlannedSampling(q_min=0.1)
    trace = world.play(sampler, span(1, 40))
    causes = [record["cause"] for t in trace for record in t["told"]]
    assert causes[0] == "first plan"
    assert any("beta, by the losses so far" in cause for cause in causes[1:])
    assert 0.3 < sampler.convergence[1] < 0.75  # from 1, slowly
    assert sum(trace[-1]["q"]) > 1.2 * sum(trace[0]["q"])
    # Interrupted, it goes on the same.
    again, place = PlannedSampling(q_min=0.1), Falling(beta=0.35, loss_at_start=loss_at_start)
    half = place.play(again, span(1, 22))
    state = json.loads(json.dumps(again.state_dict(), allow_nan=False))
    again = PlannedSampling(q_min=0.1)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert half + place.play(again, span(23, 40)) == trace


class Falling(World):
    """A world that gets ``β − x`` further, with x the variance of the draw itself."""

    def round(self, sampler, server_round, losses):
        before = self.progress
        began = self.loss()
        told = super().round(sampler, server_round, False)
        view, q = self.outlook(server_round), np.array(told["q"])
        joined = np.isin(self.present, told["chosen"])
        error = (view.weights**2 * (joined / q - 1) ** 2).sum() + (view.weights**2).sum()
        weight = (view.weights * joined / q).sum()
        self.progress = before + (self.beta - error + 0.3 * (weight - 1)) / 10
        sampler.learn_loss(server_round, self.loss() if self.loss_at_start else began)
        return told


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_noise_alone_moves_beta_little(noise):
    """Steps as uneven as in real runs, and a loss that sampling does not hold up at all."""
    rng, found = np.random.default_rng(4), []
    for _ in range(40):
        book, loss = Refining(), 2.0
        book.learn_loss(0, loss)
        a, q = np.full(50, 0.02), np.full(50, 0.2)
        for server_round in range(1, 41):
            book.learn_draw(server_round, a, q, np.ones(50), rng.random(50) < q)
            loss -= 0.02 * (1 + noise * rng.normal())
            book.learn_loss(server_round, loss)
        found.append(book.estimate())
    # Between the bounds of what may be learned at all; half of the runs near the guess.
    assert 0.3 < min(found) < max(found) < 4.0
    assert 0.7 < np.median(found) < 1.5


def test_the_variance_of_a_draw_has_the_mean_that_is_planned_with():
    rng = np.random.default_rng(1)
    a = rng.dirichlet(np.ones(12))
    q, phi = rng.uniform(0.1, 1, 12), rng.uniform(1, 4, 12)
    book = Refining()
    for server_round in range(1, 61):
        book.learn_draw(server_round, a, q, phi, rng.random(12) < q)
    xs = []
    for _ in range(400):
        book.learn_draw(61, a, q, phi, rng.random(12) < q)
        xs.append(book.state_dict()["draws"]["61"])
    x, weight = np.mean(xs, axis=0)
    assert x == pytest.approx((a**2 * phi / q).sum(), rel=0.15)
    assert weight == pytest.approx(1.0, abs=0.1)


def test_old_rounds_are_forgotten():
    book = Refining()
    for server_round in range(1, 500):
        book.learn_draw(server_round, np.ones(1), np.ones(1), np.ones(1), np.ones(1, bool))
        book.learn_loss(server_round, 1.0 / server_round)
    assert max(len(part) for part in list(book.state_dict().values())[1:]) < 65
    assert book.estimate() == 1.0  # always everybody: nothing to learn from


def test_a_run_saved_in_its_pilots_is_not_gone_on_with_without_them():
    world, sampler = World(), PlannedSampling(**PILOTS)
    world.play(sampler, span(1, 3))
    with pytest.raises(ValueError, match="was in its pilots"):
        PlannedSampling().load_state_dict(sampler.state_dict())
    world.play(sampler, span(4, 2 * ROUNDS + 1))
    after = PlannedSampling()
    after.load_state_dict(sampler.state_dict())
    assert after.convergence == sampler.convergence
    assert after.state_dict()["plan"] == sampler.state_dict()["plan"]


# ----- sketches -------------------------------------------------------------------------------


def test_sketches_are_planned_within_the_given_ranks():
    world = World(sketches=True, beta=2.0)
    world.clock.efficiency[:5] = 0.02
    world.given = [16, 12, 3] * 6 + [16, 16]
    # Asked almost always, slow clients can only send less.
    trace = world.play(PlannedSampling(alpha=3.0, beta=2.0, q_min=0.9), [1])
    k = trace[0]["k"]
    for rank, given in zip(k, world.given, strict=True):
        assert rank in {1, 2, 4, 8, 16, given}
        assert rank <= given
    assert max(k[:5]) < 12
    assert [c["rank"] for c in trace[0]["told"][0]["clients"]] == k
    only = PlannedSampling(alpha=3.0, beta=2.0, ranks=[4, 12])
    k = world.play(only, [1])[0]["k"]
    assert set(k) <= {3, 4, 12}
    assert {rank for rank, given in zip(k, world.given, strict=True) if given == 3} == {3}
    # A device that shrank between plan and round keeps what it was given.
    assert only.ranks([Client(100, 0)], [2]) == [2]
    fixed = World(sketches=False)
    fixed.given = world.given
    assert fixed.play(PlannedSampling(alpha=3.0, beta=2.0), [1])[0]["k"] == world.given


# ----- plans that get old ---------------------------------------------------------------------


def test_replans_follow_the_channels():
    world, stays = World(change=20), World(change=20)
    sampler = PlannedSampling(**PILOTS, replan_every=4)
    trace = world.play(sampler, span(1, 23))
    assert world.clock.asked == [13, 17, 21]
    assert trace[-1]["told"] == []
    assert trace[20]["told"][0]["cause"] == "4 rounds since the last plan"
    before, after = np.array(trace[18]["q"]), np.array(trace[-1]["q"])
    gained = world.clock.efficiency[::-1] / world.clock.efficiency
    # Whose channel got better is asked more often, as a tendency over all.
    assert np.corrcoef(np.log(gained), np.log(after / before))[0, 1] > 0.5
    # Fresh: a plan from scratch for the new channels promises as much, within sampling.
    fresh = PlannedSampling(alpha=sampler.convergence[0], beta=sampler.convergence[1])
    view = world.outlook(21)
    fresh.prepare(view)
    assert sampler.planned_seconds == pytest.approx(fresh.planned_seconds, rel=0.2)
    assert len(kinds(stays.play(PlannedSampling(**PILOTS), span(1, 23)))) == 2


def test_clients_ranks_and_weights_that_change_bring_a_new_plan():
    world = World()
    sampler = PlannedSampling(alpha=3.0, beta=0.6)
    world.play(sampler, span(1, 3))
    causes = []
    world.present.remove(4)
    causes += world.play(sampler, [4])[0]["told"]
    assert world.play(sampler, [5])[0]["told"] == []
    world.present = list(range(20))
    causes += world.play(sampler, [6])[0]["told"]
    world.given = [8, *world.given[1:]]
    causes += world.play(sampler, [7])[0]["told"]
    world.counts = world.counts.copy()
    world.counts[0] += 3
    assert world.play(sampler, [8])[0]["told"] == []
    world.counts[0] += 300
    causes += world.play(sampler, [9])[0]["told"]
    assert [record["cause"] for record in causes] == [
        "clients came or went",
        "clients came or went",
        "the ranks changed",
        "the data weights changed",
    ]
    assert [len(record["clients"]) for record in causes] == [19, 20, 20, 20]
    assert world.clock.asked == [1, 4, 6, 7, 9]


# ----- what can go wrong ----------------------------------------------------------------------


def test_without_losses_sampling_stays_uniform(caplog):
    world = World()
    sampler = PlannedSampling(**PILOTS)
    trace = world.play(sampler, span(1, 2 * ROUNDS + 2), losses=False)
    (record,) = trace[2 * ROUNDS]["told"]
    assert record["beta"] is None
    assert not record["reliable"]
    assert "no loss was reported in pilot 1" in record["reason"]
    assert "no loss was reported" in caplog.text
    assert set(trace[-1]["q"]) == {0.5}
    assert trace[-1]["planned"] is None
    assert world.clock.asked == []


def test_pilots_that_do_not_learn_are_named():
    sampler = PlannedSampling(**PILOTS)
    world = World()
    for server_round in range(2 * ROUNDS + 1):
        sampler.learn_loss(server_round, 1.0 + 0.1 * server_round)
    trace = world.play(sampler, span(1, 2 * ROUNDS + 1), losses=False)
    assert "no loss in common" in trace[-1]["told"][0]["reason"]
    assert set(trace[-1]["q"]) == {0.5}
    sampler.prepare(replace(world.outlook(14), clients=[], weights=np.zeros(0), ranks=[]))
    assert sampler.probabilities([]).shape == (0,)


def test_pilots_that_cannot_be_told_apart_are_planned_with_caution():
    sampler = PlannedSampling(**PILOTS)
    world = World()
    for server_round in range(2 * ROUNDS + 1):
        sampler.learn_loss(server_round, 2 - 0.1 * ((server_round - 1) % ROUNDS + 1))
    sampler.learn_loss(0, 2.0)
    trace = world.play(sampler, span(1, 2 * ROUNDS + 1), losses=False)
    pilots, plan = trace[-1]["told"]
    assert not pilots["reliable"]
    assert "do not grow" in pilots["reason"]
    assert pilots["spread"] is None
    s = pilots["variances"]
    assert pilots["beta"] == pytest.approx(s[1] + 20 * (s[1] - s[0]))
    assert plan["feasible"]


def test_a_target_out_of_reach_does_not_end_the_run(caplog):
    world = World()
    sampler = PlannedSampling(alpha=3.0, beta=0.01, replan_every=2)
    trace = world.play(sampler, span(1, 3))
    assert all(set(t["q"]) == {1.0} and t["planned"] is None for t in trace)
    assert kinds(trace) == [(1, "plan"), (3, "plan")]
    record = trace[0]["told"][0]
    assert not record["feasible"]
    assert "out of reach" in record["reason"]
    assert record["round_seconds"] is None
    assert "everybody joins" in caplog.text
    assert trace[0]["chosen"] == list(range(20))


def test_a_clock_that_has_measured_nothing_is_asked_again():
    world = World()
    known, world.clock = world.clock, MeasuredClock()
    sampler = PlannedSampling(alpha=3.0, beta=0.6)
    first = world.play(sampler, [1])[0]
    assert first["chosen"] == list(range(20))
    assert "nothing was measured" in first["told"][0]["reason"]
    state = json.loads(json.dumps(sampler.state_dict()))
    sampler = PlannedSampling(alpha=3.0, beta=0.6)
    sampler.load_state_dict(state)
    world.clock = known
    assert world.play(sampler, [2])[0]["told"][0]["feasible"]
    assert world.play(sampler, [3])[0]["told"] == []


@pytest.mark.parametrize(("sketches", "asked"), [(True, [4, 1, 2, 1]), (False, [16, 3, 8, 4])])
def test_a_round_that_only_measures_takes_a_quarter(sketches, asked):
    world = World(4, sketches=sketches)
    known, world.clock, world.given = world.clock, MeasuredClock(), [16, 3, 8, 4]
    sampler = PlannedSampling(alpha=3.0, beta=2.0)
    world.play(sampler, [1])
    clients = [Client(100 + i, i) for i in range(4)]
    assert sampler.ranks(clients, world.given) == asked
    world.clock = known  # from the first plan on it is the plan's own
    assert world.play(sampler, [2])[0]["told"][0]["feasible"]
    if not sketches:
        assert sampler.ranks(clients, world.given) == world.given


def test_a_target_out_of_reach_is_measured_in_whole():
    world = World(sketches=True)
    sampler = PlannedSampling(alpha=3.0, beta=0.01)
    assert not world.play(sampler, [1])[0]["told"][0]["feasible"]
    clients = [Client(100 + i, i) for i in range(20)]
    assert sampler.ranks(clients, world.given) == world.given


@pytest.mark.filterwarnings("error")
def test_a_plan_says_how_sure_the_clock_is():
    world = World()
    sampler = PlannedSampling(alpha=3.0, beta=0.6)
    assert world.play(sampler, [1])[0]["told"][0]["round_between"] is None
    rng, clock = np.random.default_rng(4), MeasuredClock()
    for number in range(1, 7):
        sizes = rng.integers(10_000, 90_000, 20)
        seconds = 1.5 + rng.uniform(0, 0.6, 20) + 1e-5 * sizes
        works = [
            Work(i, 4, int(size), 10.0, 1.0, float(took))
            for i, (size, took) in enumerate(zip(sizes, seconds, strict=True))
        ]
        clock.finish(works, number)
    world.clock = clock
    record = world.play(PlannedSampling(alpha=3.0, beta=0.6), [1])[0]["told"][0]
    low, high = json.loads(json.dumps(record["round_between"]))
    assert 1.0 < low < record["round_seconds"] < high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pilot_rounds": 1}, "pilot_rounds"),
        ({"pilot_fractions": (0.2, 0.2)}, "different"),
        ({"pilot_fractions": (0.2,)}, "two in"),
        ({"pilot_fractions": (0.2, 0.0)}, "two in"),
        ({"alpha": 1.0}, "both alpha and beta"),
        ({"alpha": 1.0, "beta": -1.0}, "beta: expected"),
        ({"replan_every": -1}, "replan_every"),
        ({"q_min": 0.0}, "q_min"),
        ({"idle_seconds": -1.0}, "idle_seconds"),
        ({"ranks": []}, "ranks"),
        ({"ranks": [0, 4]}, "ranks"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlannedSampling(**options)


# ----- interrupted ----------------------------------------------------------------------------


@pytest.mark.parametrize("sketches", [False, True])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(sketches):
    options = {**PILOTS, "replan_every": 4, "ranks": [6, 16]}
    last = 18

    def world():
        return World(8, beta=1.5, change=16, sketches=sketches)

    whole = world().play(PlannedSampling(**options), span(1, last))
    assert len(kinds(whole)) == 3
    stops = (13,) if sketches else (0, 2, ROUNDS, ROUNDS + 3, 2 * ROUNDS, 2 * ROUNDS + 1, 16)
    for stop in stops:
        place, sampler = world(), PlannedSampling(**options)
        trace = place.play(sampler, span(1, stop))
        state = json.loads(json.dumps(sampler.state_dict(), allow_nan=False))
        sampler = PlannedSampling(**options)
        sampler.load_state_dict(state)
        assert sampler.state_dict() == state
        trace += place.play(sampler, span(stop + 1, last))
        assert trace == whole


def test_the_same_seed_gives_the_same_plan():
    plans = [
        World().play(PlannedSampling(alpha=3.0, beta=0.6, seed=seed), [1])[0]["q"]
        for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1] != plans[2]
