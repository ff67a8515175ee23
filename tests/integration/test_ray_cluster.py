"""A Ray cluster of two nodes, started as a user starts one, and runs attached to it."""

import csv
import json
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
import torch

from fedlora_app import cluster as cluster_module
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


def write_rows(home: Path, suffix: str = "") -> None:
    with (home / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(200):
            kind = ("ships", "wheat")[row % 2]
            writer.writerow([f"{kind} are number {row}{suffix}", kind])


def run(cluster: Cluster, output: Path) -> int:
    config = [f"{key}={value}" for key, value in SMALL_LOCAL.items()]
    return main(
        ["--clients", "4", "--output", str(output), "--ray-address", cluster.address]
        + ["--config", *config]
    )


def test_a_run_uses_both_nodes_and_leaves_the_cluster_alone(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    first, second = cluster.homes.values()
    monkeypatch.setenv("HOME", str(first))
    write_rows(first)

    # The second node has no such file, then another one, and is named each time.
    assert run(cluster, tmp_path / "lacking") == 2
    message = capfd.readouterr().err
    assert "node second" in message
    assert "~/rows.csv" in message
    assert "node first" not in message
    write_rows(second, suffix=" again")
    assert run(cluster, tmp_path / "other") == 2
    assert "training rows are not those of this machine" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())

    shutil.copy(first / "rows.csv", second)
    assert run(cluster, tmp_path / "good") == 0
    assert "2 clients at once" in capfd.readouterr().out
    (summary,) = records(tmp_path / "good", "round")
    assert summary["clients"] == 4

    placed = placement(cluster.address)
    assert placed == {"first": ["DEAD"], "second": ["DEAD"]}  # one actor each, gone with the run
    assert all(node.is_running() for node in cluster.nodes.values())
    assert alive(cluster.address) == 2


def placement(address: str) -> dict[str, list[str]]:
    """Return the states of the actors that ran clients on each node."""
    script = (
        "import json, sys, ray; from ray._private.state import actors;"
        "ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR');"
        "names = {node['NodeID']: node['NodeName'] for node in ray.nodes()};"
        "print(json.dumps([(names[a['Address']['NodeID']], a['State']) "
        "for a in actors().values() if a['ActorClassName'] == 'ClientAppActor']))"
    )
    out = subprocess.check_output([sys.executable, "-c", script, address], text=True)
    placed: dict[str, list[str]] = {}
    for name, state in json.loads(out):
        placed.setdefault(name, []).append(state)
    return placed


def test_addresses_that_cannot_be_a_cluster() -> None:
    config = RunConfig()
    with pytest.raises(ClusterError, match=r"expected auto or host:port.*got 'ray://head:10001'"):
        check("ray://head:10001", config)
    port = free_port()
    with pytest.raises(ClusterError, match=f"nothing answers at 127.0.0.1:{port}"):
        check(f"127.0.0.1:{port}", config)


def test_a_cluster_without_room_for_a_client(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"room for a client of 2 CPUs.*node second.*1 CPUs"):
        check(cluster.address, RunConfig(), cpus=2)


def test_a_node_names_a_missing_model_and_data_together() -> None:
    flat = {"model.name": "./no-model", "data.name": "packaged:none"}
    found = examine(flat)
    assert len(found["problems"]) == 2
    assert "packaged:none" in found["problems"][0]
    assert "no-model" in found["problems"][1]
    assert found["data"] == ""
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_versions_are_compared_without_the_build() -> None:
    here = {"torch": "2.6.0", "peft": "0.17.0"}
    answer = {"versions": {"torch": "2.5.1", "peft": ""}, "data": "a", "problems": ["no model"]}
    said = list(cluster_module._compare(answer, here, "a"))
    assert said[0] == "no model"
    assert said[1].startswith("torch 2.5.1 is installed, but 2.6.0 on this machine")
    assert said[2].startswith("peft is not installed; run `pip install peft==0.17.0`")
    assert len(said) == 3
