"""Weights & Biases: offline, unless the environment says otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.report.trackers.base import PROJECT, Cell, Tracker


class WeightsAndBiases(Tracker):
    """Writes to ``RUN/wandb``, for ``wandb sync``; with ``WANDB_MODE=online`` to the service."""

    title, needs, extra = "W&B", "wandb", "wandb"

    def begin(self) -> None:
        """Open a run whose id goes by its folder, so that a resumed one is the same."""
        import wandb

        folder = self.run.folder
        self._wandb: Any = wandb
        self._run: Any = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dict(self.run.config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of a round."""
        self._run.log(dict(values), step=step)

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table."""
        made = self._wandb.Table(list(head), [list(row) for row in rows], allow_mixed_types=True)
        self._run.log({name: made})

    def file(self, path: Path) -> None:
        """Keep the file as an artefact of the run."""
        kept = self._wandb.Artifact(f"{path.stem}-{self._run.id}", type=path.stem)
        kept.add_file(str(path))
        self._run.log_artifact(kept)

    def close(self, *, completed: bool) -> None:
        """Close the run."""
        self._run.finish(exit_code=0 if completed else 1)
