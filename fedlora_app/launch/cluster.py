"""Simulations on a Ray cluster that already runs: take the code along, check the rest.

Ray sends neither Python packages nor models nor data to its nodes, and Flower does not send
them its app either. So the app's code is added to Ray's runtime environment, and before the
first round every node says whether it could be a client of this run.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a node that lacks their packages has to be able to say so
    from fedlora_app.config.keys import RunConfig, Scalar
    from fedlora_app.tasks import Rows

PACKAGES = ("flwr", "flwr-datasets", "torch", "peft", "transformers")
"""What has to have the same version on every node, or clients would not compute the same."""

HOOK = "fedlora_app.launch.cluster.with_code"
"""Value of ``RAY_RUNTIME_ENV_HOOK`` that has every ``ray.init`` take the code along."""


class ClusterError(RuntimeError):
    """A Ray cluster cannot be reached, or some node of it cannot be a client."""


def with_code(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a Ray runtime environment that takes the app's code along.

    In the process of a run, that is the code of the submitted app.
    """
    code = {"py_modules": [str(folder) for folder in _folders()], "excludes": ["__pycache__"]}
    return dict(runtime_env or {}) | code


def check(
    address: str, config: RunConfig, *, cpus: int = 1, gpus: float = 0.0, timeout: float = 600
) -> int:
    """Have every node of a Ray cluster on which clients would run load what a client needs.

    This process attaches to the cluster and leaves it again; the cluster goes on.

    Parameters
    ----------
    address : str
        ``host:port`` of the cluster's head, or ``auto`` for the one on this machine.
    config : RunConfig
    cpus, gpus : int, float
        What a client takes (default: 1 and 0).
    timeout : float (default: 600)
        Seconds in which all nodes have to answer.

    Returns
    -------
    int
        How many clients can run at once.

    Raises
    ------
    ClusterError
        If the cluster cannot be reached or has no room for a client, or with everything
        that some node lacks.
    """
    with _attached(address) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        room = {node["NodeID"]: _room(node["Resources"], cpus, gpus) for node in nodes}
        used = [node for node in nodes if room[node["NodeID"]]]
        if not used:
            has = ", ".join(f"{_name(n)}: {_resources(n['Resources'])}" for n in nodes)
            raise ClusterError(
                f"no node of the Ray cluster at {address} has room for a client of {cpus} CPUs and "
                f"{gpus:g} GPUs ({has}); lower --cpus-per-client or --gpus-per-client, or add nodes"
            )
        answers = _ask(ray, used, config.to_flat(), timeout)
    from fedlora_app.tasks import make_task

    here, data, code = versions(), digest(make_task(config).train_rows()), code_digest()
    problems = [
        f"{_name(node)}: {problem}"
        for node, answer in zip(used, answers, strict=True)
        for problem in _compare(answer, here, data, code)
    ]
    if problems:
        raise ClusterError(
            f"nodes of the Ray cluster at {address} cannot run clients:\n  " + "\n  ".join(problems)
        )
    return sum(room.values())


def examine(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """Load, on a node, what a client of this run config loads, and return what came of it.

    Returns
    -------
    dict
        ``versions`` as of ``versions()``; ``data``, a digest of the training rows, empty
        without them; ``code``, one of the app's code, which lies in ``folder``;
        ``problems``, texts.
    """
    found: dict[str, Any] = {"versions": versions(), "data": "", "problems": []}
    try:
        found |= {"code": code_digest(), "folder": str(Path(__file__).parents[2])}
        from fedlora_app import client_app  # noqa: F401  (and all that it imports)
        from fedlora_app.config.keys import RunConfig
        from fedlora_app.config.precision import with_precision
        from fedlora_app.models.pretrained import locate
        from fedlora_app.tasks import make_task

        config = with_precision(RunConfig.from_flat(flat))
    except ImportError as error:
        found["problems"].append(_say(error))
        return found
    try:
        task = make_task(config)
        rows = task.train_rows()
        found["data"] = digest(rows)
    except (ImportError, OSError, ValueError) as error:
        found["problems"].append(_say(error))
    try:
        if not found["data"]:  # what the model's head is to tell apart is not known
            locate(config.model.name)
        else:
            task.model(rows.about, seed=0, precision=config.train.precision)
    except (ImportError, OSError, ValueError) as error:
        found["problems"].append(_say(error))
    return found


def versions() -> dict[str, str]:
    """Return the versions of ``PACKAGES`` here; of what is not installed, an empty text."""
    found = {}
    for name in PACKAGES:
        try:
            # "2.6.0+cpu" and "2.6.0+cu124" are the same torch.
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def digest(rows: Rows) -> str:
    """Return a digest of the training rows, which all nodes have to divide up alike."""
    summary = hashlib.sha256(json.dumps(rows.about, sort_keys=True).encode())
    for item, target in zip(rows.items, rows.targets, strict=True):
        summary.update(f"{item!r}\0{target!r}\0".encode("utf-8", "surrogatepass"))
    return summary.hexdigest()


def code_digest() -> str:
    """Return a digest of the app's code as it is imported here."""
    summary = hashlib.sha256()
    for folder in _folders():
        for file in sorted(folder.rglob("*.py")):
            summary.update(f"{file.relative_to(folder.parent).as_posix()}\0".encode())
            summary.update(file.read_bytes())
    return summary.hexdigest()


def _folders() -> list[Path]:
    """Return the folders of the packages that a client imports from this app."""
    import strategies

    return [Path(__file__).parents[1], Path(str(strategies.__file__)).parent]


@contextmanager
def _attached(address: str) -> Iterator[Any]:
    """Attach this process to the cluster, with the app's code, as Flower will."""
    host, colon, port = address.rpartition(":")
    if "://" in address or (address != "auto" and not (colon and port.isdecimal())):
        raise ClusterError(
            f"Ray cluster: expected auto or host:port, as `ray start --head` prints it for "
            f"`ray start --address`; got {address!r}"
        )
    if colon:
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ClusterError(
                f"nothing answers at {address} ({error}); start the cluster's head with "
                f"`ray start --head --port={port}`, or correct the address"
            ) from error
    # As Flower has it: under `uv run`, Ray would ignore the runtime environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    try:
        with warnings.catch_warnings(action="ignore"):
            ray.init(
                address, runtime_env=with_code(paths), log_to_driver=False, logging_level="ERROR"
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cannot attach to the Ray cluster at {address}: {_say(error.__cause__ or error)}; "
            "this machine has to be one of its nodes "
            f"(`ray start --address={address} --num-cpus=0` makes it one without clients)"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _ask(
    ray: Any, nodes: list[dict[str, Any]], flat: Mapping[str, Scalar], timeout: float
) -> list[dict[str, Any]]:
    """Run ``examine`` on every node at once; a node that cannot has its reason as a problem."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # It takes no CPU, so that a busy node answers as well.
    task = ray.remote(num_cpus=0, max_retries=0)(examine)
    asked = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(flat)
        for node in nodes
    ]
    deadline = time.monotonic() + timeout
    answers = []
    for question in asked:
        try:
            answers.append(ray.get(question, timeout=max(0, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            answers.append({"problems": [f"did not answer within {timeout:g} s"]})
        except ray.exceptions.RayError as error:
            answers.append({"problems": [str(error).strip().splitlines()[-1]]})
    return answers


def _compare(
    answer: Mapping[str, Any], here: Mapping[str, str], data: str, code: str
) -> Iterator[str]:
    """Yield what a node lacks, or has otherwise than the machine that starts the run."""
    yield from answer["problems"]
    for name, version in answer.get("versions", {}).items():
        if not version:
            yield f"{name} is not installed; run `pip install {name}=={here[name]}`"
        elif version != here[name]:
            yield (
                f"{name} {version} is installed, but {here[name]} on this machine; "
                f"run `pip install {name}=={here[name]}`"
            )
    # Ray looks in the folder where the run was started first, if a node has one of that name.
    if answer.get("code", code) != code:
        yield f"other code of this app is in the way in {answer['folder']}; update or remove it"
    if answer.get("data") and answer["data"] != data:
        yield "its training rows are not those of this machine; copy the data set anew"


def _room(resources: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many clients Flower starts on a node with these resources."""
    by_cpus = int(resources.get("CPU", 0) / cpus)
    return min(by_cpus, int(resources.get("GPU", 0) / gpus)) if gpus else by_cpus


def _resources(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _name(node: Mapping[str, Any]) -> str:
    name, address = node["NodeName"], node["NodeManagerAddress"]
    return f"node {name}" if name == address else f"node {name} ({address})"


def _say(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__
