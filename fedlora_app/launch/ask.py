"""Run a Python script as a copy of a process that has imported what it needs.

    python ask.py SOCKET SCRIPT ARGUMENTS

stands for ``python SCRIPT ARGUMENTS``: same input and output, environment, folder, signals and
exit code. Without anybody at ``SOCKET`` (see ``fedlora_app.launch.copies``) it is just that.

Run by its path and with nothing but the standard library, for it starts once for each process.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
NUMBER = 8  # bytes of a number on the wire


def main(path: str, words: Sequence[str]) -> int:
    """Have ``words`` run by a copy, and return its exit code."""
    try:
        asked = ask(path, words)
    except OSError:
        _start_cold(words)
    with asked:
        if not (pid := read_number(asked)):
            _start_cold(words)
        for number in FORWARDED:
            signal.signal(number, lambda n, _: os.kill(pid, n))
        code = read_number(asked)
    return 1 if code is None else code


def ask(path: str, words: Sequence[str]) -> socket.socket:
    """Send a request: words, folder, environment, and the files of this process.

    On the socket come the number of the new process and, when it has ended, its exit code. The
    process ends when the socket is closed.

    Raises
    ------
    OSError
        If nobody is there.
    """
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        asked.connect(path)
        request = {"words": list(words), "folder": os.getcwd(), "environment": dict(os.environ)}
        data = json.dumps(request).encode()
        files = array.array("i", [0, 1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
        asked.sendmsg([len(data).to_bytes(NUMBER, "big")], rights)
        asked.sendall(data)
    except OSError:
        asked.close()
        raise
    return asked


def _start_cold(words: Sequence[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, *words])  # noqa: S606


def read_number(asked: socket.socket) -> int | None:
    """Return the next number; None if the other side has gone."""
    data = b""
    while len(data) < NUMBER:
        try:
            more = asked.recv(NUMBER - len(data))
        except ConnectionError:
            return None
        if not more:
            return None
        data += more
    return int.from_bytes(data, "big")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
