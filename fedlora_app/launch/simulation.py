"""One federated simulation: read what is asked, check it, run it, and leave nothing behind.

``fedlora run`` and ``python run_simulation.py`` call ``start``, which brings up a SuperLink of its
own, runs the app on it, shows what the app says and ends every process it started: at the end,
on failure and on Ctrl-C. ``fedlora check`` calls it up to where something would start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.config.fields import typed_value, unknown_key
from fedlora_app.config.keys import ConfigError, RunConfig, Scalar
from fedlora_app.config.read import read_config
from fedlora_app.flower import flatten_dict
from fedlora_app.launch import cluster
from fedlora_app.launch.console import Console
from fedlora_app.launch.copies import Copies
from fedlora_app.launch.folders import refuse_used
from fedlora_app.launch.inspection import CHECKED, CLIENTS, clients_of, inspect
from fedlora_app.launch.processes import exit_on_signals
from fedlora_app.launch.project import project_folder
from fedlora_app.launch.ray_head import RayHead
from fedlora_app.launch.superlink import SuperLink, SuperLinkError
from fedlora_app.tasks import make_task

if TYPE_CHECKING:
    from fedlora_app.config.build import Parts

OPTIONS = {"rounds": "rounds", "output": "output", "resume-from": "resume"}  # keys with their own


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Parameters
    ----------
    clients : int, optional
        Simulated clients (default: 10; with ``data.partition=natural`` as many as its column
        names).
    rounds : int, optional
        The key ``rounds`` (default: as in the project's ``pyproject.toml``).
    output : str, optional
        Folder of the results (default: ``runs/<time>-<aggregation>``).
    pairs : sequence of (str, str)
        Keys of the run config and their values, as text (default: none).
    cpus_per_client, gpus_per_client : int, float
        What a client takes of a machine (default: 1 and 0).
    ray_address : str
        Simulate on this Ray cluster; empty: on a Ray of its own (default).
    resume : bool
        Go on with the run in ``output`` (default: False).
    verbose : bool
        Show Flower's and Ray's own lines too (default: False).
    """

    clients: int | None = None
    rounds: int | None = None
    output: str | None = None
    pairs: Sequence[tuple[str, str]] = ()
    cpus_per_client: int = 1
    gpus_per_client: float = 0.0
    ray_address: str = ""
    resume: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class Plan:
    """A run that could start.

    Parameters
    ----------
    changes : mapping
        What of its config differs from the project's ``pyproject.toml``.
    clients : int
    rounds : int
        0: not known.
    folder : Path, optional
        Where it writes, if that is known.
    """

    changes: Mapping[str, Scalar]
    clients: int
    rounds: int
    folder: Path | None


def read_plan(project: Path, asked: Asked) -> tuple[Plan, RunConfig]:
    """Return the run of this app that is asked for, and its config.

    Raises
    ------
    ConfigError
        If the app could not run with it.
    """
    changes = _changes(asked, RunConfig().to_flat())
    parts = read_config(_keys_of(project) | changes)
    config = parts.config
    clients = clients_of(parts.task) if asked.clients is None else asked.clients
    if problems := _too_few_clients(parts, clients):
        raise ConfigError(problems)
    # Decided here, so that we know where the app writes and where a relative path begins.
    output = config.output or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{config.aggregation}"
    folder = Path(output).expanduser().absolute()
    refuse_used(folder, resumed=bool(config.resume_from))
    return Plan({**changes, "output": str(folder)}, clients, config.rounds, folder), config


def read_other(project: Path, asked: Asked) -> Plan:
    """Return the run of another Flower app that is asked for: only its keys are looked at.

    Raises
    ------
    ConfigError
        If a key is not one of its ``pyproject.toml``, or of another type.
    FileNotFoundError
        If there is no such app.
    """
    known = _keys_of(project)
    changes = _changes(asked, known)
    problems = [unknown_key(key, list(known)) for key in changes if key not in known]
    for key, value in changes.items():
        kind, given = type(known.get(key, value)), type(value)
        if kind is not given and (kind, given) != (float, int):
            problems.append(f"{key}: expected {kind.__name__}, got {value!r}")
    if problems:
        raise ConfigError(problems)
    rounds = (known | changes).get("rounds")
    folder = Path(str(changes["output"])).absolute() if "output" in changes else None
    return Plan(changes, asked.clients or CLIENTS, rounds if isinstance(rounds, int) else 0, folder)


def _keys_of(project: Path) -> dict[str, Scalar]:
    """Return the run config of an app, as its ``pyproject.toml`` has it."""
    toml = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    app: Mapping[str, Any] = toml.get("tool", {}).get("flwr", {}).get("app", {})
    return dict(flatten_dict(app.get("config")))


def _changes(asked: Asked, known: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the keys that are asked for with their values, of the types of those known."""
    if problems := _twice(asked):
        raise ConfigError(problems)
    changes = {key: typed_value(text, known.get(key)) for key, text in asked.pairs}
    if asked.rounds is not None:
        changes["rounds"] = asked.rounds
    if asked.output is not None:
        changes["output"] = asked.output
    if asked.resume:
        changes["resume-from"] = "latest"
    return changes


def check_start(plan: Plan, config: RunConfig, asked: Asked, copies: Copies) -> None:
    """Look at resources, data and model, so that what cannot run stops before anything starts.

    Raises
    ------
    ValueError
        With what is wrong and what to do.
    """
    print(inspect(make_task(config)), flush=True)
    question = {
        "config": config.to_flat(),
        "folder": str(plan.folder),
        "clients": plan.clients,
        # A cluster is asked itself.
        "resources": None if asked.ray_address else [asked.cpus_per_client, asked.gpus_per_client],
    }
    command = copies.command("-m", "fedlora_app.launch.door", json.dumps(question))
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ValueError(done.stderr.rstrip())
    print(done.stderr, end="", file=sys.stderr, flush=True)


def check_cluster(config: RunConfig, asked: Asked) -> None:
    """Have every node of the Ray cluster load what a client needs, before the run starts.

    Raises
    ------
    fedlora_app.launch.cluster.ClusterError
        If a node lacks something, or there is no such cluster.
    """
    room = cluster.check(
        asked.ray_address, config, cpus=asked.cpus_per_client, gpus=asked.gpus_per_client
    )
    print(f"Ray cluster at {asked.ray_address}: {room} clients at once", flush=True)


def simulate(
    project: Path,
    asked: Asked,
    plan: Plan,
    copies: Copies | None = None,
    ray_head: RayHead | None = None,
) -> bool:
    """Run the app in ``project`` and return whether the run completed."""
    federation: dict[str, Scalar] = {
        "num-supernodes": plan.clients,
        "client-resources-num-cpus": asked.cpus_per_client,
        "client-resources-num-gpus": asked.gpus_per_client,
    }
    metrics = plan.folder / "metrics.jsonl" if plan.folder else Path(os.devnull)
    console = Console(metrics, plan.rounds, verbose=asked.verbose)
    print(
        f"{plan.clients} simulated clients"
        + (f", {plan.rounds} rounds" if plan.rounds else "")
        + (f" → {plan.folder}" if plan.folder else ""),
        flush=True,
    )
    link = SuperLink(
        simulation=True,
        ray_address=asked.ray_address,
        copies=copies,
        ray_head=ray_head,
        environment={CHECKED: "1"} if copies is not None else {},
    )
    with link, console:
        run_id = link.run(project, plan.changes, federation)
        for line in link.stream(run_id):
            console.show(line)
        status = link.status(run_id)
        if not status.completed:
            kept = _keep_log(link.log_file, plan.folder)
    if not status.completed:
        print(
            f"the run failed ({status.status}): {status.details}\nthe full log is in {kept}",
            file=sys.stderr,
        )
    return status.completed


def start(asked: Asked, project: Path | None = None, *, only_check: bool = False) -> int:
    """Run what is asked for, or only check that it could start.

    Parameters
    ----------
    asked : Asked
    project : Path, optional
        Folder of another Flower app, of which only the keys are looked at (default: this app).
    only_check : bool
        End where something would start (default: False).

    Returns
    -------
    int
        The exit code: 0 completed, 1 the run failed, 2 it cannot be run so.
    """
    ours = project is None
    with exit_on_signals(), Copies() if ours else nullcontext() as copies, ExitStack() as later:
        try:
            folder, ray_head = project or later.enter_context(project_folder()), None
            if copies is None:
                plan = read_other(folder, asked)
            else:
                plan, config = read_plan(folder, asked)
                if not asked.ray_address and not only_check:
                    ray_head = later.enter_context(RayHead())
                check_start(plan, config, asked, copies)
                if asked.ray_address:
                    check_cluster(config, asked)
        except (ConfigError, ValueError, FileNotFoundError, cluster.ClusterError) as error:
            print(error, file=sys.stderr)
            return 2
        if only_check:
            print(f"{plan.clients} clients, {plan.rounds} rounds: nothing is in the way")
            return 0
        try:
            return 0 if simulate(folder, asked, plan, copies, ray_head) else 1
        except SuperLinkError as error:
            print(error, file=sys.stderr)
            return 1


def _keep_log(log_file: Path, output: Path | None) -> Path:
    """Copy the SuperLink's log to the run, or aside if the run never began one; return where."""
    if output and (output / "config.json").exists():
        kept = output / "superlink.log"
    else:
        kept = Path(tempfile.mkdtemp(prefix="fedlora-failed-")) / "superlink.log"
    shutil.copy(log_file, kept)
    return kept


def _twice(asked: Asked) -> list[str]:
    """Return which keys were given more than one value; Flower calls that an invalid format."""
    given = [key for key, _ in asked.pairs]
    given += ["rounds"] * (asked.rounds is not None) + ["output"] * (asked.output is not None)
    given += ["resume-from"] * asked.resume
    return [
        f"{key}: given {given.count(key)} times"
        + (f" (--{option} is one of them)" if (option := OPTIONS.get(key)) else "")
        + "; leave one of them"
        for key in dict.fromkeys(given)
        if given.count(key) > 1
    ]


def _too_few_clients(parts: Parts, clients: int) -> list[str]:
    """Return what a run with so few clients could never do."""
    from strategies.clients import Client

    config, problems = parts.config, []
    if clients < config.min_nodes:
        problems.append(
            f"min-nodes: the run would wait for {config.min_nodes} nodes, but has {clients}; "
            f"set min-nodes={clients}"
        )
    everyone = config.method == "local"
    share = clients if everyone else round(config.sampling.fraction * clients)
    asked = min(clients, max(share, config.sampling.min_clients))
    if asked < config.min_replies:
        problems.append(
            f"min-replies: {config.min_replies} replies are needed, but a round asks {asked} "
            f"of {clients} clients; lower it or raise sampling.fraction"
        )
    if not parts.policy.serves(Client(0, clients - 1)):
        problems.append(
            f"ranks.policy: {parts.policy.summary()} has no rank for client {clients - 1} of "
            f"{clients} clients; list one a client or set ranks.policy=cycle"
        )
    return problems
