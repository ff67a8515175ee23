"""Which run of a study is next, for several that run side by side."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from pathlib import Path

from fedlora_app.compare.retiming import training_of
from fedlora_app.compare.study import Flat, Run, Study
from fedlora_app.launch.superlink import RunStatus
from fedlora_app.report.records import read_json
from strategies.durations import duration

A_RUN = 4 * 2**30  # bytes for a server, a client and a Ray, with models of a few hundred MB

Reuse = Callable[[Collection[Path]], None]


class StudyQueue:
    """Hands out the runs that are not done yet, each once, and says how long it will take.

    Parameters
    ----------
    study : Study
    folder : Path
        Of its results.
    reuse : callable
        Called after every run with the folders of those that are running: writes results of
        others that need no run of their own.
    """

    def __init__(self, study: Study, folder: Path, reuse: Reuse) -> None:
        self.waiting = [run for run in study.runs(folder) if not run.done]
        self.total = len(self.waiting)
        self.running: dict[Path, Flat | None] = {}
        self.failed = self.ran = 0
        self._reuse = reuse
        self._number = {run.folder: n for n, run in enumerate(self.waiting, start=1)}
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._closed = False

    def next(self) -> Run | None:
        """Return a run to do now; None if there is none left, or the queue is closed."""
        with self._changed:
            while True:
                self.waiting = [run for run in self.waiting if not run.done]
                if self._closed or not self.waiting:
                    return None
                run = next((r for r in self.waiting if not self._may_be_spared(r)), None)
                if run is not None:
                    break
                self._changed.wait()
            self.waiting.remove(run)
            left = time_left(
                time.monotonic() - self._began, self.ran, 1 + len(self.waiting) + len(self.running)
            )
            self.running[run.folder] = training_of(run.config)
            print(f"[{self._number[run.folder]}/{self.total}] {run.name}{left} …", flush=True)
            shutil.rmtree(run.folder, ignore_errors=True)  # what an interrupted run left
            return run

    def over(self, run: Run, status: RunStatus) -> None:
        """Note how a run ended."""
        with self._changed:
            del self.running[run.folder]
            self.ran += 1
            if status.completed:
                name = f"{run.name}: " if self.running else ""
                scores = run.scores()
                print(f"  {name}" + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
                sys.stdout.flush()
                self._reuse(self.running)
            else:
                self.failed += 1
                print(f"  failed: {run.name}: {status.details}", file=sys.stderr, flush=True)
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _may_be_spared(self, run: Run) -> bool:
        """Tell whether one that runs now may give this one's results too, but for the clock."""
        training = training_of(run.config)
        return training is not None and training in self.running.values()


def time_left(seconds: float, ran: int, waiting: int) -> str:
    """Return what is left of a study whose runs took so long, for the log; nothing before one."""
    return f", left {duration(seconds / ran * waiting)}" if ran else ""


def jobs_for(cores: int, memory: int, gpu: bool) -> int:
    """Return how many runs to do side by side.

    One a core: what a run does by itself (start, sums, plots) is then done while others train. On
    a GPU one alone, which has its memory.

    Parameters
    ----------
    cores : int
    memory : int
        Bytes that are free.
    gpu : bool
    """
    return 1 if gpu else max(1, min(cores, memory // A_RUN))


def listing(study: Study, folder: Path, jobs: int = 1) -> str:
    """Return which seeds of each arm are done and to do, and how long that will take.

    A run to do is taken to be as long as those of its arm and setting that are done, else of its
    setting, else of all. Those that will be timed again from another take no time.
    """
    runs = list(study.runs(folder))
    known = {run.folder: seconds for run in runs if (seconds := _seconds(run))}
    trained = [training_of(run.config) for run in runs if run.done]
    lines, left, unknown = [], 0.0, 0
    width = [max(map(len, names)) for names in (study.settings, study.arms)]
    for setting, arm in product(study.settings, study.arms):
        own = [run for run in runs if (run.setting, run.arm) == (setting, arm)]
        done = [run.seed for run in own if run.done]
        to_do = [run for run in own if not run.done]
        length = _usual(known, runs, setting, arm)
        spared = 0
        for run in to_do:
            training = training_of(run.config)
            if training is not None and training in trained:
                spared += 1
            else:
                trained.append(training)  # it will be, before the next one like it
        if length is None:
            unknown += len(to_do) - spared
        else:
            left += length * (len(to_do) - spared)
        lines.append(
            f"{setting:<{width[0]}}  {arm:<{width[1]}}  done {_seeds(done)}"
            f"  to do {_seeds([run.seed for run in to_do])}"
            f"{f', each about {duration(length)}' if length and len(to_do) > spared else ''}"
            f"{f', {spared} to time again' if spared else ''}"
        )
    count = sum(run.done for run in runs)
    text = f"{count} of {len(runs)} runs are done; left: {duration(left / jobs)}"
    if unknown:
        text += f" and {unknown} runs of unknown length"
    return "\n".join([*lines, "", text + (f", {jobs} side by side" if jobs > 1 else "")])


def _seeds(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds)) or "none"


def _seconds(run: Run) -> float:
    """Return how long a finished run took; 0 where that is not known, or it was timed again."""
    summary = read_json(run.folder / "summary.json")
    return 0.0 if "retimed_from" in summary else float(summary.get("seconds", 0.0))


def _usual(
    known: Mapping[Path, float], runs: Sequence[Run], setting: str, arm: str
) -> float | None:
    for like in (
        [run for run in runs if (run.setting, run.arm) == (setting, arm)],
        [run for run in runs if run.setting == setting],
        runs,
    ):
        if seconds := [known[run.folder] for run in like if run.folder in known]:
            return sum(seconds) / len(seconds)
    return None
