"""Runs that are cut off go on from their last checkpoint as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from safetensors.torch import load_file

from fedlora_app.superlink import MARK, SuperLink
from tests.integration.conftest import ROOT, SMALL, records

FAULTY = Path(__file__).parent / "faulty_app"
TIMEOUT = 300.0  # seconds; of whatever should take a few


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


def wait_for(what: Callable[[], object], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def rounds_done(folder: Path) -> list[int]:
    if not (folder / "metrics.jsonl").exists():
        return []
    return [r["round"] for r in records(folder, "round")]


@pytest.mark.slow
def test_the_superlink_restarted_on_its_database(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "run"
    config: dict[str, Any] = {"output": str(folder), "rounds": 6}
    with Durable(timeout=TIMEOUT) as link:
        nodes = [link.start_supernode(f"partition-id={i}") for i in range(2)]
        run = link.run(FAULTY, config)
        wait_for(lambda: 2 in rounds_done(folder))
        link.crash()
        time.sleep(5)
        link.restart()
        wait_for(lambda: link.status(run).status.startswith("finished"))
        assert not link.status(run).completed
        assert all(node.poll() is None for node in nodes)
        again = link.run(FAULTY, {**config, "resume-from": "latest"})
        log = "\n".join(link.stream(again))
        assert link.status(again).completed, (link.status(again), log)
    assert "resumed after round" in log
    final = json.loads((folder / "final.json").read_text())
    # Each round adds the mean of 1 and 2: none is lost, and none is counted twice.
    assert final["head.bias"] == pytest.approx([1 + 6 * 1.5] * 2)


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
    """Kill a simulation with everything it started, at once."""
    main = psutil.Process(pid)
    family = {main, *main.children(recursive=True)}
    marks = {p.environ().get(MARK) for p in family if p.is_running()} - {None}
    for process in psutil.process_iter():  # what Flower put into sessions of its own
        try:
            if process.environ().get(MARK) in marks:
                family |= {process, *process.children(recursive=True)}
        except (psutil.Error, OSError):
            continue
    for process in family:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def untimed(folder: Path, kind: str) -> list[dict]:
    """Return records without what two runs never have in common: times, and ids of nodes."""
    timed = {"at", "node", "seconds", "train_seconds", "aggregate_seconds", "clock_seconds",
             "clock_total", "compute_seconds", "upload_seconds", "bottleneck"}  # fmt: skip
    return [{k: v for k, v in record.items() if k not in timed} for record in records(folder, kind)]
