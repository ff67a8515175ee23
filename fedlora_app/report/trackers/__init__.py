"""Where else a run is written as it goes on: the key ``tracking`` names some of ``TRACKERS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from logging import WARNING
from pathlib import Path
from types import TracebackType

from flwr.common import log

from fedlora_app.config.keys import RunConfig
from fedlora_app.report.clients_table import client_rows
from fedlora_app.report.html import Html
from fedlora_app.report.page import RunFiles, page
from fedlora_app.report.trackers.base import Followed, Tracker, scalars
from fedlora_app.report.trackers.mlflow import MLflow
from fedlora_app.report.trackers.tensorboard import TensorBoard
from fedlora_app.report.trackers.trackio import Trackio
from fedlora_app.report.trackers.wandb import WeightsAndBiases
from strategies.records import Record

__all__ = ["TRACKERS", "Tracker", "Trackers", "make_trackers", "tracking_problems"]

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


class Trackers:
    """Some trackers of one run: a listener of the strategy, and a context manager.

    What a tracker raises ends that tracker, with a warning, and never the run.

    Parameters
    ----------
    folder : Path
        The run's folder.
    trackers : sequence of Tracker
    """

    def __init__(self, folder: Path, trackers: Sequence[Tracker]) -> None:
        self.folder = folder
        self._trackers = list(trackers)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._each(lambda tracker: tracker.close(completed=kind is None))

    def __call__(self, record: Record) -> None:
        """Write the scalars of a round; other records have none."""
        if record["kind"] == "round":
            values = scalars(record)
            self._each(lambda tracker: tracker.scalars(values, record["round"]))

    def finish(self) -> None:
        """Write the final scores, the table of clients and the page, once the folder is whole."""
        if not self._trackers:
            return
        run = RunFiles.read(self.folder)
        names = {"loss", *(score.name for score in run.scores)}
        final = {f"final/{name}": float(run.summary[name]) for name in names if name in run.summary}
        unit = str(run.config.get("weight-by", "rows"))
        head, rows = client_rows(run.records, run.scores, unit)
        kept = [i for i in range(len(head)) if not any(isinstance(row[i], Html) for row in rows)]
        head, rows = [head[i] for i in kept], [[row[i] for i in kept] for row in rows]
        file = self.folder / "report.html"
        file.write_text(page(run), encoding="utf-8")
        last = max((r["round"] for r in run.rounds), default=0)

        def write(tracker: Tracker) -> None:
            tracker.scalars(final, last)
            tracker.table("clients", head, rows)
            tracker.file(file)

        self._each(write)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever a library of others raises: the run goes on
                log(WARNING, "%s gets no more of this run: %s", tracker.title, error)
                self._trackers.remove(tracker)


def make_trackers(config: RunConfig, folder: Path, resume_round: int | None = None) -> Trackers:
    """Return the trackers that a config names, each begun; who cannot begin is left out.

    Parameters
    ----------
    config : RunConfig
    folder : Path
        The run's folder, which is there.
    resume_round : int, optional
        The run goes on after this round (default: it is new).

    Raises
    ------
    RuntimeError
        If the library of one is not installed.
    """
    if problems := tracking_problems(config):
        raise RuntimeError("\n".join(problems))
    run, begun = Followed(folder, config.to_flat(), resume_round), []
    for name in _wanted(config):
        try:
            begun.append(TRACKERS[name](run))
        except Exception as error:  # a server that does not answer, say: the run goes on without
            log(WARNING, "%s gets nothing of this run: %s", TRACKERS[name].title, error)
    return Trackers(folder, begun)


def tracking_problems(config: RunConfig) -> list[str]:
    """Return which trackers there are none of, or whose library is not installed."""
    problems = []
    for name in _wanted(config):
        key = "tracking" if name in config.tracking else "tensorboard"
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            problems.append(f"{key}: expected some of {known}, with commas; got {name!r}")
        elif missing := TRACKERS[name].missing():
            problems.append(f"{key}: {missing}")
    return problems


def _wanted(config: RunConfig) -> list[str]:
    named = [name.strip() for name in config.tracking.split(",") if name.strip()]
    return list(dict.fromkeys([*named, *(["tensorboard"] if config.tensorboard else [])]))
