"""Who is told each round's shares, and what becomes of them."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from strategies import FedLoRA
from strategies.wallclock import (
    BandwidthAllocator,
    CommandAllocator,
    HTBAllocator,
    MeasuredClock,
    Share,
    Work,
    allocate_bandwidth,
)
from strategies.wallclock import allocators as module

SHARES = [Share(0, 2**63 + 1, 0.25), Share(1, 7, 0.75)]
HEADER = "node,device,class,mbit,netns\n"


class Told(BandwidthAllocator):
    """Remembers, or fails."""

    name = "told"

    def __init__(self):
        self.shares, self.error = [], None

    def allocate(self, shares, server_round):
        if self.error:
            raise self.error
        self.shares.append({s.client: s.share for s in shares})

    def release(self):
        if self.error:
            raise self.error
        self.shares.append({})


def play(clock, round_, works, *, byte_seconds, compute=1.0, fixed=0.5):
    """Run a round on a band where nodes have what they are told, or else equal parts."""
    planned = [replace(w, node=100 + w.client) for w in works]
    expected = clock.begin(planned, round_, network=True, empty=())
    shares = clock._told or {w.client: 1 / len(works) for w in works}
    seconds = {
        w.client: compute + fixed + byte_seconds[w.client] * w.upload_bytes / shares[w.client]
        for w in works
    }
    done = [
        replace(w, held_seconds=compute, elapsed_seconds=seconds[w.client], steps=1.0)
        for w in planned
    ]
    return expected, clock.finish(done, round_)


def test_shares_are_the_best_for_what_was_measured_and_shorten_the_round():
    told, byte_seconds = Told(), {0: 1e-6, 1: 2e-6, 2: 8e-6}
    clock = MeasuredClock(bandwidth="optimal", allocator=told)
    assert clock.shared_band
    rng, times = np.random.default_rng(0), []
    for number in range(1, 9):
        works = [Work(i, 4, int(rng.choice([2e5, 1e6, 3e6]))) for i in range(3)]
        expected, time = play(clock, number, works, byte_seconds=byte_seconds)
        times.append((expected.seconds, time.seconds))
    assert told.shares[0] == pytest.approx(dict.fromkeys(range(3), 1 / 3))
    for i, rate in byte_seconds.items():
        assert time.mb_seconds[i].value == pytest.approx(1e6 * rate, rel=0.05)
    best, seconds = allocate_bandwidth(
        [1.0] * 3, [byte_seconds[w.client] * w.upload_bytes for w in works], 1.0
    )
    assert told.shares[-1] == pytest.approx(dict(enumerate(best)), rel=0.05)
    assert times[-1][1] == pytest.approx(seconds + 0.5, rel=0.03)
    assert times[-1][0] == pytest.approx(times[-1][1], rel=0.05)  # as forecast
    ends = [time.compute_seconds[i] + time.upload_seconds[i] for i in range(3)]
    assert ends == pytest.approx([ends[0]] * 3, rel=0.05)


def test_a_failure_ends_no_run_and_the_round_counts_as_shared_equally(caplog):
    told = Told()
    clock = MeasuredClock(bandwidth="optimal", allocator=told)
    works = [Work(i, 4, 1000 * (i + 1)) for i in range(2)]
    play(clock, 1, works, byte_seconds={0: 1e-3, 1: 4e-3})
    told.error = RuntimeError("the access point is gone")
    logger = logging.getLogger("flwr")
    logger.propagate, before = True, logger.propagate
    try:
        with caplog.at_level(logging.WARNING):
            _, time = play(clock, 2, works, byte_seconds={0: 1e-3, 1: 4e-3})
    finally:
        logger.propagate = before
    assert "round 2: the band is not shared out: the access point is gone" in caplog.text
    assert time.mb_seconds[1].value == pytest.approx(4000, rel=0.1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes", [(1e5, 3e5), (3e5, 3e5), (1e5, 3e5, 2e5, 5e4)])
def test_a_link_that_only_looks_fast_by_its_first_replies_is_no_loss(seed, sizes):
    """Links of 3 to 40 Mbit/s on the whole band, and seconds of noise: as on real nodes."""
    rng, told = np.random.default_rng(seed), Told()
    clock = MeasuredClock(bandwidth="optimal", allocator=told)
    mbit = np.array([39.8, 24.3, 11.9, 7.9, 16.7, 8.8, 3.4, 21, 4.6, 4.9, 4.7, 9.9])
    of_equal = []
    for number in range(1, 9):
        who = sorted(rng.choice(12, 12 if number == 1 else 8, replace=False).tolist())
        works = [Work(i, 4, int(sizes[number % len(sizes)]), node=i + 1) for i in who]
        clock.begin(works, number, network=True, empty=())
        alone = works[0].upload_bytes * 8e-6 / mbit[who]
        transfer = alone / np.array([told.shares[-1][i] for i in who])
        of_equal.append(transfer.max() / (alone * len(who)).max())
        elapsed = 4 + transfer + rng.gamma(4, 0.4, len(who))
        clock.finish(
            [replace(work, steps=2.0, held_seconds=2.0, elapsed_seconds=seconds)
             for work, seconds in zip(works, elapsed.tolist(), strict=True)], number,
        )  # fmt: skip
    assert max(of_equal) < 1.25
    assert np.mean(of_equal[1:]) < 0.9


def test_what_a_few_bytes_took_takes_the_band_from_nobody():
    told = Told()
    clock, rng = MeasuredClock(bandwidth="optimal", allocator=told), np.random.default_rng(0)
    for number, size in enumerate((2_000, 2_000, 300_000), 1):
        works = [Work(i, 4, 300_000 if i else size, node=i + 1) for i in range(6)]
        clock.begin(works, number, network=True, empty=())
        seconds = [
            4 + 1e-6 * w.upload_bytes / told.shares[-1][w.client] + rng.gamma(4, 0.4) for w in works
        ]
        done = [
            replace(w, steps=2.0, held_seconds=2.0, elapsed_seconds=took)
            for w, took in zip(works, seconds, strict=True)
        ]
        clock.finish(done, number)
    assert max(told.shares[2].values()) < 2 / 6


def test_where_shares_could_not_be_set_a_round_is_expected_with_equal_ones():
    told, byte_seconds = Told(), {0: 1e-6, 1: 2e-6, 2: 8e-6}
    clock = MeasuredClock(bandwidth="optimal", allocator=told)
    works = [Work(i, 4, 1_000_000) for i in range(3)]
    for number in range(1, 7):
        told.error = RuntimeError("the access point is gone") if number == 6 else None
        expected, time = play(clock, number, works, byte_seconds=byte_seconds)
    assert time.seconds == pytest.approx(1.5 + 24, rel=0.01)
    assert expected.seconds == pytest.approx(time.seconds, rel=0.1)


def test_nobody_gets_nothing():
    told = Told()
    clock = MeasuredClock(bandwidth="optimal", allocator=told)
    works = [Work(i, 4, 100_000) for i in range(4)]
    for number in (1, 2):
        play(clock, number, works, byte_seconds={0: 1e-3, 1: 1e-3, 2: 1e-3, 3: 1e-12})
    assert sum(told.shares[1].values()) == pytest.approx(1)
    assert min(told.shares[1].values()) > 0.1 / 4 * 0.9


def test_the_band_is_given_back_when_a_run_is_over(caplog):
    told = Told()
    strategy = FedLoRA(clock=MeasuredClock(bandwidth="optimal", allocator=told))
    strategy.finish(3)
    assert told.shares == [{}]
    told.error = RuntimeError("no such link")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        strategy.finish(4)
    assert "the band is not given back: no such link" in caplog.text
    FedLoRA().finish(1)  # none has to give anything


def test_a_command_is_told_as_json(tmp_path):
    script = tmp_path / "set shares.py"
    script.write_text(f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())")
    allocator = CommandAllocator(f"{sys.executable} '{script}'")
    allocator.allocate(SHARES, 3)
    assert json.loads((tmp_path / "told").read_text()) == {
        "round": 3,
        "shares": [
            {"client": 0, "node": str(2**63 + 1), "share": 0.25},
            {"client": 1, "node": "7", "share": 0.75},
        ],
    }
    allocator.release()
    assert json.loads((tmp_path / "told").read_text()) == {"round": None, "shares": []}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("false", "false ended with 1"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no such link\")'", "no such link"),
        ("/nowhere/set-shares", "cannot be run"),
        ("sleep 5", "took longer than"),
    ],
)
def test_a_command_that_fails(monkeypatch, command, said):
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    with pytest.raises(RuntimeError, match=said):
        CommandAllocator(command).allocate(SHARES, 1)


def test_classes_are_set_in_one_go(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(module, "_run", lambda command, told: calls.append((command, told)))
    links = tmp_path / "links.csv"
    links.write_text(HEADER + f"{2**63 + 1},up,1:10,8,base\n7,up,1:11,4,base\n9,up,1:12,4,base\n")
    HTBAllocator(links).allocate(SHARES, 1)
    ((command, told),) = calls
    assert command == ["tc", "-n", "base", "-batch", "-"]
    assert told.splitlines() == [
        "class change dev up classid 1:10 htb rate 2000000bit ceil 2000000bit",
        "class change dev up classid 1:11 htb rate 3000000bit ceil 3000000bit",
        "class change dev up classid 1:12 htb rate 64000bit ceil 64000bit",
    ]
    HTBAllocator(links).release()
    assert [line.split()[-1] for line in calls[1][1].splitlines()] == [
        "2666667bit", "1333333bit", "1333333bit"
    ]  # fmt: skip
    links.write_text(HEADER + "7,up,1:11,4,base\n")
    with pytest.raises(ValueError, match=f"no link of node {2**63 + 1}"):
        HTBAllocator(links).allocate(SHARES, 1)
    links.write_text("node,device\n7,up\n")
    with pytest.raises(ValueError, match="there is no class, mbit"):
        HTBAllocator(links).allocate(SHARES, 1)


@pytest.mark.skipif(not shutil.which("tc"), reason="needs tc and root")
def test_real_classes(tmp_path):
    name = "fedlora-test"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("needs root, to make a network namespace")
    try:
        for line in ("link add up0 type veth peer name down0", "link set dev up0 up"):
            subprocess.run(["ip", "-n", name, *line.split()], check=True)
        for line in ("qdisc add dev up0 root handle 1: htb",
                     "class add dev up0 parent 1: classid 1:10 htb rate 1mbit"):  # fmt: skip
            subprocess.run(["tc", "-n", name, *line.split()], check=True)
        links = tmp_path / "links.csv"
        links.write_text(HEADER + f"7,up0,1:10,8,{name}\n")
        HTBAllocator(links).allocate([Share(0, 7, 0.5)], 1)
        shown = subprocess.run(["tc", "-n", name, "class", "show", "dev", "up0"],
                               capture_output=True, text=True, check=True).stdout  # fmt: skip
        assert "rate 4Mbit ceil 4Mbit" in shown
        links.write_text(HEADER + f"7,up0,1:99,8,{name}\n")
        with pytest.raises(RuntimeError, match="tc ended with"):
            HTBAllocator(links).allocate([Share(0, 7, 0.5)], 1)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_options_that_mean_nothing():
    with pytest.raises(ValueError, match="needs an allocator"):
        MeasuredClock(bandwidth="optimal")
    with pytest.raises(ValueError, match="'equal' or 'optimal'"):
        MeasuredClock(bandwidth="best")
    with pytest.raises(ValueError, match="got none"):
        CommandAllocator(" ")
    with pytest.raises(ValueError, match="got none"):
        HTBAllocator("")
