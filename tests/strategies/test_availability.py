"""Who is there when: against brute force, and the properties that a run rests on."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import kstest

from strategies.clients import Client
from strategies.participation import Participation
from strategies.sampling import FractionSampling, IndependentSampling
from strategies.wallclock import (
    AVAILABILITIES,
    Always,
    Availability,
    Diurnal,
    Exponential,
    Intervals,
    Presence,
    SimulatedClock,
    Work,
    make_availability,
    retime,
)
from strategies.wallclock.availability import register

COST = {"base_flops": 2e9, "rank_flops": 1e8, "steps": 10.0}


def rng(seed=7):
    return np.random.default_rng(seed)


def models():
    """One of each, whose clients come and go about once in ten seconds."""
    spans = np.sort(rng().uniform(0, 95, (40, 8)), axis=1).reshape(40, 4, 2)
    return [
        Diurnal(rng=rng(), share=0.3, seconds=10),
        Diurnal(rng=rng(), share=0.9, seconds=10, clients=0.4, spread=0.1),
        Exponential(rng=rng(), share=0.6, seconds=10),
        Exponential(rng=rng(), share=0.97, seconds=10, clients=0.5),
        Intervals({i: [tuple(s) for s in row] for i, row in enumerate(spans)}, repeat=100.0),
        Always(),
    ]


def times_of(model, client, end):
    """Times there up to a second, by asking on from each change to the next."""
    now, spans = 0.0, []
    while now < end:
        present = model.look([client], now)
        assert present.until[0] > now
        if present.here[0]:
            spans.append((now, min(present.until[0], end)))
        now = present.until[0]
    return spans


# ----- every model --------------------------------------------------------------------------


@pytest.mark.parametrize("model", models(), ids=lambda model: model.summary())
def test_a_change_is_where_it_was_said_and_nowhere_else(model):
    clients = range(25)
    spans = [times_of(model, i, 150.0) for i in clients]
    for one, after in itertools.pairwise(spans[0]):
        assert after[0] > one[1]
    for second in np.concatenate([rng(1).uniform(0, 150, 60), [0.0]]):
        present = model.look(clients, float(second))
        inside = [any(start <= second < end for start, end in times) for times in spans]
        assert present.here.tolist() == inside
        ends = [b for times in spans for span in times for b in span if second < b < 150]
        if ends:
            assert min(present.until) == pytest.approx(min(ends), rel=1e-12)


@pytest.mark.parametrize("model", models(), ids=lambda model: model.summary())
def test_a_client_does_not_depend_on_the_others_nor_on_when_it_is_asked(model):
    clients = rng(2).permutation(40)
    seconds = rng(3).uniform(0, 500, 20)
    forward = [model.look(clients, float(s)) for s in seconds]
    for second, seen in reversed(list(zip(seconds, forward, strict=True))):
        for place in (0, 17):
            alone = model.look([clients[place]], float(second))
            assert (alone.here[0], alone.until[0]) == (seen.here[place], seen.until[place])


@pytest.mark.parametrize("model", models(), ids=lambda model: model.summary())
def test_the_long_run_is_as_said(model):
    """Share of the time there, and how often a client that is there stays for so long."""
    end, wait = 4_000.0, 1.3
    for client in (3, 8):
        spans = times_of(model, client, end) if not isinstance(model, Always) else [(0.0, end)]
        lengths = np.array([b - a for a, b in spans])
        assert model.share([client])[0] == pytest.approx(lengths.sum() / end, abs=0.05)
        stays = np.maximum(lengths - wait, 0).sum() / lengths.sum()
        assert model.stays([client], wait)[0] == pytest.approx(stays, abs=0.05)
        assert model.stays([client], 0.0)[0] == 1


def test_same_seed_same_intervals_and_another_seed_others():
    for make in (Diurnal, Exponential):
        spans = [
            [times_of(make(rng=rng(seed), seconds=10), i, 100) for i in range(5)]
            for seed in (1, 1, 2)
        ]
        assert spans[0] == spans[1]
        assert spans[0] != spans[2]
        assert spans[0][0] != spans[0][1]


def test_ten_thousand_clients_at_a_late_hour_remember_nothing():
    for model in (Exponential(rng=rng(), seconds=60), Diurnal(rng=rng(), seconds=60)):
        before = dict(vars(model))
        present = model.look(range(10_000), 1e9)
        assert vars(model) == before
        assert present.here.mean() == pytest.approx(0.5, abs=0.02)
        assert (present.until > 1e9).all()


@pytest.mark.parametrize("clients", [0.0, 0.1, 0.25, 1.0])
def test_so_many_of_any_ten_come_and_go(clients):
    moves = Exponential(rng=rng(), clients=clients).share(range(2000)) < 1
    assert moves.mean() == pytest.approx(clients, abs=0.02)
    tens = moves.reshape(-1, 10).sum(axis=1)
    assert set(tens) <= {int(10 * clients), int(np.ceil(10 * clients))}


# ----- exponential ---------------------------------------------------------------------------


def test_times_there_and_away_are_exponential_and_stationary():
    model = Exponential(rng=rng(), share=0.75, seconds=20)
    everyone = range(4000)
    for second in (0.0, 3.0, 5.0, 1e4):  # from the start as in the long run
        present = model.look(everyone, second)
        assert present.here.mean() == pytest.approx(0.75, abs=0.025)
        left = present.until - second
        assert kstest(left[present.here] / 15, "expon").pvalue > 1e-3
        assert kstest(left[~present.here] / 5, "expon").pvalue > 1e-3
    spans = [s for i in range(10) for s in times_of(model, i, 1000.0)[1:-1]]
    assert kstest([(b - a) / 15 for a, b in spans], "expon").pvalue > 1e-3


def test_the_state_forgets_as_a_chain_of_two_states_does():
    model = Exponential(rng=rng(), share=0.6, seconds=10)
    everyone = range(20_000)
    first = model.look(everyone, 50.0).here
    for lag in (0.5, 2.0, 6.0):
        then = model.look(everyone, 50.0 + lag).here
        decay = np.exp(-lag * (1 / 6 + 1 / 4))
        assert then[first].mean() == pytest.approx(0.6 + 0.4 * decay, abs=0.015)


# ----- intervals -------------------------------------------------------------------------------


def csv_of(tmp_path, text):
    path = tmp_path / "times.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("repeat", [0.0, 60.0, 73.5])
def test_a_csv_against_reading_it_line_by_line(tmp_path, repeat):
    draw = rng(5)
    lines = []
    for _ in range(120):
        start = draw.integers(0, 50)
        lines.append((int(draw.integers(0, 9)), int(start), int(start + draw.integers(1, 11))))
    text = "# recorded\nend,client,start\n\n" + "\n".join(f"{e},{c},{s}" for c, s, e in lines)
    model = make_availability(csv_of(tmp_path, text), rng=rng(), repeat=repeat)

    def here(client, second):
        second = second % repeat if repeat else second
        return any(c == client and s <= second < e for c, s, e in lines)

    for second in np.arange(0, 200, 2.5):
        present = model.look(range(12), float(second))
        assert present.here[:9].tolist() == [here(i, second) for i in range(9)]
        assert present.here[9:].all()  # of no line: always there
        assert np.isinf(present.until[9:]).all()
        for i in range(9):
            ahead = np.arange(second, min(present.until[i], second + 80), 0.5)
            assert all(here(i, s) == present.here[i] for s in ahead)
    whole = repeat or max(e for _, _, e in lines)
    grid = np.arange(0, whole, 0.5)
    share = [np.mean([here(i, s) for s in grid]) for i in range(9)]
    assert model.share(range(9)) == pytest.approx(share, abs=1e-9)


def test_times_that_touch_over_the_turn_are_one():
    model = Intervals({0: [(0, 10), (90, 100)]}, repeat=100)
    assert model.look([0], 95.0) == Presence(*map(np.array, ([True], [110.0])))
    assert model.look([0], 50.0).until[0] == 90
    always = Intervals({0: [(0, 100)]}, repeat=100)
    assert always.look([0], 250.0).here[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client,start\n0,1\n", "header of the columns client, start, end"),
        ("", "got nothing"),
        ("client,start,end\n0,5,5\n1,0,2\n-1,0,2\n", "line 2: .*line 4"),
        ("client,start,end\n0,x,5\n", "line 2"),
        ("client,start,end\n0,1,5,6\n", "line 2"),
        ("client,start,end\n0,nan,5\n", "line 2"),
        ("client,start,end\n0,1,inf\n", "line 2"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Intervals.from_csv(csv_of(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("diurnal", {"share": 0.0}, "share"),
        ("exponential", {"share": 1.0}, "use 'always'"),
        ("exponential", {"seconds": 0.0}, "seconds"),
        ("diurnal", {"clients": 1.1}, "clients"),
        ("diurnal", {"spread": 2}, "spread"),
        ("expontial", {}, "did you mean 'exponential'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_availability(name, rng=rng(), **options)
    with pytest.raises(ValueError, match="repeat"):
        Intervals({0: [(0, 10)]}, repeat=5)


def test_one_of_your_own():
    @register
    class Evens(Availability):
        name = "evens"

        def __init__(self, *, rng, after=5.0):
            self.after = after

        def look(self, clients, seconds):
            even = np.array(clients) % 2 == 0
            return Presence(even, np.full(len(clients), np.inf))

        def share(self, clients):
            return self.look(clients, 0.0).here * 1.0

        stays = share

        def left(self, clients, chances):
            return np.full(np.shape(chances), np.inf)

    try:
        assert make_availability("evens", rng=rng(), after=2.0).after == 2.0
    finally:
        del AVAILABILITIES["evens"]


# ----- the clock -------------------------------------------------------------------------------


def works_of(n):
    return [Work(i, 4, 300_000 + 50_000 * i) for i in range(n)]


@pytest.mark.parametrize("bandwidth", ["optimal", "equal"])
def test_who_goes_away_midway_is_late_and_not_waited_for(bandwidth):
    works = works_of(6)
    usual = SimulatedClock(**COST, bandwidth=bandwidth).finish(works, 1)
    leaves = usual.seconds * 0.4
    away = Intervals({2: [(0, 1000 + leaves)]})
    clock = SimulatedClock(**COST, bandwidth=bandwidth, availability=away)
    clock.now = 1000.0
    time = clock.forecast(works, 1)
    assert time.late == {2}
    assert time.gone == pytest.approx({2: leaves})
    assert 2 not in time.upload_seconds
    assert clock.finish(works, 1) == time
    # Without it the others take as long as they would alone; with equal shares it holds its own.
    others = [work for work in works if work.client != 2]
    if bandwidth == "optimal":
        alone = SimulatedClock(**COST, bandwidth=bandwidth).finish(others, 1)
        assert time.seconds == pytest.approx(max(alone.seconds, leaves))
    else:
        ends = [usual.compute_seconds[i] + usual.upload_seconds[i] for i in range(6) if i != 2]
        assert time.seconds == pytest.approx(max(*ends, leaves))


def test_the_round_lasts_until_who_goes_has_gone():
    works = [Work(0, 4, 1000), Work(1, 4, 50_000_000)]
    leaves = SimulatedClock(**COST).finish(works, 1).seconds * 0.9
    clock = SimulatedClock(**COST, availability=Intervals({1: [(0, leaves)]}))
    time = clock.forecast(works, 1)
    assert (time.late, time.seconds) == ({1}, pytest.approx(leaves))


def test_gone_before_the_deadline_holds_nobody_up():
    works = works_of(5)
    seconds = SimulatedClock(**COST).finish(works, 1).seconds
    for bandwidth in ("optimal", "equal"):
        away = Intervals({3: [(0, seconds / 10)]})
        clock = SimulatedClock(
            **COST, bandwidth=bandwidth, deadline=50 * seconds, availability=away
        )
        time = clock.forecast(works, 1)
        assert time.late == {3}
        assert time.seconds < 10 * seconds


@pytest.mark.parametrize("seed", range(10))
def test_whoever_stays_is_done_before_it_goes(seed):
    """And the shares of the others are those of a round that these alone had."""
    clock = SimulatedClock(**COST, availability=Exponential(rng=rng(seed), share=0.9, seconds=20))
    clock.now = 100.0
    present = clock.availability.look(range(25), 100.0)
    works = [work for work in works_of(25) if present.here[work.client]]
    time = clock.forecast(works, 1)
    kept = [work for work in works if work.client not in time.late]
    alone = SimulatedClock(**COST).finish(kept, 1)
    for work in works:
        left = present.until[work.client] - 100.0
        if work.client in time.late:
            assert time.gone[work.client] == left <= time.seconds
        else:
            assert left >= alone.seconds * (1 - 1e-9)
            assert time.upload_seconds[work.client] == alone.upload_seconds[work.client]


def test_always_there_changes_no_bit():
    works = works_of(7)
    plain, given = (SimulatedClock(**COST, deadline=3.0, availability=a) for a in (None, Always()))
    for server_round in (1, 2):
        assert plain.forecast(works, server_round) == given.forecast(works, server_round)
        assert plain.finish(works, server_round) == given.finish(works, server_round)
    assert plain.state_dict() == given.state_dict()


def test_a_run_timed_again_meets_everybody_at_the_same_seconds():
    away = Exponential(rng=rng(), share=0.8, seconds=30)
    clock = SimulatedClock(**COST, availability=away)
    records, times = [], []
    for number in range(1, 9):
        works = works_of(12)
        clock.forecast(works, number)
        times.append(clock.finish(works, number))
        clock.now += times[-1].seconds
        for work in works:
            row = {"client": work.client, "rank": 4, "bytes_up": work.upload_bytes}
            records.append({"kind": "client", "round": number, **row})
        records.append({"kind": "round", "round": number})
    assert any(time.gone for time in times)
    assert retime(records, SimulatedClock(**COST, availability=away)) == times


# ----- who is asked ------------------------------------------------------------------------------


def participation(sampler, away):
    rule = SimpleNamespace(sketches=False, sketch_adds_variance=False, default_ratio=False)
    return Participation(sampler, SimulatedClock(**COST, availability=away), rule)


def choose(book, n, number):
    clients = [Client(100 + i, i, num_examples=10) for i in range(n)]
    chosen = book.choose(number, clients, [4] * n, lambda: (0, 0), 4, rng(number))
    return [client.index for client, _ in chosen]


def test_who_is_away_is_not_asked():
    away = Exponential(rng=rng(), share=0.5, seconds=50)
    for sampler in (IndependentSampling(0.7), FractionSampling(0.5)):
        book = participation(sampler, away)
        for number in range(1, 30):
            chosen = choose(book, 40, number)
            assert away.look(chosen, book.clock.now).here.all()
            if isinstance(sampler, FractionSampling):  # half of those there
                there = away.look(range(40), book.clock.now).here.sum()
                assert len(chosen) == round(there / 2)
            book.finish([Work(i, 4, 400_000) for i in chosen], number)
            assert book.clock.now == book.seconds > 0


def test_nobody_there_waits_for_the_first_to_come():
    book = participation(FractionSampling(1.0), Intervals({0: [(30, 60)], 1: [(40, 60)]}))
    assert choose(book, 2, 1) == [0]
    assert book.seconds == book.clock.now == 30
    book.seconds = book.clock.now = 70.0
    with pytest.raises(ValueError, match="none of 2 clients is there, nor comes back"):
        choose(book, 2, 2)
    # A resumed run goes on at its second.
    again = participation(FractionSampling(1.0), Intervals({}))
    again.load_state_dict(book.state_dict())
    assert again.clock.now == 70.0


def test_weights_make_up_for_the_time_away():
    """The sum of weights over many rounds is that of everybody in every round."""
    away = Exponential(rng=rng(), share=0.5, seconds=20, clients=0.5)
    book = participation(IndependentSampling(0.4), away)
    total, rounds = np.zeros(20), 600
    for number in range(1, rounds + 1):
        for i in choose(book, 20, number):
            total[i] += book.weights[i]
            book.answered(Client(100 + i, i))
        book.seconds += 15.0
        book.clock.now = book.seconds
    assert total / rounds * 20 == pytest.approx(np.ones(20), abs=0.35)
    assert (total / rounds * 20).mean() == pytest.approx(1, abs=0.06)
