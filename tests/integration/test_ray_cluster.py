"""A Ray cluster of two nodes, started as a user starts one, and runs attached to it."""

import csv
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from fedlora_app.cluster import ClusterError, check, examine
from fedlora_app.config import RunConfig
from run_simulation import main
from tests.integration.conftest import SMALL, records

SMALL_LOCAL = SMALL | {"rounds": 1, "data.name": "~/rows.csv", "data.min-samples": 10}


class Cluster(NamedTuple):
    address: str
    homes: dict[str, Path]
    """The home folder of each node, of its own as on another machine."""
    nodes: dict[str, psutil.Process]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need short paths
    address = f"127.0.0.1:{free_port()}"
    homes = {name: folder / f"home-{name}" for name in ("first", "second")}
    started: list[psutil.Process] = []
    nodes = {}
    try:
        for name, home in homes.items():
            home.mkdir()
            role = (
                ["--head", f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1"]
                if name == "first"
                else [f"--address={address}"]
            )
            nodes[name] = start_node(name, role, home)
            started.append(nodes[name])
            wait_for(address, len(nodes))
        yield Cluster(address, homes, nodes)
    finally:
        # Not `ray stop`, which ends every Ray on the machine.
        for node in started:
            end(node)
        shutil.rmtree(folder, ignore_errors=True)


def start_node(name: str, role: list[str], home: Path) -> psutil.Process:
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    ray += [f"--node-name={name}", f"--temp-dir={home / 'ray'}", "--include-dashboard=false"]
    ray += ["--object-store-memory=100000000", "--disable-usage-stats"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with (home / "ray.log").open("wb") as log:
        return psutil.Popen(
            [*ray, *role],
            cwd=home,
            env=environment | {"HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, nodes: int) -> None:
    deadline = time.monotonic() + 120
    while alive(address) < nodes:
        assert time.monotonic() < deadline, f"{nodes} Ray nodes did not come up"
        time.sleep(0.5)


def alive(address: str) -> int:
    """Return how many nodes of the cluster live, as Ray's own command sees it."""
    script = (
        "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR');"
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, address], capture_output=True, text=True, timeout=120
    )
    return int(done.stdout) if done.returncode == 0 else 0


def end(node: psutil.Process) -> None:
    processes = [node, *node.children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(processes, timeout=20)
