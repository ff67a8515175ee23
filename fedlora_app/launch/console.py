"""What `fedlora run` shows of a run: the app's own lines, and on a terminal how far a round is."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from fedlora_app.report.html import data_size
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
LAST = 3  # rounds by which the length of the next is guessed


@dataclass
class Standing:
    """How far a run is, from its records as they come.

    Parameters
    ----------
    rounds : int
        Rounds of the run; 0: not known.
    since : float
        When what goes on now began, in seconds.
    """

    rounds: int
    since: float
    number: int = 0  # of the round that goes on; 0: between two
    asked: int = 0
    arrived: int = 0
    up: int = 0  # bytes of the replies of this round
    moved: float = 0.0  # bytes of the rounds before
    doing: str = "starting Flower and Ray"
    lengths: list[float] = field(default_factory=list)  # of the rounds before, in seconds

    def see(self, record: Record, now: float) -> None:
        """Take in a record."""
        known: Mapping[str, Any] = record
        if record["kind"] == "round-start":
            self.number, self.asked = record["round"], record["clients"]
            self.arrived, self.up, self.since = 0, 0, now
        elif record["kind"] == "arrived":
            self.arrived += 1
            self.up += known.get("bytes", 0)
        elif record["kind"] == "round":
            if self.number:
                self.lengths = [*self.lengths, now - self.since][-LAST:]
            self.moved += (known.get("bytes_down") or 0) + (known.get("bytes_up") or 0)
            last = 0 < self.rounds <= record["round"]
            self.number, self.since = 0, now
            self.doing = "testing, and writing results" if last else "preparing"

    def title(self) -> str:
        """Return what goes on."""
        if not self.number:
            return self.doing
        return f"round {self.number}" + (f"/{self.rounds}" if self.rounds else "")

    def text(self, now: float) -> str:
        """Return the numbers of what goes on: clients, bytes, seconds so far and left."""
        passed = now - self.since
        if not self.number:
            return f"{passed:.0f} s"
        parts = [f"{self.arrived}/{self.asked} clients"]
        if flying := max(self.asked - self.arrived, 0):
            parts.append(f"{flying} in flight")
        parts.append(f"{data_size(self.up)} up, {data_size(self.moved + self.up)} moved")
        parts.append(f"{passed:.0f} s")
        if self.lengths:
            mean = sum(self.lengths) / len(self.lengths)
            left = max(mean - passed, 0)
            run = left + mean * max(self.rounds - self.number, 0)
            parts.append(f"about {left:.0f} s left, of the run {_clock(run)}")
        return " · ".join(parts)


def _clock(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


class Console:
    """Shows the lines of a run and, on a terminal, how far its current round is.

    Parameters
    ----------
    metrics : Path
        File to which the app appends a JSON record per event of a round.
    rounds : int
        Rounds of the run; 0: not known.
    verbose : bool (default: False)
        Show every line as Flower wrote it.
    """

    def __init__(self, metrics: Path, rounds: int, *, verbose: bool = False) -> None:
        self.metrics = metrics
        self.rounds = rounds
        self.verbose = verbose
        self.terminal = Terminal(highlight=False, soft_wrap=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            console=self.terminal,
            refresh_per_second=4,
            transient=True,  # what stays is the app's own line about each round
        )
        self._blank = False
        self._position = 0  # in the file of records
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Console:
        if self.terminal.is_terminal:
            # Now, not when the thread gets its turn: what is written from here on is of this run.
            self._position = self.metrics.stat().st_size if self.metrics.exists() else 0
            self._bar.start()
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self.terminal.is_terminal:
            self._watcher.join()
            self._bar.stop()

    def show(self, line: str) -> None:
        """Print a line of the run's log, unless it is noise."""
        text = line if self.verbose else self._clean(line)
        if text is None:
            return
        if self.terminal.is_terminal:
            self.terminal.print(Text.from_ansi(text))
        else:
            print(COLOUR.sub("", text), flush=True)

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

    def _watch(self) -> None:
        """Keep the status line up to date until the run ends."""
        standing = Standing(self.rounds, time.monotonic())
        task = self._bar.add_task(standing.title(), text="", total=None)
        while not self._done.wait(0.3):
            records, self._position = _new_records(self.metrics, self._position)
            now = time.monotonic()
            for record in records:
                standing.see(record, now)
            self._bar.update(
                task,
                description=standing.title(),
                completed=standing.arrived if standing.number else 0,
                total=standing.asked if standing.number else None,
                text=standing.text(now),
            )


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
