"""A Flower SuperNode that starts its ClientApps warm.

    fedlora supernode [--preload MODULE,…] [--poll SECONDS] [--keep SECONDS] [--patience SECONDS]
                      [--unchecked] ARGUMENTS

(or ``python -m fedlora_app.supernode``) with the arguments of ``flower-supernode``.

Flower's SuperNode starts a new Python for every message, and each imports torch, transformers
and PEFT anew, and reads model and rows, which takes longer than many a message's training. Here
one process imports them once and is copied (``fork``) for a client, with the same memory shared
as long as nobody writes to it; and a client stays for the next message of its app, with what that
has loaded.

It becomes ``flower-supernode --isolation process`` with a SuperExec beside it, as Flower means
SuperNodes to be extended; the app is loaded from the message's own bundle, as ever.

Before it starts it looks at the node's own data and limits, and ends with 2 if it cannot work
with them. When the SuperLink refuses it, or a message stays without a client, it ends with 1 and
the reason (``fedlora_app.launch.watch``), for a service manager to start it again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from fedlora_app.flower import parse_config_args, part
from fedlora_app.launch.copies import MODELS
from fedlora_app.launch.processes import die_with
from fedlora_app.launch.warm import run_executor
from fedlora_app.launch.watch import EXIT_CODE, PATIENCE, Watch

PRELOAD = (
    "flwr.supernode.cli.flwr_clientapp",
    "flwr.clientapp",
    "flwr.client",
    *MODELS,
)
"""What a client of this project imports, the packaged models' own modules among it.

Nothing of the app itself: every message brings the version of it that it wants.
"""

POLL = 1.0
"""Seconds between two looks at the SuperLink for a message (Flower: 3), or a part (1 to 10)."""

KEEP = 600.0
"""Seconds for which a client stays for the next message of its app."""

GRACE = 10.0
"""Seconds a SuperNode may take to end after its executor has."""


def become(
    arguments: Sequence[str],
    preload: Sequence[str] = PRELOAD,
    poll: float = POLL,
    patience: float = PATIENCE,
    keep: float = KEEP,
    *,
    unchecked: bool = False,
) -> None:
    """Become a SuperNode, with a warm executor as its child.

    Parameters
    ----------
    arguments : sequence of str
        Those of ``flower-supernode``.
    preload : sequence of str
        What to import once (default: ``PRELOAD``).
    poll : float
        Seconds between two looks at the SuperLink for a message, or for a part of one that is not
        sent yet (default: 1). The executor, and a client for its message, look four times as
        often, at least once a second.
    patience : float
        Seconds a message may be here without a live client or a reply before this SuperNode
        ends with 1 (default: 180).
    keep : float
        Seconds for which a client that has answered stays for the next message of its app, with
        model and rows; 0: every message has a process of its own (default: 600).
    unchecked : bool
        Do not look at the node config before: it is that of another app (default: False).

    Raises
    ------
    ValueError
        If it cannot be one so: what is wrong and what to do.
    """
    theirs = list(arguments)
    if sys.platform != "linux":  # elsewhere a copy of a process is missing or not sound
        raise ValueError(f"this needs Linux, and this is {sys.platform}; use flower-supernode")
    for name, value in (("poll", poll), ("patience", patience)):
        if not value > 0:
            raise ValueError(f"--{name}: expected a number of seconds above 0, got {value}")
    if not (math.isfinite(keep) and keep >= 0):
        raise ValueError(f"--keep: expected a number of seconds of at least 0, got {keep}")
    connect = _runtime_api(theirs)
    if not unchecked:
        _check(theirs)
    node = os.getpid()
    executor = os.fork()
    if executor == 0:
        die_with(node)
        look = min(max(poll / 4, 0.01), 1.0)  # Flower takes no less than 0.01
        run_executor([*connect, "--parent-pid", str(node)], preload, look, keep)
        return
    threading.Thread(target=_need, args=(executor,), daemon=True).start()
    # From here on this process is the SuperNode: its signals and its exit code are Flower's,
    # unless the watch has a reason of its own.
    watch = Watch(poll, patience)
    watch.install()
    sys.argv = ["flower-supernode", *theirs, "--isolation", "process"]
    try:
        part("flower_supernode")()
    except SystemExit:
        if not watch.reason:
            raise
    except Exception:  # whatever it is, threads of Flower's would keep this process
        traceback.print_exc()
    # Flower's command returns for no wish of ours: it logs what ended its connection, and stays.
    watch.end("its connection to the SuperLink has ended; the lines above say why")
    os._exit(EXIT_CODE)


def _check(arguments: list[str]) -> None:
    """End with 2 if the node config names data or limits that cannot be worked with."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--node-config")
    given = known.parse_known_args(arguments)[0].node_config
    config = parse_config_args([given]) if given else {}
    # In a process of its own, for the rows and what reads them are not needed here again.
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.exit(2)
        return
    from fedlora_app.launch.inspection import check_limits, check_own_data

    code = 0
    try:
        check_limits(config)
        if "data-path" in config or {"partition-id", "num-partitions"} <= config.keys():
            print(check_own_data(config), file=sys.stderr, flush=True)
    except (ValueError, OSError) as error:
        print(f"this SuperNode does not start: {error}", file=sys.stderr, flush=True)
        code = 2
    os._exit(code)


def _need(executor: int) -> None:
    """End this SuperNode if its executor ends, for it would take messages and start nothing."""
    os.waitpid(executor, 0)
    time.sleep(GRACE)  # a SuperNode that is being stopped ends by itself
    print("the executor of this SuperNode is gone; so is the SuperNode", file=sys.stderr)
    os._exit(1)


def _runtime_api(arguments: list[str]) -> list[str]:
    """Return how a SuperExec reaches the SuperNode with these arguments."""
    constant = part("supercore_constants")
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--host", default=constant.UVICORN_DEFAULT_HOST)
    known.add_argument("--port", default=constant.SUPERNODE_UVICORN_DEFAULT_PORT)
    known.add_argument("--ssl-ca-certfile")
    known.add_argument("--superexec-auth-secret-file")
    known.add_argument("--allow-runtime-dependency-installation", action="store_true")
    known.add_argument("--isolation")
    found = known.parse_known_args(arguments)[0]
    if found.isolation is not None:
        raise ValueError("--isolation is set by this command; use flower-supernode to choose it")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    from fedlora_app.cli.main import run_as

    return run_as("supernode", argv, "python -m fedlora_app.supernode")


if __name__ == "__main__":
    sys.exit(main())
