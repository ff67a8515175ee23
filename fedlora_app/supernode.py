"""A Flower SuperNode that starts its ClientApps warm.

    python -m fedlora_app.supernode [--preload MODULE,…] [--poll SECONDS] ARGUMENTS

with the arguments of ``flower-supernode``.

Flower's SuperNode starts a new Python for every message, and each imports torch, transformers
and PEFT anew, which takes longer than many a message's training. Here one process imports them
once and is then copied (``fork``) for every message: still a process of its own for each, with
the same memory shared as long as nobody writes to it.

It becomes ``flower-supernode --isolation process`` with a SuperExec beside it, as Flower means
SuperNodes to be extended; the app is loaded from the message's own bundle, as ever.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

PRELOAD = (
    "flwr.supernode.cli.flwr_clientapp",
    "flwr.clientapp",
    "flwr.client",
    "torch",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
)
"""What a client of this project imports, the packaged models' own modules among it.

Nothing of the app itself: every message brings the version of it that it wants.
"""

POLL = 1.0
"""Seconds between two looks at the SuperLink for a message (Flower: 3)."""

GRACE = 10.0
"""Seconds a SuperNode may take to end after its executor has."""

LOCAL_POLL = "0.1"
"""Seconds between two looks of the executor at the SuperNode beside it (Flower: 1)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Become a SuperNode, with a warm executor as its child."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlora_app.supernode",
        description="flower-supernode, with the imports of its ClientApps done once. All other "
        "arguments are those of flower-supernode.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preload",
        default=",".join(PRELOAD),
        metavar="MODULE,…",
        help="what to import once (default: %(default)s)",
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=POLL,
        metavar="SECONDS",
        help="pause between two looks at the SuperLink for a message (default: %(default)s)",
    )
    ours, theirs = parser.parse_known_args(argv)
    if sys.platform != "linux":  # elsewhere a copy of a process is missing or not sound
        parser.error(f"this needs Linux, and this is {sys.platform}; use flower-supernode")
    if not ours.poll > 0:
        parser.error(f"--poll: expected a number of seconds above 0, got {ours.poll}")
    connect = _runtime_api(theirs, parser)
    node = os.getpid()
    executor = os.fork()
    if executor == 0:
        run_executor([*connect, "--parent-pid", str(node)], ours.preload.split(","))
        return
    threading.Thread(target=_need, args=(executor,), daemon=True).start()
    # From here on this process is the SuperNode: its signals and its exit code are Flower's.
    from flwr.supernode import start_client_internal as worker
    from flwr.supernode.cli.flower_supernode import flower_supernode

    # Flower has no setting for it: after each reply it would sleep for three seconds.
    sooner = {**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, ours.poll))}
    vars(worker)["time"] = SimpleNamespace(**sooner)
    sys.argv = ["flower-supernode", *theirs, "--isolation", "process"]
    flower_supernode()


def _need(executor: int) -> None:
    """End this SuperNode if its executor ends, for it would take messages and start nothing."""
    os.waitpid(executor, 0)
    time.sleep(GRACE)  # a SuperNode that is being stopped ends by itself
    print("the executor of this SuperNode is gone; so is the SuperNode", file=sys.stderr)
    os._exit(1)


def _runtime_api(arguments: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return how a SuperExec reaches the SuperNode with these arguments."""
    from flwr.supercore import constant

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--host", default=constant.UVICORN_DEFAULT_HOST)
    known.add_argument("--port", default=constant.SUPERNODE_UVICORN_DEFAULT_PORT)
    known.add_argument("--ssl-ca-certfile")
    known.add_argument("--superexec-auth-secret-file")
    known.add_argument("--allow-runtime-dependency-installation", action="store_true")
    known.add_argument("--isolation")
    found = known.parse_known_args(arguments)[0]
    if found.isolation is not None:
        parser.error("--isolation is set by this command; use flower-supernode to choose it")
    host = f"[{found.host}]" if ":" in found.host else found.host
    words = ["--runtime-api-address", f"{host}:{found.port}"]
    if found.ssl_ca_certfile:
        words += ["--root-certificates", found.ssl_ca_certfile]
    else:
        words += ["--insecure"]  # from this machine to this machine
    if found.superexec_auth_secret_file:
        words += ["--superexec-auth-secret-file", found.superexec_auth_secret_file]
    if found.allow_runtime_dependency_installation:
        words += ["--allow-runtime-dependency-installation"]
    return words


def run_executor(arguments: Sequence[str], preload: Sequence[str]) -> None:
    """Run Flower's SuperExec, with ClientApps that are copies of one prepared process."""
    reader, writer = os.pipe()
    if os.fork() == 0:  # before this process has threads, which a copy would lack
        os.close(writer)
        with os.fdopen(reader) as orders:
            serve(orders, preload)
        return
    os.close(reader)
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", LOCAL_POLL)
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec import run_superexec

    with os.fdopen(writer, "w") as orders:
        made = _executor(orders)
        vars(run_superexec)["get_executor"] = lambda *_, **__: made
        sys.argv = ["flower-superexec", *arguments]
        flower_superexec()


def _executor(orders: IO[str]) -> Any:
    """Return Flower's executor, changed to have ClientApps started by the prepared process."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import LaunchResult, SubprocessExecutor

    class WarmExecutor(SubprocessExecutor):
        def launch(self, spec: ExecutionSpec) -> LaunchResult:
            # What is installed for one run is imported by a new Python alone.
            if spec.task_type != TaskType.CLIENT_APP or spec.runtime_dependency_install:
                return super().launch(spec)
            try:
                orders.write(json.dumps(_words(spec)) + "\n")
                orders.flush()
            except OSError:  # the prepared process is gone: start cold, as Flower does
                return super().launch(spec)
            return LaunchResult.accepted()

    return WarmExecutor()


def _words(spec: ExecutionSpec) -> list[str]:
    """Return the command line of ``flwr-clientapp`` for a task."""
    words = ["flwr-clientapp", "--runtime-api-address", spec.runtime_api_address]
    words += ["--token", spec.token]
    if spec.insecure:
        words += ["--insecure"]
    elif spec.root_certificates_path is not None:
        words += ["--root-certificates", spec.root_certificates_path]
    if spec.parent_pid is not None:
        words += ["--parent-pid", str(spec.parent_pid)]
    return words


def serve(orders: IO[str], preload: Sequence[str]) -> None:
    """Import ``preload``, then become a ClientApp, in a copy, for every line of ``orders``.

    It ends with ``orders``, that is with the process that writes them.
    """
    # A CUDA driver that was asked before the copy was made would not work in it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who writes the orders answers it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies
    for name in filter(None, preload):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module raises; each message tries it again
            print(f"warm start: cannot preload {name}: {error!r}", file=sys.stderr)
    for name in [m for m in sys.modules if m.partition(".")[0] in ("fedlora_app", "strategies")]:
        del sys.modules[name]  # the message's own app is to be imported
    gc.collect()
    gc.freeze()  # a collection in a copy would write to every page of it
    for line in orders:
        try:
            copy = os.fork()
        except OSError as error:  # no memory or no room for a process: Flower will ask again
            print(f"warm start: cannot start a client: {error}", file=sys.stderr)
            continue
        if copy == 0:
            orders.close()  # an executor whose reader is gone has to notice
            _become_client(json.loads(line))
            return


def _become_client(words: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # as a new Python has it, and not the same in all copies
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    sys.argv = words
    flwr_clientapp()


if __name__ == "__main__":
    main()
