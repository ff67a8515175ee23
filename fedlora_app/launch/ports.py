"""Ports for servers on this machine that nobody else takes before they start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

LOWEST = 20_000  # Ray gives those from 10002 to 19999 to its workers
USUAL = 32_768  # from here on Linux takes ports for outgoing connections
_given: set[int] = set()


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens.

    Asked for port 0, the system gives one of those it also takes for outgoing connections,
    of which a federation has many: until the server starts it may be in use. This one is
    none of them, and is not given twice by this process.

    Raises
    ------
    OSError
        If no port is free.
    """
    end = USUAL
    with suppress(OSError, ValueError):
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if end <= LOWEST:  # all of them are for outgoing connections
        end = USUAL
    candidates = sorted(set(range(LOWEST, end)) - _given)
    # By chance of the system, not of a run: two processes must not find the same.
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port
    raise OSError(f"no port of 127.0.0.1 from {LOWEST} to {end - 1} is free")


if __name__ == "__main__":
    import sys

    print(*(free_port() for _ in range(int(sys.argv[1]))))
