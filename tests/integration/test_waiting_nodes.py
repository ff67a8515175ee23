"""Eight real SuperNodes of which one is stopped, one killed, and one comes back."""

import signal
import time
from collections import Counter

import pytest

from fedlora_app.launch.superlink import SuperLink
from tests.integration.conftest import ROOT, records, wait_for
from tests.integration.test_faults import TIMEOUT, Run, begun, watch

NODES = 8
ROUNDS = 6


def node(link: SuperLink, partition: int):
    return link.start_supernode(f"partition-id={partition}")


def timed(link: SuperLink, folder, config, meanwhile=lambda: None) -> tuple[Run, float]:
    began = time.monotonic()
    run = watch(link, folder, {"rounds": ROUNDS, "min-nodes": NODES, **config}, meanwhile)
    assert run.status.completed, (run.status, run.log)
    return run, time.monotonic() - began


def moved(run: Run) -> float:
    """Return where the model must be: every good reply counts once, late ones as their change."""
    total = 1.0
    for server_round in range(1, ROUNDS + 1):
        steps = [r["client"] + 1 for r in records(run.folder, "client")
                 if (r["round"], r["status"]) == (server_round, "ok")]  # fmt: skip
        total += sum(steps) / len(steps) if steps else 0
    return total


@pytest.mark.slow
def test_one_stopped_one_killed_and_one_that_comes_back(tmp_path, monkeypatch):
    """A quorum of six: the round goes on; nothing is lost, and nothing counted twice."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with SuperLink(timeout=TIMEOUT) as link:
        nodes = [node(link, i) for i in range(NODES)]
        good, usual = timed(link, tmp_path / "good", {})
        folder = tmp_path / "bad"

        def faults() -> None:
            wait_for(lambda: begun(folder, 2))
            time.sleep(1)
            nodes[6].send_signal(signal.SIGSTOP)
            nodes[7].send_signal(signal.SIGKILL)
            wait_for(lambda: begun(folder, 4))
            nodes[6].send_signal(signal.SIGCONT)
            node(link, 7)

        bad, took = timed(link, folder, {"quorum": 6.0}, faults)
    assert all(r["accepted"] == NODES for r in records(good.folder, "round"))
    assert good.final() == pytest.approx(1 + ROUNDS * sum(range(1, NODES + 1)) / NODES)
    books = records(bad.folder, "round")
    assert all(r["accepted"] >= 6 for r in books)  # nobody waits for two of eight
    done = [r for r in records(bad.folder, "client") if r["status"] == "ok"]
    assert max(Counter((r["client"], r["asked"], r["node"]) for r in done).values()) == 1
    assert bad.final() == pytest.approx(moved(bad), rel=1e-4)
    print(f"eight good ones: {usual:.0f} s; with faults: {took:.0f} s; "
          f"late ones that counted: {sum(r.get('stale', 0) for r in books)}")  # fmt: skip
    assert took < 2 * usual + 60
