"""The SuperNode that starts its clients warm: what it does, and that it ends as Flower's does."""

import json
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

from fedlora_app.launch.superlink import SuperLink
from tests.integration.conftest import ROOT, alive, records, wait_for

TINY = Path(__file__).parent / "tiny_app"


def test_warm_nodes_run_an_app_and_go_on_cold_without_the_process_they_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with SuperLink() as link:
        nodes = [
            link.start_supernode(f"partition-id={partition}", warm=True) for partition in (4, 7)
        ]
        # Each of them has an executor, and that the process that is copied.
        wait_for(lambda: all(len(descendants(node)) == 2 for node in nodes))
        executor, copied = descendants(nodes[0])
        assert copied.ppid() == executor.pid
        run_id = link.run(TINY, {"rounds": 1, "output": str(tmp_path / "warm")})
        warm = "\n".join(link.stream(run_id))
        copied.kill()
        run_id = link.run(TINY, {"rounds": 2, "output": str(tmp_path / "cold")})
        cold = "\n".join(link.stream(run_id))

        nodes.append(link.start_supernode("partition-id=9", warm=True))
        wait_for(lambda: len(descendants(nodes[2])) == 2)
        started = [process for node in nodes for process in descendants(node)]
        executor.kill()  # the SuperNode would stay, and do nothing
        nodes[1].terminate()
        nodes[2].kill()
        assert [node.wait(30) for node in nodes] == [1, 0, -signal.SIGKILL]
        wait_for(lambda: not any(alive(process) for process in started))
    assert "round 1: [4, 7]" in warm
    assert "round 1: [4, 7]" in cold
    assert "round 2: [4, 7]" in cold
    assert len(records(tmp_path / "cold", "round")) == 2


def test_a_node_whose_clients_cannot_start_ends_and_says_why(tmp_path, monkeypatch) -> None:
    """A stopped executor and a stopped process to copy; the rest of the run goes on without."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with SuperLink() as link:
        nodes = [
            link.start_supernode(f"partition-id={i}", warm=True, options=["--patience", "20"])
            for i in (4, 7, 9)
        ]
        wait_for(lambda: all(len(descendants(node)) == 2 for node in nodes))
        started = [process for node in nodes for process in descendants(node)]
        executor, _ = descendants(nodes[0])
        _, copied = descendants(nodes[1])
        executor.suspend()
        copied.suspend()
        wait_for(lambda: all("SuperNode ID" in log_of(link, i) for i in (1, 2, 3)))
        run_id = link.run(TINY, {"rounds": 2, "output": str(tmp_path / "run")})
        said = "\n".join(link.stream(run_id))
        assert [node.wait(30) for node in nodes[:2]] == [1, 1]
        logs = [log_of(link, number) for number in (1, 2)]
        nodes[2].terminate()
        assert nodes[2].wait(30) == 0, log_of(link, 3)  # that was a wish
        wait_for(lambda: not any(alive(process) for process in started))
    assert "round 1: [9]" in said
    assert "round 2: [9]" in said
    for log in logs:
        assert "this SuperNode ends: for 20 s it has had a message, but neither a client" in log


def test_a_client_ends_with_a_supernode_that_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with SuperLink() as link:
        nodes = [link.start_supernode(f"partition-id={i} seconds=600", warm=True) for i in (4, 7)]
        wait_for(lambda: all(len(descendants(node)) == 2 for node in nodes))
        descendants(nodes[1])[1].kill()  # so that its client starts cold
        link.run(TINY, {"rounds": 1, "output": str(tmp_path / "run")})
        wait_for(lambda: all("Received successfully" in log_of(link, i) for i in (1, 2)))
        wait_for(lambda: [len(descendants(node)) for node in nodes] == [3, 2])
        started = [process for node in nodes for process in descendants(node)]
        for node in nodes:
            node.kill()
        wait_for(lambda: not any(alive(process) for process in started), seconds=10)


def test_a_client_stays_for_the_messages_of_its_app(tmp_path, monkeypatch) -> None:
    """Not after one that failed, nor for another bundle, nor with ``--keep 0``."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    other = tmp_path / "other"
    shutil.copytree(TINY, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "tiny_app" / "__init__.py").write_text('"""Another version."""\n')
    with SuperLink() as link:
        says = "says-process=true partition-id="
        link.start_supernode(f"{says}4", warm=True)
        link.start_supernode(f"{says}7 fails-in=2", warm=True)
        link.start_supernode(f"{says}9", warm=True, options=["--keep", "0"])
        wait_for(lambda: all("SuperNode ID" in log_of(link, i) for i in (1, 2, 3)))
        for app, rounds in ((TINY, 3), (TINY, 1), (other, 1)):
            output = str(tmp_path / f"{app.name}-{rounds}")
            said = "\n".join(link.stream(link.run(app, {"rounds": rounds, "output": output})))
            assert "round 1: [4, 7, 9]" in said
        stays, failed, never = ([*map(int, re.findall(r"process (\d+)", log_of(link, i)))]
                                for i in (1, 2, 3))  # fmt: skip
    assert len(stays) == len(failed) == len(never) == 5
    assert len({*stays[:4]}) == 1
    assert stays[4] != stays[3]
    assert failed[0] == failed[1] != failed[2] == failed[3]
    assert len({*never}) == 5


def log_of(link: SuperLink, number: int) -> str:
    return (link.home / f"supernode-{number}.log").read_text()


def descendants(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes a node has started, without what ended and what Flower starts cold."""
    found = psutil.Process(node.pid).children(recursive=True)
    return sorted((p for p in found if alive(p)), key=lambda process: process.create_time())


def test_every_copy_is_a_process_of_its_own_with_its_own_chance() -> None:
    script = """
import json, os, random, sys
import numpy
module = sys.modules["flwr.supernode.cli.flwr_clientapp"] = type(sys)("stub")
def flwr_clientapp():
    app = any(name.startswith(("fedlora_app", "strategies")) for name in sys.modules)
    drawn = [random.random(), numpy.random.random()]
    print(json.dumps([os.getpid(), sys.argv, drawn, app]), flush=True)
module.flwr_clientapp = flwr_clientapp
from fedlora_app.launch.warm import serve
reader, writer = os.pipe()
os.write(writer, b'["app", ["a", "1"]]\\n["app", ["a", "2"]]\\n')
os.close(writer)
serve(os.fdopen(reader, "rb", buffering=0), ["json", "no_such_module", "strategies"])
try:
    os.wait()  # the copies end with this process
except ChildProcessError:
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ,
    )
    wait_for(lambda: done.stdout.count("\n") == 2)
    first, second = (json.loads(line) for line in sorted(done.stdout.splitlines(), key=last_word))
    assert (first[1], second[1]) == (["a", "1"], ["a", "2"])
    assert first[0] != second[0]
    assert not set(first[2]) & set(second[2])
    assert not first[3]  # the app comes with the message
    assert "cannot preload no_such_module" in done.stderr


STAYING = """
import json, os, sys, time
import flwr.supernode.runtime.run_clientapp as run_clientapp
module = sys.modules["flwr.supernode.cli.flwr_clientapp"] = type(sys)("stub")
def flwr_clientapp():
    time.sleep(float(sys.argv[1]))
    print(json.dumps([sys.argv[2], os.getpid()]), flush=True)
    run_clientapp.flwr_exit(int(sys.argv[3]))
module.flwr_clientapp = flwr_clientapp
from fedlora_app.launch.warm import serve
print("ready", flush=True)
serve(os.fdopen(0, "rb", buffering=0), [], keep=1.5)
"""


def test_one_client_stays_at_most_and_not_for_ever() -> None:
    command = [sys.executable, "-c", STAYING]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:

        def answers(*asked: tuple[str, float, int]) -> dict[str, int]:
            for number, (app, seconds, code) in enumerate(asked):
                words = ["flwr-clientapp", str(seconds), f"{app}{number}", str(code)]
                process.stdin.write(json.dumps([app, words]) + "\n")
            process.stdin.flush()
            found = dict(json.loads(process.stdout.readline()) for _ in asked)
            time.sleep(0.3)  # until what stays has said so
            return found

        assert process.stdout.readline() == "ready\n"
        first = answers(("a", 0.5, 0), ("a", 0, 0))  # the second finds it busy
        assert first["a0"] != first["a1"]
        assert not psutil.pid_exists(first["a1"])
        assert answers(("a", 0, 0)) == {"a0": first["a0"]}
        assert answers(("b", 0, 0))["b0"] != first["a0"]
        assert not psutil.pid_exists(first["a0"])  # only one at a time
        failed = answers(("b", 0, 1))["b0"]
        assert not psutil.pid_exists(failed)
        stays = answers(("b", 0, 0))["b0"]
        assert stays != failed
        assert psutil.pid_exists(stays)
        wait_for(lambda: not psutil.pid_exists(stays), seconds=5)  # 1.5 s without a message
        again = answers(("b", 0, 0))["b0"]
        psutil.Process(again).kill()  # as one without memory is
        assert answers(("b", 0, 0))["b0"] != again
        process.stdin.close()
        assert process.wait(10) == 0


def last_word(line: str) -> str:
    return str(json.loads(line)[1][-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--isolation", "subprocess"], "--isolation is set by this command"),
        (["--poll", "0"], "expected a number of seconds above 0, got 0.0"),
        (["--keep", "-1"], "expected a number of seconds of at least 0, got -1.0"),
        (["--keep", "inf"], "expected a number of seconds of at least 0, got inf"),
        (["--patience", "-1"], "expected a number of seconds above 0, got -1.0"),
        (["--node-config", "max-rank=0"], "max-rank: expected a whole number of at least 1"),
        (["--node-config", 'data-path="/no/such.csv"'], "expected this node's data here"),
    ],
)
def test_what_it_cannot_do_is_refused(words, message) -> None:
    command = [sys.executable, "-m", "fedlora_app.supernode", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert message in done.stderr
