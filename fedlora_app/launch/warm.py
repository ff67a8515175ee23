"""Clients that start warm: an executor, the process that is copied for them, and one that stays."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import IO, Any

from fedlora_app.flower import part
from fedlora_app.launch import copies
from fedlora_app.launch.processes import die_with

TAKEN, ANSWERED = b"+", b"."
"""What a client that stays says when it has an order, and when it has answered."""


def run_executor(
    arguments: Sequence[str], preload: Sequence[str], poll: float = 0.25, keep: float = 0.0
) -> None:
    """Run Flower's SuperExec, with ClientApps that are copies of one prepared process.

    Parameters
    ----------
    arguments : sequence of str
        Those of ``flower-superexec``.
    preload : sequence of str
        What to import once.
    poll : float (default: 0.25)
        Seconds between two looks at the SuperNode beside it (Flower: 1).
    keep : float (default: 0)
        Seconds for which a client stays; see ``serve``.
    """
    reader, writer = os.pipe()
    executor = os.getpid()
    if os.fork() == 0:  # before this process has threads, which a copy would lack
        die_with(executor)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as orders:
            serve(orders, preload, keep, poll)
        return
    os.close(reader)
    os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(poll)
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
                orders.write(json.dumps([spec.fab_hash, words]) + "\n")
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


class _Resident:
    """A client that stays, as the process sees it that it was copied from.

    Parameters
    ----------
    app : str or None
        Hash of the bundle it has loaded.
    link : socket.socket
        To it: orders there, ``TAKEN`` and ``ANSWERED`` back.
    """

    def __init__(self, app: str | None, link: socket.socket) -> None:
        self.app, self.link = app, link
        self.free = 0.0  # since when, by the monotonic clock; 0: it has a message
        self.order = b""  # sent to it and not taken yet

    def left(self, keep: float) -> float | None:
        """Return for how many seconds it may stay yet; None while it has a message."""
        return max(self.free + keep - time.monotonic(), 0.0) if self.free else None

    def takes(self, app: str | None, order: bytes) -> bool:
        """Give it a message of its own app; return whether it takes it."""
        if not self.free or app is None or app != self.app:
            return False
        with suppress(OSError):  # it has just ended
            self.link.sendall(order)
            self.free, self.order = 0.0, order
            return True
        return False

    def heard(self) -> bool:
        """Read what it says; return whether it is still there."""
        said = b""
        with suppress(OSError):
            said = self.link.recv(1)
        if said == TAKEN:
            self.order = b""
        elif said == ANSWERED:
            self.free = time.monotonic()
        return bool(said)


def serve(orders: IO[bytes], preload: Sequence[str], keep: float = 0.0, poll: float = 0.25) -> None:
    """Import ``preload``, then become a ClientApp, in a copy, for every line of ``orders``.

    It ends with ``orders``, that is with the process that writes them.

    Parameters
    ----------
    orders : binary file
        Unbuffered; in each line the hash of an app's bundle and a command line, as JSON.
    preload : sequence of str
        What to import once.
    keep : float (default: 0)
        Seconds for which a client that has answered stays for the next message of its app, with
        the model and the rows that the app has loaded. One stays at most: a message that comes
        while it is busy gets a copy that ends; so does one that fails. 0: none stays.
    poll : float (default: 0.25)
        Seconds between two looks of a client for the parts of its message (Flower: 1 to 10).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who writes the orders answers it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies
    copies.preload(preload)
    copies.forget_app()
    parent = os.getpid()
    resident: _Resident | None = None
    while True:
        looked: list[Any] = [orders] if resident is None else [orders, resident.link]
        ready = select.select(looked, [], [], resident.left(keep) if resident else None)[0]
        # With nothing ready it has stayed for long enough.
        there = resident.heard() if resident and resident.link in ready else bool(ready)
        order = b""
        if resident and not there:
            order = resident.order
            resident.link.close()  # it has ended, or ends with this
            resident = None
        if not order:
            if orders not in ready:
                continue
            order = orders.readline()
            if not order:
                return
        app, words = json.loads(order)
        if resident and resident.takes(app, order):
            continue
        if resident and resident.free:  # of another app
            resident.link.close()
            resident = None
        ours, theirs = socket.socketpair() if keep and not resident else (None, None)
        try:
            copy = os.fork()
        except OSError as error:  # no memory or no room for a process: Flower will ask again
            print(f"warm start: cannot start a client: {error}", file=sys.stderr)
            continue
        if copy == 0:
            die_with(parent)
            orders.close()  # an executor whose reader is gone has to notice
            for other in (ours, resident and resident.link):
                if other:
                    other.close()
            _become_client(words, theirs, poll)
            return
        if ours and theirs:
            theirs.close()
            resident = _Resident(app, ours)


def _become_client(words: list[str], link: socket.socket | None, poll: float) -> None:
    """Run ``flwr-clientapp``; again for each order that comes through ``link``."""
    _look_often(poll)
    if link is None:
        _answer(words)
        return
    _stay()
    with link, link.makefile("rb") as orders:
        while words:
            try:
                _answer(words)
            except _Answered:
                pass
            else:
                return
            link.sendall(ANSWERED)
            order = orders.readline()
            words = json.loads(order)[1] if order else []
            if words:
                link.sendall(TAKEN)


def _look_often(poll: float) -> None:
    """Have Flower's client look for a part of its message every ``poll`` seconds.

    It starts when the head is here; over a slow line the parts come long after. Flower's pauses
    double, up to 10 s, so that what took 8 s to come would be noticed after 15.
    """
    module, name = vars(part("clientapp")), "pull_and_inflate_object_from_tree"
    pauses = {"initial_backoff": poll, "backoff_cap": poll}
    # One part after the other: all are here at once, and more lookers take more of the core.
    module[name] = partial(module[name], max_concurrent_pulls=1, **pauses)


def _answer(words: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    copies.reseed()
    sys.argv = words
    part("flwr_clientapp")()


class _Answered(SystemExit):
    """Where Flower's client would end: all is answered, and nothing has failed."""


def _stay() -> None:
    """Have Flower's client come back from a message that it has answered, in this process."""
    module, finish = vars(part("clientapp")), part("exit_handlers")
    push, leave = module["push_message"], module["flwr_exit"]
    failed = False

    def push_and_note(client: Any, message: Any, context: Any) -> None:
        nonlocal failed
        failed = message.has_error()  # who knows what it has left behind: the next starts anew
        push(client, message, context)

    def come_back(code: int, *args: Any, **kwargs: Any) -> None:
        if failed or code:
            leave(code, *args, **kwargs)
        for early in (True, False):
            finish(run_before_force_exit=early)
        raise _Answered(0)

    module["push_message"], module["flwr_exit"] = push_and_note, come_back
    # It ends with the process it was copied from; a thread for each message is not needed.
    module["start_parent_process_monitor"] = lambda pid: None
