"""Trackio: a local database, which its own dashboard shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.report.trackers.base import PROJECT, Cell, Tracker


class Trackio(Tracker):
    """Writes to ``TRACKIO_DIR``, or without it to ``trackio`` beside the run's folder."""

    title, needs, extra = "Trackio", "trackio", "trackio"

    def begin(self) -> None:
        """Open a run of the folder's name, or go on with it."""
        os.environ.setdefault("TRACKIO_DIR", str(self.run.folder.parent / "trackio"))
        import trackio  # which reads its folder from the environment when it is imported

        self._trackio: Any = trackio
        self._run: Any = trackio.init(
            project=PROJECT,
            name=self.run.folder.name,
            config=dict(self.run.config),
            resume="never" if self.run.resume_round is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of a round."""
        self._run.log(dict(values), step=step)

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table."""
        rows = [["" if cell is None else cell for cell in row] for row in rows]
        self._run.log({name: self._trackio.Table(list(head), rows, allow_mixed_types=True)})

    def file(self, path: Path) -> None:
        """Keep a copy of the file with the project."""
        self._trackio.save(path, project=PROJECT)

    def close(self, *, completed: bool) -> None:
        """Close the run."""
        self._run.finish()
