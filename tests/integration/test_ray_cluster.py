"""A Ray cluster of two nodes, started as a user starts one, and runs attached to it."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from fedlora_app.config.keys import RunConfig
from fedlora_app.launch import cluster as cluster_module
from fedlora_app.launch.cluster import ClusterError, check, examine
from fedlora_app.launch.ports import free_port
from run_simulation import main
from tests.integration.conftest import SMALL, records

SMALL_LOCAL = SMALL | {"rounds": 1, "data.name": "~/rows.csv", "data.min-samples": 10}


class Cluster(NamedTuple):
    address: str
    homes: dict[str, Path]
    """The home folder of each node, of its own as on another machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need short paths
    port = free_port()
    address = f"127.0.0.1:{port}"
    roles = {
        "first": [
            "--head",
            "--include-dashboard=false",
            f"--port={port}",
            f"--ray-client-server-port={free_port()}",
        ],
        "second": [f"--address={address}"],
    }
    nodes = []
    try:
        for name, role in roles.items():
            (folder / name).mkdir()
            nodes.append(start_node(name, role, folder / name))
            wait_for(nodes[-1], folder / name / "ray.log")
        yield Cluster(address, {name: folder / name for name in roles})
    finally:
        # Not `ray stop`, which ends every Ray on the machine.
        for node in nodes:
            end(node)
        shutil.rmtree(folder, ignore_errors=True)


def start_node(name: str, role: list[str], home: Path) -> psutil.Popen:
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    ray += [f"--node-name={name}", f"--temp-dir={home / 'ray'}", "--disable-usage-stats"]
    ray += ["--object-store-memory=100000000"]
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


def wait_for(node: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 400
    while "Ray runtime started" not in log.read_text():
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def end(node: psutil.Process) -> None:
    processes = [node]
    with suppress(psutil.NoSuchProcess):  # it may have failed to start
        processes += node.children(recursive=True)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def write_rows(home: Path) -> None:
    with (home / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(200):
            kind = ("ships", "wheat")[row % 2]
            writer.writerow([f"{kind} are number {row}", kind])


def run(cluster: Cluster, output: Path) -> int:
    config = [f"{key}={value}" for key, value in SMALL_LOCAL.items()]
    where = ["--output", str(output), "--ray-address", cluster.address]
    return main(["--clients", "4", *where, "--config", *config])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_uses_both_nodes_and_leaves_the_cluster_alone(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    first, second = cluster.homes.values()
    monkeypatch.setenv("HOME", str(first))
    write_rows(first)

    assert run(cluster, tmp_path / "lacking") == 2
    message = capfd.readouterr().err
    assert "node second" in message
    assert "~/rows.csv" in message
    assert "node first" not in message
    assert not list(tmp_path.iterdir())

    shutil.copy(first / "rows.csv", second)
    assert run(cluster, tmp_path / "good") == 0
    assert "2 clients at once" in capfd.readouterr().out
    assert len(records(tmp_path / "good", "client")) == 4
    assert not records(tmp_path / "good", "failure")
    nodes, actors = state(cluster.address)
    assert nodes == ["first", "second"]
    # One actor on each node, and both ended with the run.
    assert actors == [["first", "DEAD"], ["second", "DEAD"]]


def state(address: str) -> tuple[list[str], list[list[str]]]:
    """Return the names of the live nodes, and where actors ran clients and what became of them."""
    script = (
        "import json, sys, ray; from ray._private.state import actors;"
        "ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR');"
        "names = {node['NodeID']: node['NodeName'] for node in ray.nodes() if node['Alive']};"
        "ran = [(names[a['Address']['NodeID']], a['State']) "
        "for a in actors().values() if a['ActorClassName'] == 'ClientAppActor'];"
        "print(json.dumps([sorted(names.values()), sorted(ran)]))"
    )
    out = subprocess.check_output([sys.executable, "-c", script, address], text=True)
    nodes, ran = json.loads(out)
    return nodes, ran


def test_addresses_that_cannot_be_a_cluster() -> None:
    config = RunConfig()
    with pytest.raises(ClusterError, match=r"expected auto or host:port.*got 'ray://head:10001'"):
        check("ray://head:10001", config)
    port = free_port()
    with pytest.raises(ClusterError, match=f"nothing answers at 127.0.0.1:{port}"):
        check(f"127.0.0.1:{port}", config)


@pytest.mark.slow
@pytest.mark.timeout(1200)
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


def test_what_a_node_has_otherwise_is_said_with_what_to_do() -> None:
    here = {"torch": "2.6.0", "peft": "0.17.0"}
    answer = {
        "problems": ["no model"],
        "versions": {"torch": "2.5.1", "peft": ""},
        "data": "b",
        "code": "d",
        "folder": "/opt",
    }
    said = list(cluster_module._compare(answer, here, "a", "c"))
    assert said[0] == "no model"
    assert said[1].startswith("torch 2.5.1 is installed, but 2.6.0 on this machine")
    assert said[2].startswith("peft is not installed; run `pip install peft==0.17.0`")
    assert said[3].startswith("other code of this app is in the way in /opt")
    assert said[4].startswith("its training rows are not those of this machine")
    assert len(said) == 5
