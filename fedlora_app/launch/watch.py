"""What makes a SuperNode end instead of waiting for ever, and with the reason.

Flower's SuperNode ends "gracefully" and with exit code 0 where the SuperLink refuses it, so that
a service manager takes it for a wish; and it waits without an end for a client that will never
answer, while its heartbeats tell the SuperLink that all is well.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from fedlora_app.flower import part

PATIENCE = 180.0
"""Seconds that a message may be here without a live client or a reply."""

AHEAD, BEHIND = 5, 305
"""Seconds that a node's clock may be ahead of the SuperLink's, or behind it (Flower's limits)."""

FORCE = 4.0
"""Seconds for an orderly end. Flower forces its own, with exit code 0, after five."""

EXIT_CODE = 1


class Watch:
    """Notices what a SuperNode cannot go on with, and ends it.

    Parameters
    ----------
    poll : float
        Longest pause between two looks at the SuperLink, in seconds.
    patience : float (default: 180)
        Seconds a message may be here with no client alive and no reply. Time in which this
        process or the machine was stopped does not count.
    """

    def __init__(self, poll: float, patience: float = PATIENCE) -> None:
        self.reason = ""
        self._poll = poll
        self._patience = patience
        self._node: Any = None  # Flower's state of a node that waits for a reply
        self._silent = 0.0
        self._running = part("task_status").RUNNING

    def install(self) -> None:
        """Put this watch into Flower's SuperNode, which has no setting for any of it."""
        loop, connection = vars(part("supernode_loop")), vars(part("supernode_connection"))
        loop["time"] = SimpleNamespace(**{**vars(time), "sleep": self._sleep})
        # A message can be had before its parts are sent: Flower's pauses are 1, 2, 4, … 10 s.
        pauses = {"initial_backoff": self._poll / 4, "backoff_cap": self._poll}
        loop["pull_objects"] = partial(loop["pull_objects"], **pauses)
        loop["_push_messages"] = self._attended(loop["_push_messages"])
        connection["NodeAuthHttpInterceptor"] = self._noting(connection["NodeAuthHttpInterceptor"])
        sender = connection["HeartbeatSender"]
        connection["HeartbeatSender"] = lambda beat: sender(self._surviving(beat))

    def end(self, reason: str) -> None:
        """Say why this SuperNode ends, and see to it that it does."""
        if self.reason:
            return
        self.reason = reason
        print(f"this SuperNode ends: {reason}", file=sys.stderr, flush=True)
        timer = threading.Timer(FORCE, os._exit, (EXIT_CODE,))
        timer.daemon = True
        timer.start()

    # --- a message without a client

    def _attended(self, push: Callable[..., None]) -> Callable[..., None]:
        """Wrap the function that waits for replies and sends them."""

        def attended(state: Any, *args: Any, **kwargs: Any) -> None:
            self._node, self._silent = state, 0.0
            try:
                push(state, *args, **kwargs)
            finally:
                self._node = None

        return attended

    def _sleep(self, seconds: float) -> None:
        """Sleep in Flower's loop, which never waits otherwise."""
        seconds = min(seconds, self._poll)
        time.sleep(seconds)
        if self._node is None:
            return
        if any(task.status.status == self._running for task in self._node.get_tasks()):
            self._silent = 0.0  # Flower itself finds a client whose heartbeats cease
            return
        self._silent += seconds
        if self._silent > self._patience:
            self.end(
                f"for {self._patience:g} s it has had a message, but neither a client that is "
                "alive nor a reply: the process that starts clients is stopped, hangs or lacks "
                "memory. Start it anew, as a service manager does; on a slow machine with a longer "
                "--patience"
            )
            raise SystemExit(EXIT_CODE)

    # --- a SuperLink that refuses

    def _noting(self, interceptor: Any) -> Any:
        watch = self

        class Noting(interceptor):  # type: ignore[misc]
            """Flower's, which signs requests; sees every response before Flower ends for it."""

            def intercept(self, context: Any, call_next: Any) -> Any:
                response = super().intercept(context, call_next)
                if response.status_code == 401:
                    watch.end(refusal(response.headers.get("date")))
                return response

        return Noting

    def _surviving(self, beat: Callable[[], bool]) -> Callable[[], bool]:
        """Wrap the heartbeat, whose thread would end in silence at an error."""

        def surviving() -> bool:
            try:
                return beat()
            except Exception as error:
                self.end(f"its heartbeats failed: {error!r}")
                os.kill(os.getpid(), signal.SIGINT)
                raise

        return surviving


def refusal(date: str | None, now: datetime | None = None) -> str:
    """Return why the SuperLink may have answered 401.

    Parameters
    ----------
    date : str or None
        The ``Date`` header of its answer, if there was one.
    now : datetime, optional
        When it came, by this machine's clock (default: now).
    """
    said = "the SuperLink refuses its signature (401 Unauthorized)"
    ahead = _seconds_ahead(date, now or datetime.now(UTC))
    # Whole seconds are sent, and some pass on the way.
    if ahead is not None and not -BEHIND + 1 < ahead < AHEAD - 1:
        way = "ahead of" if ahead > 0 else "behind"
        return (
            f"{said}. Its clock is {abs(ahead):.0f} s {way} the SuperLink's; {AHEAD} s ahead and "
            f"five minutes behind are the limits: set the clock (timedatectl set-ntp true)"
        )
    return (
        f"{said}. The SuperLink does not know this node, for it was unregistered or the SuperLink "
        f"lost its --database: register its key again. Or the clocks differ by more than {AHEAD} s"
    )


def _seconds_ahead(date: str | None, now: datetime) -> float | None:
    try:
        theirs = parsedate_to_datetime(date) if date else None
    except ValueError:
        return None
    if theirs is None or theirs.tzinfo is None:
        return None
    return (now - theirs).total_seconds()
