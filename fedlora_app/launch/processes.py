"""How processes end: with the one that started them, and in order on Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends (SIGKILL too).

    To be called in the child, as the first thing after ``fork``, and from the main thread of
    ``parent``: the kernel watches the thread that forked. Does nothing but on Linux.

    Parameters
    ----------
    parent : int
        Process id of the parent, asked before the fork: it may have ended since, and then this
        process ends at once.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Have the first Ctrl-C or SIGTERM unwind the program, and no later one disturb that."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        os.write(sys.stderr.fileno(), b"\nstopping\n")  # print() may be what was interrupted
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
