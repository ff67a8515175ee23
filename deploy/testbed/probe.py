"""How fast a link is: some seconds of bytes over a socket, timed where they arrive.

python -m deploy.testbed.probe HOST PORT SECONDS
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CHUNK = 1 << 14
SKIPPED = 0.3  # of the time: what fills queues first comes faster or slower


def send(host: str, port: int, seconds: float) -> None:
    """Send zeros for some seconds."""
    with socket.create_connection((host, port), timeout=10 + seconds) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            line.sendall(bytes(CHUNK // 4))


def receive(listening: socket.socket, seconds: float) -> float:
    """Return the Mbit/s of one connection, without its first part."""
    line, _ = listening.accept()
    seen: list[tuple[float, int]] = []
    total = 0
    with line:
        line.settimeout(10 + seconds)
        while part := line.recv(CHUNK):
            total += len(part)
            seen.append((time.monotonic(), total))
    begin = seen[0][0] + SKIPPED * (seen[-1][0] - seen[0][0])
    start = next(i for i, (at, _) in enumerate(seen) if at >= begin)
    took = seen[-1][0] - seen[start][0]
    return (seen[-1][1] - seen[start][1]) * 8 / 1e6 / took if took > 0 else float("nan")


def measure(prefix: Sequence[str], host: str, seconds: float) -> float:
    """Return the Mbit/s from a node to this machine.

    Parameters
    ----------
    prefix : Sequence[str]
        What a command at the node begins with.
    host : str
        Where this machine is, seen from there.
    seconds : float
        How long to send.
    """
    with socket.create_server((host, 0)) as listening:
        listening.settimeout(10 + seconds)
        port = listening.getsockname()[1]
        command = [*prefix, sys.executable, __file__, host, str(port), str(seconds)]
        with subprocess.Popen(command) as sender:
            try:
                return receive(listening, seconds)
            except (OSError, IndexError):  # it cannot be reached
                sender.kill()
                return float("nan")


if __name__ == "__main__":
    send(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
