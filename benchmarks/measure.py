"""Clocks, peak memory and tables for the benchmarks."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median wall time of ``run``; one untimed run first where repeats allow it."""
    if repeats > 1:
        run()
    times = []
    for _ in range(repeats):
        clock = time.perf_counter()
        run()
        times.append(time.perf_counter() - clock)
    return statistics.median(times)


def side_by_side(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return medians; the runs take turns, so that a busy moment of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            clock = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - clock)
    return {name: statistics.median(values) for name, values in times.items()}


class PeakMemory:
    """The largest resident memory inside a ``with`` block, and the growth since its start."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._process = psutil.Process()
        self.start = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory_info().rss)

    @property
    def growth(self) -> int:
        return self.peak - self.start


def machine() -> str:
    """Return what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, torch {torch.__version__}, "
        f"Python {platform.python_version()}; load before the run {os.getloadavg()[0]:.1f}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value * 1e3:,.1f} ms"


def size(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"
