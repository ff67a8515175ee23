"""Real runs of the real app, kept small: few steps, short texts."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

#: Small enough for a test, real in everything else.
SMALL = {
    "rounds": 2,
    "train.steps": 3,
    "train.precision": "float32",  # the golden numbers are those of every machine
    "data.max-length": 16,
    "data.test-rows": 200,
    "evaluate.every": 1,
    "evaluate.clients": 1.0,
    "sampling.fraction": 1.0,
    "ranks.list": "4,8,16,32",
}


def wait_for(what: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def own_scores(folder: Path, name: str) -> list[dict]:
    """Return what a round's record is to say of the clients' own evaluations of one score."""
    found = []
    for book in records(folder, "round")[1:]:
        own = [r for r in records(folder, "client-evaluation") if r["round"] == book["round"]]
        total = sum(r["num-examples"] for r in own)
        mean = sum(r[name] * r["num-examples"] for r in own) / total
        found.append({"mean": mean, "low": min(r[name] for r in own), "clients": len(own)})
    return found


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Path:
    """Return the folder of one run of ``run_simulation.py``, shared by the tests."""
    from run_simulation import main

    folder = tmp_path_factory.mktemp("runs") / "simulated"
    config = [f"{key}={value}" for key, value in SMALL.items()]
    assert main(["--clients", "4", "--output", str(folder), "--config", *config]) == 0
    return folder
