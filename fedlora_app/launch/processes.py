"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

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
