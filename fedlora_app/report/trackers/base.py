"""What a tracker is: one place, of somebody else's making, where a run can be followed."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from strategies.records import RoundRecord

Scalar = bool | int | float | str
Cell = int | float | str | None

PROJECT = "fedlora"
"""What runs are gathered under, where the environment names nothing else."""

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


@dataclass(frozen=True)
class Followed:
    """A run that is followed.

    Parameters
    ----------
    folder : Path
        Where it writes.
    config : mapping
        Every key of its config.
    resume_round : int, optional
        It goes on after this round (default: it is new).
    """

    folder: Path
    config: Mapping[str, Scalar]
    resume_round: int | None = None


class Tracker(ABC):
    """Begins in its constructor, and imports its library there.

    Attributes
    ----------
    title : str
        What people call it.
    needs : str
        The module that has to be installed.
    extra : str
        The extra of this project that brings it.
    """

    title: ClassVar[str]
    needs: ClassVar[str]
    extra: ClassVar[str]

    def __init__(self, run: Followed) -> None:
        if missing := self.missing():
            raise RuntimeError(missing)
        self.run = run
        self.begin()

    @classmethod
    def missing(cls) -> str:
        """Return what to install; empty if it is there."""
        try:
            found = importlib.util.find_spec(cls.needs) is not None
        except (ImportError, ValueError):  # a part of what is not there, or has no spec
            found = False
        if found:
            return ""
        return f"{cls.title} is not installed; run: pip install 'fedlora[{cls.extra}]'"

    @abstractmethod
    def begin(self) -> None:
        """Open the run there, or go on with it, and write its config."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of a round."""

    @abstractmethod
    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table."""

    @abstractmethod
    def file(self, path: Path) -> None:
        """Keep a file of the run."""

    @abstractmethod
    def close(self, *, completed: bool) -> None:
        """Close the run there."""


def scalars(record: RoundRecord) -> dict[str, float]:
    """Return the numbers of a ``round`` record by their tag."""
    found: dict[str, object] = {tag: record.get(key) for key, tag in SCALARS.items()}
    for key, value in record.items():
        group, _, name = key.partition("_")
        if group in GROUPS and name and name != "total":
            found[f"{group}/{name}"] = value
    return {tag: float(v) for tag, v in found.items() if isinstance(v, int | float)}
