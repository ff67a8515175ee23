"""A real SuperLink with two real SuperNodes, each a process of its own."""

import json
from pathlib import Path

import pytest

from fedlora_app.launch.superlink import RunStatus, SuperLink, SuperLinkError
from tests.integration.conftest import alive

TINY = Path(__file__).parent / "tiny_app"


def test_supernodes_run_the_app_and_nothing_stays(tmp_path: Path) -> None:
    output = tmp_path / "a folder" / "with 'quotes'"
    with SuperLink() as link:
        nodes = [link.start_supernode(f"partition-id={partition}") for partition in (4, 7)]
        run_id = link.run(TINY, {"rounds": 1, "output": str(output)})
        log = "\n".join(link.stream(run_id))
        status = link.status(run_id)
        assert all(node.poll() is None for node in nodes)
        processes = link.processes()

    assert "round 1: [4, 7]" in log
    assert status == RunStatus("finished:completed", "N/A")
    assert status.completed
    kinds = [json.loads(line)["kind"] for line in (output / "metrics.jsonl").open()]
    assert kinds == ["round-start", "client", "client", "round"]
    assert len(processes) >= 4  # SuperLink, SuperExec, two SuperNodes
    assert not link.processes()
    assert not any(alive(process) for process in processes)
    assert not link.home.exists()


def test_a_run_is_stopped(tmp_path: Path) -> None:
    with SuperLink() as link:
        run_id = link.run(TINY, {"rounds": 1, "output": str(tmp_path)})  # waits for two nodes
        link.stop(run_id)
        assert link.status(run_id).status == "finished:stopped"
        with pytest.raises(SuperLinkError, match="flwr stop failed"):
            link.stop(run_id)


def test_a_superlink_that_cannot_start_says_why_and_cleans_up() -> None:
    link = SuperLink(simulation=True)
    link.address = "192.0.2.1:9"  # of no machine
    with pytest.raises(SuperLinkError, match=r"(?s)ended with code 1:.*192\.0\.2\.1"), link:
        pass
    assert not link.processes()
    assert not link.home.exists()


def test_one_that_is_not_waited_for_says_so_when_it_is_used(tmp_path: Path) -> None:
    with SuperLink(simulation=True, wait=False) as link:
        run_id = link.run(TINY, {"rounds": 1, "output": str(tmp_path)}, {"num-supernodes": 2})
        assert "\n".join(link.stream(run_id))
    link = SuperLink(simulation=True, wait=False)
    link.address = "192.0.2.1:9"  # of no machine
    with link, pytest.raises(SuperLinkError, match=r"ended with code 1"):
        link.run(TINY, {"rounds": 1})
    assert not link.processes()


def test_a_flower_without_its_programs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    link = SuperLink()
    monkeypatch.setattr("fedlora_app.launch.superlink.PROGRAM", "flower-elsewhere")
    with pytest.raises(SuperLinkError, match=r"no program flower-elsewhere beside .*python"), link:
        pass
    assert not link.home.exists()
