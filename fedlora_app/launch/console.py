"""What `run_simulation.py` shows of a run: the app's own lines, and the progress of a round."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from fedlora_app.report.records import parsed
from strategies.records import Record

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LEVELS = {"DEBUG": 94, "INFO": 92, "WARNING": 93, "ERROR": 91, "CRITICAL": 95}
# Flower pads every level to the same width; what follows is the message, with its own indent.
LEVEL = re.compile("|".join(f"({level}) : {' ' * (8 - len(level))} " for level in LEVELS))
# What Flower and Ray say in every run, good or bad, and progress bars of the clients.
NOISE = re.compile(
    r"Using SuperLink: |Starting logstream for run_id |Starting Flower Simulation$"
    r"|Since flwr 1\.32, default simulated SuperNodes|Federation `.*simulated SuperNodes\)$"
    r"|To change federation size, use|\tflwr federation simulation-config "
    r"|Successfully (installed|started run) "
    r"|\(ClientAppActor pid=\d+(, ip=[^)]+)?\) +((INFO|DEBUG) +: |WARNING : +Manually terminating)"
    r"|.*\b\d+%\|.*\|"
    r"|.*FutureWarning: Tip: In future versions of Ray|  warnings\.warn\($"
)


class Console:
    """Shows the lines of a run and, on a terminal, how far its current round is.

    Parameters
    ----------
    metrics : Path
        File to which the app appends a JSON record per event of a round.
    rounds : int
        Rounds of the run.
    verbose : bool (default: False)
        Show every line as Flower wrote it.
    """

    def __init__(self, metrics: Path, rounds: int, *, verbose: bool = False) -> None:
        self.metrics = metrics
        self.rounds = rounds
        self.verbose = verbose
        self.terminal = sys.stdout.isatty()
        self._status = ""
        self._blank = False
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Console:
        if self.terminal:
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self.terminal:
            self._watcher.join()
            self._show_status("")

    def show(self, line: str) -> None:
        """Print a line of the run's log, unless it is noise."""
        text = line if self.verbose else self._clean(line)
        if text is None:
            return
        with self._lock:
            erase = "\r\x1b[2K" if self._status else ""
            sys.stdout.write(f"{erase}{text if self.terminal else COLOUR.sub('', text)}\n")
            sys.stdout.write(self._status)
            sys.stdout.flush()

    def _clean(self, line: str) -> str | None:
        plain = COLOUR.sub("", line)
        text = plain
        if match := LEVEL.match(plain):
            level, text = match[match.lastindex or 0], plain[match.end() :]
        if NOISE.match(text):
            return None
        if not text.strip():  # held back until a line follows: Flower ends with an empty one
            self._blank = True
            return None
        if not match:
            text = line
        elif level != "INFO":
            text = f"\x1b[{LEVELS[level]}m{level}\x1b[0m: {text}"
        text, self._blank = ("\n" if self._blank else "") + text, False
        return text

    def _show_status(self, status: str) -> None:
        status = status[: shutil.get_terminal_size().columns - 1]
        with self._lock:
            if status != self._status:
                self._status = status
                sys.stdout.write(f"\r\x1b[2K{status}")
                sys.stdout.flush()

    def _watch(self) -> None:
        """Keep the status line up to date until the run ends."""
        number, clients, replies, since = 0, 0, 0, time.monotonic()
        doing = "starting Flower and Ray"
        position = self.metrics.stat().st_size if self.metrics.exists() else 0
        while not self._done.wait(0.3):
            records, position = _new_records(self.metrics, position)
            for record in records:
                if record["kind"] == "round-start":
                    number, clients = record["round"], record["clients"]
                    replies, since = 0, time.monotonic()
                elif record["kind"] == "arrived":
                    replies += 1
                elif record["kind"] == "round":
                    number, doing, since = 0, "preparing", time.monotonic()
            bar = f"{doing}  {time.monotonic() - since:.0f} s"
            if number:
                filled = round(10 * min(replies / max(clients, 1), 1))
                bar = (
                    f"round {number}/{self.rounds}  {'█' * filled}{'░' * (10 - filled)} "
                    f"{replies}/{clients} clients  {time.monotonic() - since:.0f} s"
                )
            self._show_status(bar)


def _new_records(file: Path, position: int) -> tuple[list[Record], int]:
    """Return the complete records after ``position``, and where they end."""
    if not file.exists():
        return [], 0
    if file.stat().st_size < position:  # the app has begun the file anew
        position = 0
    with file.open("rb") as stream:
        stream.seek(position)
        complete, newline, _ = stream.read().rpartition(b"\n")
    return parsed(complete), position + len(complete) + len(newline)
