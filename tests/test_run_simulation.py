"""`python run_simulation.py`: its exit codes, what it shows, and that nothing stays behind."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console as Terminal

from fedlora_app.cli.shared import pairs_of
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.launch import simulation
from fedlora_app.launch.console import Console, Standing
from run_simulation import main
from tests.integration.conftest import alive

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "integration" / "tiny_app"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a run of the tiny app as a user would, from ``folder``."""
    program = [sys.executable, str(ROOT / "run_simulation.py"), "--app", str(TINY)]
    return subprocess.Popen(
        [*program, "--clients", "3", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_runs_at_once_one_completes_and_one_fails(tmp_path: Path) -> None:
    good = start(tmp_path, "--rounds", "1")
    bad = start(tmp_path, "--config", "seed=13", "--output", "bad")
    out, err = good.communicate(timeout=120)
    bad_out, bad_err = bad.communicate(timeout=120)

    assert good.returncode == 0, err
    assert out.splitlines() == [
        "3 simulated clients, 1 rounds",
        "WARNING: this is a test",
        "  round 1: [0, 1, 2]",
    ]
    assert bad.returncode == 1
    assert "ValueError: thirteen brings bad luck" in bad_out
    assert "Simulation failed with exception: thirteen brings bad luck" in bad_err
    assert "finished:failed" in bad_err
    kept = Path(bad_err.rpartition("the full log is in ")[2].strip())
    assert kept.exists()
    assert not (tmp_path / "bad").exists()  # it never began
    shutil.rmtree(kept.parent)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    run = start(tmp_path, "--rounds", "1000", "--output", "out")
    for line in run.stdout or ():
        if "round 1:" in line:
            break
    started = psutil.Process(run.pid).children(recursive=True)
    names = {process.name() for process in started}
    homes = {process.environ().get("FLWR_HOME") for process in started} - {None}
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGINT)  # an impatient user
    _, err = run.communicate(timeout=60)

    assert run.returncode == 130
    assert err.strip() == "stopping"
    assert {"raylet", "gcs_server"} <= names
    assert not [process for process in started if alive(process)]
    assert homes
    assert not any(Path(home).exists() for home in homes)


def test_wrong_config_is_said_once_and_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a SuperLink was started")

    monkeypatch.setattr(simulation, "SuperLink", refuse)
    monkeypatch.chdir(tmp_path)
    code = main(["--config", "aggregaton=rbla", "train.steps=ten"])

    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    assert shown.err.count("invalid run config") == 1
    assert "aggregaton: unknown key; did you mean 'aggregation'?" in shown.err
    assert "train.steps: expected int, got 'ten'" in shown.err
    assert not list(tmp_path.iterdir())


def read(pairs: list[str], **asked: object) -> tuple[simulation.Plan, RunConfig]:
    return simulation.read_plan(ROOT, simulation.Asked(pairs=pairs_of(pairs), **asked))


def test_values_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plan, config = read(
        ["lora.dora=true", "ranks.list=4", "model.name=a b", "data.alpha=1"],
        rounds=9, output="here",
    )  # fmt: skip
    assert config.lora.dora is True
    assert config.ranks.list == "4"
    assert config.model.name == "a b"
    assert config.data.alpha == 1.0
    assert config.rounds == 9
    assert plan.folder == tmp_path / "here"


def test_keys_with_and_without_the_option_and_several_after_one(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(simulation, "start", lambda what, _: asked.append(what) or 0)
    for words in (
        ["--config", "seed=1", "rounds=2", "--config", "data.alpha=1"],
        ["seed=1", "--config", "rounds=2", "data.alpha=1", "--clients", "4"],
        ["-c", "seed=1", "data.alpha=1", "-c", "rounds=2"],
    ):
        assert main(words) == 0
        assert sorted(asked[-1].pairs) == [("data.alpha", "1"), ("rounds", "2"), ("seed", "1")]
    assert [found.clients for found in asked] == [None, 4, None]


@pytest.mark.parametrize("wrong", [["--clients", "0"], ["--config", "rounds"], ["--rounds", "x"]])
def test_wrong_command_line(wrong: list[str], capsys) -> None:
    assert main(wrong) == 2
    assert "Invalid value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"pairs": [("seeed", "1")]}, "seeed: unknown key; did you mean 'seed'?"),
        ({"pairs": [("seed", "one")]}, "seed: expected int, got 'one'"),
        ({"resume": True}, "resume-from: unknown key"),
    ],
)
def test_keys_of_another_app_are_its_own(asked, said) -> None:
    with pytest.raises(ConfigError) as caught:
        simulation.read_other(TINY, simulation.Asked(**asked))
    assert said in str(caught.value)
    plan = simulation.read_other(TINY, simulation.Asked(pairs=[("seed", "7")], rounds=3))
    assert plan == simulation.Plan({"seed": 7, "rounds": 3}, 10, 3, None)


def test_fewer_clients_than_the_run_waits_for() -> None:
    with pytest.raises(ConfigError, match="wait for 2 nodes, but has 1"):
        read([], clients=1)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[92mINFO \x1b[0m:      \tround 1", "\tround 1\n"),
        ("\x1b[93mWARNING \x1b[0m:   careful", "WARNING: careful\n"),
        ("\x1b[91mERROR \x1b[0m:     Simulation raised", "ERROR: Simulation raised\n"),
        ("ValueError: INFO : no", "ValueError: INFO : no\n"),
        ("\x1b[92mINFO \x1b[0m:      Starting Flower Simulation", ""),
        ("\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed", ""),
        ("\x1b[36m(ClientAppActor pid=1)\x1b[0m Map:  50%|#####     | 5/10", ""),
        ("\x1b[36m(ClientAppActor pid=1)\x1b[0m \x1b[92mINFO \x1b[0m:      hello", ""),
        (
            "\x1b[36m(ClientAppActor pid=1)\x1b[0m ValueError: wrong",
            "(ClientAppActor pid=1) ValueError: wrong\n",
        ),
        ("\x1b[92mINFO \x1b[0m:      ", ""),
    ],
)
def test_lines_of_the_log(line: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    Console(Path("none"), 1).show(line)
    assert capsys.readouterr().out == shown


def test_progress_of_a_round() -> None:
    standing = Standing(rounds=6, since=0.0)
    assert (standing.title(), standing.text(2.0)) == ("starting Flower and Ray", "2 s")
    begun = {"kind": "round-start", "round": 3, "clients": 4}
    standing.see(begun, 10.0)
    assert standing.title() == "round 3/6"
    assert standing.text(11.0) == "0/4 clients · 4 in flight · 0 B up, 0 B moved · 1 s"
    for node in "78":
        standing.see({"kind": "arrived", "round": 3, "node": node, "bytes": 500_000}, 14.0)
    said = "2/4 clients · 2 in flight · 1.0 MB up, 1.0 MB moved · 4 s"
    assert standing.text(14.0) == said
    moved = {"bytes_down": 2_000_000, "bytes_up": 2_000_000}
    standing.see({"kind": "round", "round": 3, **moved}, 20.0)
    assert (standing.title(), standing.text(21.0)) == ("preparing", "1 s")
    standing.see({"kind": "round", "round": 6, "bytes_down": 0, "bytes_up": 0}, 22.0)
    assert standing.title() == "testing, and writing results"
    standing.see({**begun, "round": 4}, 25.0)
    said = "4 in flight · 0 B up, 4.0 MB moved · 4 s · about 6 s left, of the run 0:26"
    assert standing.text(29.0).endswith(said)


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "round-start", "round": 9, "clients": 1}\n')  # of an older run
    shown = io.StringIO()
    monkeypatch.setattr(
        "fedlora_app.launch.console.Terminal",
        lambda **_: Terminal(file=shown, force_terminal=True, width=120, soft_wrap=True),
    )
    with Console(metrics, rounds=6) as console:
        with metrics.open("a") as file:
            file.write('{"kind": "round-start", "round": 3, "clients": 4}\n{"kind": "arrived"}\n')
        deadline = time.monotonic() + 30
        while "1/4 clients" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.1)
        console.show("\x1b[93mWARNING \x1b[0m:   [careful] " + "long " * 40)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "round 3/6" in text
    assert "1/4 clients · 3 in flight" in text
    assert "round 9" not in text
    assert "WARNING: [careful] " + "long " * 39 in text  # whole, on one line
