"""TensorBoard: event files in the run's own folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.report.trackers.base import Cell, Tracker


class TensorBoard(Tracker):
    """Writes to ``RUN/tensorboard``; files stay in the run's folder, beside it."""

    title, needs, extra = "TensorBoard", "tensorboard", "tensorboard"

    def begin(self) -> None:
        """Open the event file; hide what an interrupted run wrote of later rounds."""
        from torch.utils.tensorboard import SummaryWriter

        make: Any = SummaryWriter  # torch gives it no types
        resumed = self.run.resume_round
        self._writer: Any = make(
            log_dir=str(self.run.folder / "tensorboard"),
            purge_step=None if resumed is None else resumed + 1,
        )
        text = json.dumps(self.run.config, indent=2, ensure_ascii=False)
        self._writer.add_text("config", f"```json\n{text}\n```")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of a round."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table as text."""
        lines = [head, ["---"] * len(head), *rows]
        text = "\n".join(f"| {' | '.join('' if c is None else f'{c}' for c in r)} |" for r in lines)
        self._writer.add_text(name, text)

    def file(self, path: Path) -> None:
        """Leave the file where it is."""

    def close(self, *, completed: bool) -> None:
        """Close the event file."""
        self._writer.close()
