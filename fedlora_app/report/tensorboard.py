"""TensorBoard, for those who have it: an optional listener of the strategy."""

from __future__ import annotations

from contextlib import suppress
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common import log

from strategies.records import Record, RoundRecord

GROUPS = ("server", "clients")
SCALARS = {
    "train_loss": "train/loss",
    "accepted": "participation/accepted",
    "rejected": "participation/rejected",
    "late": "participation/late",
    "bytes_down": "bytes/down",
    "bytes_up": "bytes/up",
    "seconds": "time/real_seconds",
    "clock_seconds": "time/clock_seconds",
    "clock_total": "time/clock_total",
    "planned_seconds": "time/planned_seconds",
}


class TensorBoardListener:
    """Writes the scalars of each round for TensorBoard, as they come.

    Parameters
    ----------
    folder : Path
        The run's folder; events go to its ``tensorboard``.
    resume_round : int, optional
        Hide what an interrupted run wrote of later rounds. (default: begin a new run)

    Raises
    ------
    RuntimeError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, resume_round: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                "TensorBoard is not installed; run: pip install 'fedlora[tensorboard]'"
            ) from error
        make: Any = SummaryWriter  # torch gives it no types
        self._writer: Any = make(
            log_dir=str(folder / "tensorboard"),
            purge_step=None if resume_round is None else resume_round + 1,
        )

    def __call__(self, record: Record) -> None:
        """Write the scalars of a round; other records have none."""
        if record["kind"] != "round" or self._writer is None:
            return
        try:
            for tag, value in scalars(record).items():
                self._writer.add_scalar(tag, value, record["round"])
            self._writer.flush()
        except OSError as error:  # its writer is of no more use then
            log(WARNING, "TensorBoard gets no more of this run: %s", error)
            self._writer = None

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def scalars(record: RoundRecord) -> dict[str, float]:
    """Return the scalars of a ``round`` record by their TensorBoard tag."""
    found: dict[str, object] = {tag: record.get(key) for key, tag in SCALARS.items()}
    for key, value in record.items():
        group, _, name = key.partition("_")
        if group in GROUPS and name and name != "total":
            found[f"{group}/{name}"] = value
    return {tag: float(v) for tag, v in found.items() if isinstance(v, int | float)}
