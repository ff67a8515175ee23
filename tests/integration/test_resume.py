"""Runs that are cut off go on from their last checkpoint as if nothing had been."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedlora_app.launch.superlink import MARK, SuperLink
from strategies.checkpoint import Checkpoints
from strategies.records import MEASURED
from strategies.saving import Saver
from tests.integration.conftest import ROOT, SMALL, records, wait_for

FAULTY = Path(__file__).parent / "faulty_app"
TIMEOUT = 300.0  # seconds; for what takes a few where nothing else runs


class Durable(SuperLink):
    """A SuperLink with a database, which can be killed and started again."""

    def _spawn(
        self, command: list[str], log: IO[bytes], home: Path | None = None
    ) -> subprocess.Popen[bytes]:
        if command[0] == "flower-superlink":
            command = [*command, "--database", str(self.home / "superlink.db")]
            self.process = super()._spawn(command, log, home)
            return self.process
        return super()._spawn(command, log, home)

    def crash(self) -> None:
        """End it as a power failure would: without a chance to say so."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self._start()


def rounds_done(folder: Path) -> list[int]:
    if not (folder / "metrics.jsonl").exists():
        return []
    return [r["round"] for r in records(folder, "round")]


def resume(link: SuperLink, config: dict[str, Any]) -> str:
    """Run the app again from the latest checkpoint, to the end; return its log."""
    run = link.run(FAULTY, {**config, "resume-from": "latest"})
    log = "\n".join(link.stream(run))
    assert link.status(run).completed, (link.status(run), log)
    return log


def check(folder: Path, rounds: int) -> None:
    """Check that every round is in the model and in metrics.jsonl; none is in the model twice."""
    final = json.loads((folder / "final.json").read_text())
    assert final["head.bias"] == pytest.approx([1 + rounds * 1.5] * 2)  # two clients add 1 and 2
    assert set(rounds_done(folder)) == set(range(1, rounds + 1))


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0, 90])
def test_the_superlink_killed_and_started_again_on_its_database(pause, tmp_path, monkeypatch):
    """The ServerApp ends with its SuperLink, however soon that is back; the run is resumed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "run"
    config: dict[str, Any] = {"output": str(folder), "rounds": 5}
    with Durable(timeout=TIMEOUT) as link:
        nodes = [link.start_supernode(f"partition-id={i}") for i in range(2)]
        run = link.run(FAULTY, config)
        wait_for(lambda: 2 in rounds_done(folder))
        link.crash()
        time.sleep(pause)
        link.restart()
        wait_for(lambda: link.status(run).status.startswith("finished"))
        assert all(node.poll() is None for node in nodes)  # they wait for it by themselves
        assert link.status(run).status == "finished:failed"
        assert "resumed after round" in resume(link, config)
    check(folder, 5)


@pytest.mark.slow
def test_the_serverapp_killed_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "run"
    config: dict[str, Any] = {"output": str(folder), "rounds": 4}
    with SuperLink(timeout=TIMEOUT) as link:
        for i in range(2):
            link.start_supernode(f"partition-id={i}")
        run = link.run(FAULTY, config)
        wait_for(lambda: 2 in rounds_done(folder))
        (app,) = (p for p in link.processes() if any("flwr-serverapp" in w for w in p.cmdline()))
        app.kill()
        wait_for(lambda: link.status(run).status.startswith("finished"))
        assert link.status(run).status == "finished:failed"
        assert "resumed after round" in resume(link, config)
    check(folder, 4)


def test_a_run_that_is_going_on_is_not_resumed(tmp_path):
    """Nor is anything in its folder touched."""
    live = Checkpoints(tmp_path / "checkpoints")
    live.save(1, {"x": torch.ones(2)}, {"history": {}}, {"a": 1})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BlockingIOError, match="another run is writing"):
        Saver(Checkpoints(live.folder), resume_from="latest", fingerprint={"a": 1}, patience=0.5)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_simulation_killed_and_resumed_equals_one_that_was_not(simulated, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, ROOT / "run_simulation.py", "--clients", "4"]
    command += ["--output", folder, "--config", *(f"{k}={v}" for k, v in SMALL.items())]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: list(folder.glob("checkpoints/round-*1")))
        finally:
            kill_all(process.pid)
            process.wait()
    assert not (folder / "summary.json").exists()
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, timeout=2 * TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after round 1" in done.stdout

    expected, found = (
        load_file(f / "adapter" / "adapter_model.safetensors") for f in (simulated, folder)
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.numpy().tobytes() == found[name].numpy().tobytes(), name
    for kind in ("round", "client", "client-evaluation"):
        assert untimed(folder, kind) == untimed(simulated, kind)


def kill_all(pid: int) -> None:
    """Kill a simulation with everything it started, at once, and remove what it leaves in /tmp."""
    children = psutil.Process(pid).children(recursive=True)
    mine = {environment(child).get(MARK) for child in children} - {None}
    # Flower puts some into sessions of their own, and Ray's workers hide their environment.
    family = {p for p in psutil.process_iter() if environment(p).get(MARK) in mine}
    homes = {environment(p).get("FLWR_HOME") for p in family} - {None}
    for process in family | {c for p in family for c in descendants(p)} | {psutil.Process(pid)}:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def untimed(folder: Path, kind: str) -> list[dict]:
    """Return records without what two runs never have in common: times, and ids of nodes."""
    timed = {"at", "node", "seconds", "train_seconds", "aggregate_seconds", "clock_seconds",
             "clock_total", "compute_seconds", "upload_seconds", "bottleneck",
             "held-seconds", *MEASURED}  # fmt: skip
    return [{k: v for k, v in record.items() if k not in timed} for record in records(folder, kind)]
