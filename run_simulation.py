"""Run one federated simulation, watch it, and leave nothing behind.

``python run_simulation.py --clients 10 --rounds 6 --config aggregation=flexlora`` starts
a SuperLink of its own, runs the app next to this file on it, shows what the app says and
ends every process it started: at the end, on failure and on Ctrl-C. The exit code is 0
only if the run completed (1: it failed, 2: the configuration is wrong, or a node of the
Ray cluster named with ``--ray-address`` lacks something, 130: Ctrl-C).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.config.fields import pair, typed_value
from fedlora_app.config.keys import ConfigError, RunConfig, Scalar
from fedlora_app.config.read import read_config
from fedlora_app.flower import flatten_dict
from fedlora_app.launch import cluster
from fedlora_app.launch.console import Console
from fedlora_app.launch.copies import Copies
from fedlora_app.launch.folders import refuse_used
from fedlora_app.launch.inspection import CHECKED, clients_of, inspect
from fedlora_app.launch.ray_head import RayHead
from fedlora_app.launch.superlink import SuperLink, SuperLinkError, exit_on_signals
from fedlora_app.tasks import make_task

if TYPE_CHECKING:
    from fedlora_app.config.build import Parts

PROJECT = Path(__file__).resolve().parent
OPTIONS = {"rounds": "rounds", "output": "output", "resume-from": "resume"}  # keys with their own


def read_arguments(project: Path, args: argparse.Namespace) -> tuple[RunConfig, dict[str, Scalar]]:
    """Return the run's configuration and what in it differs from ``pyproject.toml``.

    Raises
    ------
    ConfigError
        If the app could not run with it.
    """
    kinds = RunConfig().to_flat()
    if problems := _twice(args):
        raise ConfigError(problems)
    changes = {key: typed_value(text, kinds.get(key)) for key, text in args.config}
    if args.rounds is not None:
        changes["rounds"] = args.rounds
    if args.output is not None:
        changes["output"] = args.output
    if args.resume:
        changes["resume-from"] = "latest"
    toml = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    app: Mapping[str, Any] = toml.get("tool", {}).get("flwr", {}).get("app", {})
    parts = read_config(flatten_dict(app.get("config")) | changes)
    config = parts.config
    if args.clients is None:
        args.clients = clients_of(parts.task)
    if problems := _too_few_clients(parts, args.clients):
        raise ConfigError(problems)
    # Decided here, so that we know where the app writes and where a relative path begins.
    output = config.output or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{config.aggregation}"
    folder = Path(output).expanduser().absolute()
    refuse_used(folder, resumed=bool(config.resume_from))
    changes["output"] = str(folder)
    return config, changes


def check_start(config: RunConfig, args: argparse.Namespace, folder: Path, copies: Copies) -> None:
    """Look at resources, data and model, so that what cannot run stops before anything starts.

    Raises
    ------
    ValueError
        With what is wrong and what to do.
    """
    print(inspect(make_task(config)), flush=True)
    question = {
        "config": config.to_flat(),
        "folder": str(folder),
        "clients": args.clients,
        # A cluster is asked itself.
        "resources": None if args.ray_address else [args.cpus_per_client, args.gpus_per_client],
    }
    command = copies.command("-m", "fedlora_app.launch.door", json.dumps(question))
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ValueError(done.stderr.rstrip())
    print(done.stderr, end="", file=sys.stderr, flush=True)


def check_cluster(config: RunConfig, args: argparse.Namespace) -> None:
    """Have every node of the Ray cluster load what a client needs, before the run starts.

    Raises
    ------
    fedlora_app.launch.cluster.ClusterError
        If a node lacks something, or there is no such cluster.
    """
    room = cluster.check(
        args.ray_address, config, cpus=args.cpus_per_client, gpus=args.gpus_per_client
    )
    print(f"Ray cluster at {args.ray_address}: {room} clients at once", flush=True)


def simulate(
    project: Path,
    args: argparse.Namespace,
    config: RunConfig,
    changes: Mapping[str, Scalar],
    copies: Copies | None = None,
    ray_head: RayHead | None = None,
) -> bool:
    """Run the app in ``project`` and return whether the run completed."""
    output = Path(str(changes["output"]))
    federation: dict[str, Scalar] = {
        "num-supernodes": args.clients,
        "client-resources-num-cpus": args.cpus_per_client,
        "client-resources-num-gpus": args.gpus_per_client,
    }
    console = Console(output / "metrics.jsonl", config.rounds, verbose=args.verbose)
    print(f"{args.clients} simulated clients, {config.rounds} rounds → {output}", flush=True)
    link = SuperLink(
        simulation=True,
        ray_address=args.ray_address,
        copies=copies,
        ray_head=ray_head,
        environment={CHECKED: "1"} if copies is not None else {},
    )
    with link, console:
        run_id = link.run(project, changes, federation)
        for line in link.stream(run_id):
            console.show(line)
        status = link.status(run_id)
        if not status.completed:
            kept = _keep_log(link.log_file, output)
    if not status.completed:
        print(
            f"the run failed ({status.status}): {status.details}\nthe full log is in {kept}",
            file=sys.stderr,
        )
    return status.completed


def main(argv: Sequence[str] | None = None, project: Path = PROJECT) -> int:
    """Run the command line ``argv`` for the app in ``project`` and return the exit code."""
    args = _parser().parse_args(argv)
    ours = project == PROJECT
    with exit_on_signals(), Copies() if ours else nullcontext() as copies, ExitStack() as later:
        try:
            config, changes = read_arguments(project, args)
            ray_head = None
            if ours and not args.ray_address:
                ray_head = later.enter_context(RayHead())
            if copies is not None:
                check_start(config, args, Path(str(changes["output"])), copies)
                if args.ray_address:
                    check_cluster(config, args)
        except (ConfigError, ValueError, FileNotFoundError, cluster.ClusterError) as error:
            print(error, file=sys.stderr)
            return 2
        try:
            return 0 if simulate(project, args, config, changes, copies, ray_head) else 1
        except SuperLinkError as error:
            print(error, file=sys.stderr)
            return 1


def _keep_log(log_file: Path, output: Path) -> Path:
    """Copy the SuperLink's log to the run, or aside if the run never began one; return where."""
    if (output / "config.json").exists():
        kept = output / "superlink.log"
    else:
        kept = Path(tempfile.mkdtemp(prefix="fedlora-failed-")) / "superlink.log"
    shutil.copy(log_file, kept)
    return kept


def _twice(args: argparse.Namespace) -> list[str]:
    """Return which keys were given more than one value; Flower calls that an invalid format."""
    given = [key for key, _ in args.config]
    given += ["rounds"] * (args.rounds is not None) + ["output"] * (args.output is not None)
    given += ["resume-from"] * args.resume
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


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run one federated simulation of the app next to this file.",
        epilog="example: python run_simulation.py --rounds 3 --config aggregation=flexlora "
        "data.alpha=0.1 (all keys: python -m fedlora_app.config)",
    )
    add = parser.add_argument
    add(
        "--clients",
        type=_count,
        help="simulated clients (default: 10; with data.partition=natural as many as its column "
        "names)",
    )
    add("--rounds", type=_count, help="federated rounds (the config key `rounds`)")
    add("--output", help="folder of the results (default: runs/<time>-<aggregation>)")
    add(
        "--config",
        type=pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="change keys of the run config; may be given several times",
    )
    add("--cpus-per-client", type=_count, default=1, help="CPUs of a client (default: 1)")
    add("--gpus-per-client", type=float, default=0.0, help="GPU share of a client (default: 0)")
    add(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS", ""),
        metavar="HOST:PORT",
        help="simulate on this Ray cluster, or on this machine's: auto (default: RAY_ADDRESS from "
        "the environment; without, on a Ray of its own)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --output from its latest checkpoint",
    )
    add("--verbose", action="store_true", help="show Flower's and Ray's own lines too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
