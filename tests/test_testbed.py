"""The parts of the testbed that need neither root nor a SuperLink."""

import json

import numpy as np
import pytest

from deploy.testbed import cli, federation, links, probe
from deploy.testbed.links import Link, LinkError, Network
from deploy.testbed.rounds import Rounds
from strategies.wallclock import sample_devices, spectral_efficiency


@pytest.fixture(autouse=True)
def no_other(monkeypatch, tmp_path):
    """Whatever testbed is up on this machine is none of these tests' business."""
    monkeypatch.setattr(federation, "STATE", tmp_path / "testbed.json")
    monkeypatch.setattr(links, "namespaces", list)


def test_links_are_those_of_the_profile_without_its_fading():
    drawn = links.links_of("rural", 5, 7)
    devices = sample_devices("rural", 5, np.random.default_rng(7))
    rng = np.random.default_rng(0)
    seconds = np.mean([1 / spectral_efficiency(devices, rng) for _ in range(20_000)], axis=0)
    assert [link.mbit for link in drawn] == pytest.approx(list(10 / seconds), rel=0.03)
    assert max(link.speed for link in drawn) == 1
    assert sum(link.share for link in drawn) == pytest.approx(1)
    assert drawn[0].rate == pytest.approx(drawn[0].mbit / 5)


def test_a_probe_measures_what_gets_through():
    assert probe.measure([], "127.0.0.1", 0.3) > 1
    assert np.isnan(probe.measure(["false"], "127.0.0.1", -9.5))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--rates", "1,x"], "could not convert"),
        (["up", "--rates", "1,-2"], "--rates must be numbers of Mbit/s above 0"),
        (["run", "rounds"], "expected key=value, got 'rounds'"),
    ],
)
def test_what_is_refused(capsys, words, said):
    assert cli.main(words) == 1
    assert said in capsys.readouterr().err


def test_root_is_needed_and_it_is_said(capsys, monkeypatch):
    monkeypatch.setattr(links.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(links.shutil, "which", lambda name: f"/sbin/{name}")
    assert cli.main(["up", "--nodes", "2"]) == 1
    assert "as root" in (said := capsys.readouterr().err)
    assert "--plain" in said
    monkeypatch.setattr(links.shutil, "which", lambda name: None)
    assert cli.main(["up", "--nodes", "2"]) == 1
    assert "no ip and no tc" in capsys.readouterr().err


def test_down_without_a_testbed_is_no_error(capsys):
    assert cli.main(["down"]) == 0
    assert "there is no testbed" in capsys.readouterr().out


def test_rates_as_tc_writes_them_and_change(monkeypatch):
    told = []
    shown = (
        "class htb 1:10 parent 1:1 leaf 8001: prio 0 rate 500Kbit ceil 500Kbit burst 4Kb\n"
        "class htb 1:11 parent 1:1 leaf 8002: prio 0 rate 2500Kbit ceil 2500Kbit burst 4Kb\n"
    )
    monkeypatch.setattr(links, "_run", lambda command, told="", check=True: shown)
    monkeypatch.setattr(links, "_tc", told.extend)
    network = Network([Link(1.0, share=0.5), Link(5.0, share=0.5)], 100)
    network.change([1], 0.1)
    assert told == [f"class change dev up0 classid 1:11 htb {links._rate(0.25)}"]
    assert [link.mbit for link in network.links] == [1.0, 0.5]
    told.clear()
    network.reset()
    assert told == [f"class change dev up0 classid 1:1{i} htb {links._rate(r)}"
                    for i, r in enumerate((0.5, 0.25))]  # fmt: skip
    with pytest.raises(LinkError, match="no class 1:12"):
        Network([Link(1.0)] * 3, 100).change([2], 0.1)


def test_rounds_beside_what_was_expected(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "round", "round": 0, "clock_seconds": 0.0},
        {"kind": "client", "round": 1, "client": 2, "compute_seconds": 1.0, "fixed_seconds": 0.5,
         "upload_seconds": 3.0, "status": "ok", "node": "9", "bytes_up": 1_000_000},
        {"kind": "round", "round": 1, "clock_seconds": 4.0, "train_seconds": 4.5,
         "expected_seconds": 4.25, "bottleneck": 2},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind"')
    with Rounds(
        path, Network([Link(2.0), Link(8.0, share=0.5)], 100), ["7", "9"], "none"
    ) as rounds:
        pass
    rounds.show()
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "1", "4.50", "4.25", "3.00", "1.00", "0.50", "3.00", "-"
    ]  # fmt: skip
    assert (tmp_path / "testbed.csv").read_text().splitlines() == [
        "round,seconds,expected,by_links,compute,fixed,upload,busy", "1,4.5,4.25,3.0,1.0,0.5,3.0,"
    ]  # fmt: skip


def test_a_run_that_is_interrupted_is_stopped_and_the_band_given_back(monkeypatch, tmp_path):
    told = []

    class Running:
        home = tmp_path

        def run(self, project, config):
            return 7

        def stream(self, number):
            yield "a line"
            raise KeyboardInterrupt

        def stop(self, number):
            told.append(number)
            raise cli.SuperLinkError("it has just ended")

    network = Network([Link(1.0)], 100)
    monkeypatch.setattr(network, "reset", lambda: told.append("reset"))
    args = cli._parser().parse_args(["run"])
    with pytest.raises(KeyboardInterrupt):
        cli._run(args, Running(), network, ["9"], {"output": str(tmp_path)}, shaped=True)
    assert told == ["reset", 7, "reset"]


def test_queues_hold_half_a_second_and_some_packets():
    assert [links._queue(mbit) for mbit in (0.05, 0.5, 10)] == [8, 21, 413]
