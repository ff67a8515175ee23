"""MLflow: a tracking server, or a database beside the runs."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.report.trackers.base import PROJECT, Cell, Tracker

FOLDER = "fedlora.folder"
AT_ONCE = 100  # parameters that MLflow takes in one call


class MLflow(Tracker):
    """Writes to ``MLFLOW_TRACKING_URI``, or without it to ``mlflow.db`` beside the run's folder."""

    title, needs, extra = "MLflow", "mlflow", "mlflow"

    def begin(self) -> None:
        """Open a run, or the one that this folder had before it was interrupted."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder = self.run.folder
        self._served = "MLFLOW_TRACKING_URI" in os.environ
        own = None if self._served else f"sqlite:///{folder.parent / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=own)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._new_experiment(name)
        if self.run.resume_round is not None:
            where = f"tags.`{FOLDER}` = '{folder}'"
            if before := self._client.search_runs([experiment], where, max_results=1):
                self._id = before[0].info.run_id
                return
        made = self._client.create_run(experiment, run_name=folder.name, tags={FOLDER: str(folder)})
        self._id = made.info.run_id
        params = [Param(key, str(value)) for key, value in self.run.config.items()]
        for start in range(0, len(params), AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + AT_ONCE])

    def _new_experiment(self, name: str) -> Any:
        files = None if self._served else (self.run.folder.parent / "mlartifacts").as_uri()
        return self._client.create_experiment(name, artifact_location=files)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of a round."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(tag, value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table as csv."""
        text = io.StringIO()
        csv.writer(text).writerows([head, *rows])
        self._client.log_text(self._id, text.getvalue(), f"{name}.csv")

    def file(self, path: Path) -> None:
        """Keep a copy of the file."""
        self._client.log_artifact(self._id, str(path))

    def close(self, *, completed: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._id, "FINISHED" if completed else "FAILED")
