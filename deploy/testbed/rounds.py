"""What rounds took in real seconds, beside what was expected and how busy the machine was."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

LOOK = 0.5  # seconds


class Rounds:
    """Looks at a run's records while it runs, and at the machine's cores.

    Parameters
    ----------
    path : Path
        Its ``metrics.jsonl``, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.busy: list[float] = []  # share of the cores, by round
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Rounds:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        before, done = psutil.cpu_times(), 0
        while not self._over.wait(LOOK):
            rounds = len(self._records("round"))
            if rounds > done:
                now = psutil.cpu_times()
                spent = [b - a for a, b in zip(before, now, strict=True)]
                idle = spent[now._fields.index("idle")] + spent[now._fields.index("iowait")]
                total = sum(spent[: now._fields.index("steal") + 1])
                self.busy += [1 - idle / max(total, 1e-9)] * (rounds - done)
                before, done = now, rounds

    def _records(self, kind: str) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # half a line
                break
        return [record for record in records if record["kind"] == kind]

    def show(self) -> None:
        """Print a line for each round."""
        rounds = [r for r in self._records("round") if r["round"] and "clock_seconds" in r]
        if not rounds:
            return
        clients = self._records("client")
        print("round  seconds  expected  slowest: compute  fixed  upload  cores busy")
        for i, r in enumerate(rounds):
            own = [c for c in clients if (c["round"], c["client"]) == (r["round"], r["bottleneck"])]
            parts = [own[0].get(f"{p}_seconds") if own else None
                     for p in ("compute", "fixed", "upload")]  # fmt: skip
            busy = self.busy[i + 1] if i + 1 < len(self.busy) else None  # the first is round 0
            compute, fixed, upload = map(_text, parts)
            print(f"{r['round']:5} {_text(r['clock_seconds']):>8} "
                  f"{_text(r.get('expected_seconds')):>9} {compute:>17} {fixed:>6} {upload:>7} "
                  f"{'-' if busy is None else format(busy, '.0%'):>11}")  # fmt: skip


def _text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
