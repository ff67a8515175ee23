"""Clients that start warm: an executor, and the process that is copied for each of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

from fedlora_app.flower import part
from fedlora_app.launch import copies
from fedlora_app.launch.processes import die_with

LOCAL_POLL = "0.1"
"""Seconds between two looks of the executor at the SuperNode beside it (Flower: 1)."""


def run_executor(arguments: Sequence[str], preload: Sequence[str]) -> None:
    """Run Flower's SuperExec, with ClientApps that are copies of one prepared process."""
    reader, writer = os.pipe()
    executor = os.getpid()
    if os.fork() == 0:  # before this process has threads, which a copy would lack
        die_with(executor)
        os.close(writer)
        with os.fdopen(reader) as orders:
            serve(orders, preload)
        return
    os.close(reader)
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", LOCAL_POLL)
    flower_superexec = part("superexec")
    with os.fdopen(writer, "w") as orders:
        made = _executor(orders)
        vars(part("superexec_loop"))["get_executor"] = lambda *_, **__: made
        sys.argv = ["flower-superexec", *arguments]
        flower_superexec()


def _executor(orders: IO[str]) -> Any:
    """Return Flower's executor, changed to have ClientApps started by the prepared process."""
    executor, launched, client = part("executor"), part("launched"), part("task_type").CLIENT_APP

    class WarmExecutor(executor):  # type: ignore[misc, valid-type]
        def launch(self, spec: Any) -> Any:
            # What is installed for one run is imported by a new Python alone.
            if spec.task_type != client or spec.runtime_dependency_install:
                return super().launch(spec)
            words = _words(spec)
            try:
                orders.write(json.dumps(words) + "\n")
                orders.flush()
            except OSError:  # the prepared process is gone: start cold
                parent = os.getpid()
                subprocess.Popen(words, preexec_fn=lambda: die_with(parent))
            return launched.accepted()

    return WarmExecutor()


def _words(spec: Any) -> list[str]:
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who writes the orders answers it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies
    copies.preload(preload)
    copies.forget_app()
    parent = os.getpid()
    for line in orders:
        try:
            copy = os.fork()
        except OSError as error:  # no memory or no room for a process: Flower will ask again
            print(f"warm start: cannot start a client: {error}", file=sys.stderr)
            continue
        if copy == 0:
            die_with(parent)
            orders.close()  # an executor whose reader is gone has to notice
            _become_client(json.loads(line))
            return


def _become_client(words: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    copies.reseed()
    sys.argv = words
    part("flwr_clientapp")()
