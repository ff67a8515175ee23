"""What rounds took in real seconds, beside what was expected and how busy the machine was."""

from __future__ import annotations

import csv
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from deploy.testbed.links import Link, Network
from fedlora_app.report.records import parsed
from strategies.wallclock import allocate_bandwidth, simulate_round_time

LOOK = 0.5  # seconds
TABLE = "testbed.csv"  # in a run's folder
COLUMNS = ("round", "seconds", "expected", "by_links", "compute", "fixed", "upload", "busy")


class Rounds:
    """Looks at a run's records while it runs, and at the machine's cores.

    Parameters
    ----------
    path : Path
        Its ``metrics.jsonl``, which need not be there yet.
    network : Network
    nodes : Sequence[str]
        The node ids, in the order of the links.
    allocator : str
        Who shares out the band: none, equal or optimal.
    """

    def __init__(self, path: Path, network: Network, nodes: Sequence[str], allocator: str) -> None:
        self.path, self.network, self.nodes = path, network, list(nodes)
        self.allocator = allocator
        self.busy: list[float] = []  # share of the cores, by round
        self.links: list[list[Link]] = []  # as they were, by round
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
                self.links += [list(self.network.links)] * (rounds - done)
                before, done = now, rounds

    def _records(self, kind: str) -> list[dict[str, Any]]:
        records = parsed(self.path.read_bytes()) if self.path.exists() else []
        return [{**record} for record in records if record["kind"] == kind]

    def rows(self) -> list[dict[str, float | None]]:
        """Return a row for each round: ``COLUMNS``, None where there is nothing to say."""
        clients, found = self._records("client"), []
        rounds = [r for r in self._records("round") if r["round"] and "clock_seconds" in r]
        for i, r in enumerate(rounds):
            there = [c for c in clients if c["round"] == r["round"]]
            slowest = next((c for c in there if c["client"] == r["bottleneck"]), {})
            busy = self.busy[i + 1] if i + 1 < len(self.busy) else None  # the first is round 0
            links = self.links[i + 1] if i + 1 < len(self.links) else self.network.links
            values = [r["round"], r["train_seconds"], r.get("expected_seconds")]
            values += [self._by(links, there)]
            values += [slowest.get(f"{part}_seconds") for part in ("compute", "fixed", "upload")]
            found.append(dict(zip(COLUMNS, [*values, busy], strict=True)))
        return found

    def show(self) -> None:
        """Print a line for each round, and write them down beside the run's records."""
        rows = self.rows()
        if not rows:
            return
        with (self.path.parent / TABLE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print("round  seconds  expected  by links  slowest: compute  fixed  upload  cores busy")
        widths = (5, 8, 9, 9, 17, 6, 7, 11)
        for row in rows:
            texts = [f"{row['round']}", *(_text(row[name]) for name in COLUMNS[1:-1])]
            texts += ["-" if row["busy"] is None else f"{row['busy']:.0%}"]
            print(" ".join(f"{text:>{w}}" for text, w in zip(texts, widths, strict=True)))

    def _by(self, links: Sequence[Link], clients: Sequence[dict[str, Any]]) -> float | None:
        """Return what a simulated clock says of a round with these links and this computing."""
        done = [c for c in clients if c["status"] == "ok" and c["node"] in self.nodes]
        own = [links[self.nodes.index(c["node"])] for c in done]
        if not done:
            return None
        compute = [c["compute_seconds"] for c in done]
        alone = [c["bytes_up"] * 8e-6 / link.mbit for c, link in zip(done, own, strict=True)]
        if self.allocator == "optimal":
            return allocate_bandwidth(compute, alone, 1.0)[1]
        shares = [link.share for link in own]
        if self.allocator == "equal":
            shares = [1 / len(done)] * len(done)
        return simulate_round_time(compute, alone, shares)[0]


def _text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
