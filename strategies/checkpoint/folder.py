"""The checkpoints of a run in one folder: writing, keeping, finding them."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common import log
from torch import Tensor

from strategies.checkpoint.format import (
    ROUND,
    SUMS,
    TEMPORARY,
    Checkpoint,
    CheckpointError,
    DamagedError,
    Scalar,
    content,
    folder_name,
    read,
    remove,
    rounds_in,
    write,
)

if sys.platform != "win32":
    import fcntl

ASIDE = "set-aside"


class Checkpoints:
    """The checkpoints of one run, in one folder; at most one process writes there.

    Parameters
    ----------
    folder : Path or str
        Made when the first checkpoint is written.
    every : int (default: 1)
        Rounds between checkpoints.
    keep : int (default: 3)
        The last ``keep`` stay, and the best.
    best : str (default: "")
        Metric by which one is the best: "accuracy" (largest) or, with a minus, "-loss"
        (smallest). Among equals it is the earliest. Empty: no best.

    Raises
    ------
    ValueError
        If ``every`` or ``keep`` is below 1.
    """

    def __init__(
        self, folder: Path | str, *, every: int = 1, keep: int = 3, best: str = ""
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value!r}")
        self.folder = Path(folder).expanduser().absolute()
        self.every = every
        self.keep = keep
        self.best = best
        self._scores: dict[int, float | None] = {}  # of what is there, once claimed
        self._unlock: Callable[[], object] | None = None

    # ----- writing -------------------------------------------------------------------

    def due(self, server_round: int, num_rounds: int) -> bool:
        """Return whether a checkpoint is to be written after this round."""
        return server_round % self.every == 0 or server_round == num_rounds

    def score_of(self, metrics: Mapping[str, float]) -> float | None:
        """Return the metric that decides which one is best, if it is among ``metrics``."""
        return metrics.get(self.best.removeprefix("-")) if self.best else None

    def claim(self, resumed: Checkpoint | None = None, *, patience: float = 0.0) -> None:
        """Take the folder for this run; call it before the first round.

        Nothing is deleted here. What is damaged, and what comes after ``resumed`` (the run
        now takes another course from there), moves to ``set-aside/``.

        Parameters
        ----------
        resumed : Checkpoint, optional
            What the run goes on from. One in another folder leaves that folder alone.
        patience : float (default: 0)
            Seconds to wait for another run that is writing there.

        Raises
        ------
        FileExistsError
            If the folder holds checkpoints that this run does not go on from.
        BlockingIOError
            If another run is writing there, and goes on to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.close()
        self._lock(patience)
        found = rounds_in(self.folder)
        here = resumed is not None and resumed.path.parent.resolve() == self.folder.resolve()
        if found and not here:
            self.close()
            raise FileExistsError(
                f"{self.folder} holds checkpoints of another run (rounds {min(found)} to "
                f"{max(found)}); resume from them, name another folder or remove them"
            )
        self._scores = {}
        for number, path in found.items():
            if resumed is not None and number > resumed.round:
                _set_aside(path, f"the run goes on from round {resumed.round}")
                continue
            try:
                self._scores[number] = self._score(read(path))
            except DamagedError as error:
                _set_aside(path, str(error))

    def save(
        self,
        server_round: int,
        arrays: Mapping[str, Tensor],
        state: Mapping[str, Any],
        fingerprint: Mapping[str, Scalar],
        score: float | None = None,
    ) -> Path | None:
        """Write a checkpoint, then remove those that are neither new nor best.

        A full or failing disk does not end the run: the log names the cause, what was there
        before stays, and the next round that is due tries again.

        Parameters
        ----------
        server_round : int
            The round that has just ended.
        arrays : Mapping[str, Tensor]
            Any type that safetensors knows; read back to the last bit, in this order.
        state : Mapping[str, Any]
            ``None``, ``bool``, ``int`` of any size, ``float`` with NaN and infinity, ``str``,
            lists, tuples (read back as lists), and mappings with ``str`` keys. NumPy scalars
            are written as Python's; NumPy arrays and tensors are refused.
        fingerprint : Mapping[str, scalar]
            The settings of the run, for ``compare_fingerprints`` when it is resumed.
        score : float, optional
            Value of the metric ``best``, sign as it is; NaN is never the best.

        Returns
        -------
        Path or None
            The new folder, or None if it could not be written.

        Raises
        ------
        TypeError
            If the state has something that JSON would not give back, with its place.
        ValueError
            If this round was saved before.
        """
        if self._unlock is None:
            self.claim()
        if server_round in self._scores:
            raise ValueError(f"round {server_round} was saved before in {self.folder}")
        files = content(server_round, arrays, state, fingerprint, metric=self.best, score=score)
        target = self.folder / folder_name(server_round)
        try:
            for leftover in self.folder.glob(f"round-*{TEMPORARY}"):  # of a writer that was killed
                shutil.rmtree(leftover)
            write(target, files)
        except OSError as error:
            log(WARNING, "no checkpoint of round %s: %s; the run goes on, and older checkpoints in "
                "%s stay as they are", server_round, error, self.folder)  # fmt: skip
            return None
        self._scores[server_round] = None if score is None else float(score)
        self._prune()
        return target

    def close(self) -> None:
        """Let go of the folder; happens by itself when the object or its process ends."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def _prune(self) -> None:
        stay = set(sorted(self._scores)[-self.keep :])
        if (best := best_round(self._scores, self.best)) is not None:
            stay.add(best)
        for number in self._scores.keys() - stay:
            path = self.folder / folder_name(number)
            del self._scores[number]
            try:
                remove(path)
            except OSError as error:
                log(WARNING, "could not remove the old checkpoint %s: %s", path, error)

    def _score(self, checkpoint: Checkpoint) -> float | None:
        return checkpoint.score if checkpoint.metric == self.best else None

    def _lock(self, patience: float) -> None:
        """Keep other writers out for as long as this process lives; the system cleans up."""
        if sys.platform == "win32":
            self._unlock = lambda: None
            return
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._unlock = weakref.finalize(self, os.close, lock)
        deadline = time.monotonic() + patience
        try:
            if not (taken := _take(lock)) and patience:
                log(WARNING, "another run is writing checkpoints to %s; waiting up to %g s for it "
                    "to end", self.folder, patience)  # fmt: skip
            while not taken and time.monotonic() < deadline:
                time.sleep(0.2)
                taken = _take(lock)
        except OSError as error:
            log(WARNING, "%s cannot be locked (%s); see to it that only one run writes there",
                self.folder, error)  # fmt: skip
            return
        if not taken:
            self.close()
            raise BlockingIOError(
                f"another run is writing checkpoints to {self.folder}; give each run a folder "
                "of its own"
            )

    # ----- reading -------------------------------------------------------------------

    def load(self, which: Path | str = "latest") -> Checkpoint:
        """Read a checkpoint and verify it.

        Parameters
        ----------
        which : "latest", "best", Path or str (default: "latest")
            "latest": the newest that is good; each damaged one on the way is named in a warning.
            "best": the best that is good, by ``best`` or else by the metric of the newest.
            A path: that checkpoint, or the latest in that folder of checkpoints.

        Raises
        ------
        FileNotFoundError
            If nothing is there.
        CheckpointError
            If nothing there can be used, or what ``which`` names cannot. One of a newer format
            is not passed over for an older one.
        """
        if which in ("latest", "best"):
            return self._latest() if which == "latest" else self._best()
        path = Path(which).expanduser().absolute()
        if not path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {path}{_instead(path.parent)}")
        if not ROUND.fullmatch(path.name) and not (path / SUMS).exists():
            return Checkpoints(path, best=self.best)._latest()
        try:
            return read(path)
        except DamagedError as error:
            raise CheckpointError(f"{path} is damaged: {error}{_instead(path.parent)}") from error

    def _latest(self) -> Checkpoint:
        found = _existing(self.folder)
        for path in reversed(found):
            try:
                return read(path)
            except DamagedError as error:
                log(WARNING, "the checkpoint %s is damaged (%s); trying the one before it",
                    path, error)  # fmt: skip
        raise CheckpointError(
            f"every checkpoint in {self.folder} is damaged ({', '.join(p.name for p in found)}); "
            "start the run again without resuming, in another folder"
        )

    def _best(self) -> Checkpoint:
        metric = self.best or self._latest().metric
        scores: dict[int, float | None] = {}
        for path in _existing(self.folder):
            try:
                checkpoint = read(path)
            except DamagedError as error:
                log(WARNING, "the checkpoint %s is damaged: %s", path, error)
                continue
            if checkpoint.metric == metric:
                scores[checkpoint.round] = checkpoint.score
        best = best_round(scores, metric)
        if best is None:
            raise CheckpointError(
                f"no checkpoint in {self.folder} has a score in {metric or 'any metric'!r}; "
                "resume from 'latest'"
            )
        return read(self.folder / folder_name(best))


def best_round(scores: Mapping[int, float | None], metric: str) -> int | None:
    """Return the round with the best finite score, the earliest among equals."""
    sign = 1 if metric.startswith("-") else -1
    known = [(sign * s, n) for n, s in scores.items() if s is not None and math.isfinite(s)]
    return min(known)[1] if metric and known else None


def _existing(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, and refuse an empty one."""
    if not (found := rounds_in(folder)):
        raise FileNotFoundError(
            f"there are no checkpoints in {folder}; start the run without resuming, or name the "
            "folder of a run that wrote some"
        )
    return list(found.values())


def _instead(folder: Path) -> str:
    """Return which checkpoint of a folder could be used, as the end of a message."""
    for path in reversed(rounds_in(folder).values()):
        try:
            return f"; the newest good one is {read(path).path}"
        except CheckpointError:
            continue
    return f"; there is no good one in {folder}"


def _set_aside(path: Path, reason: str) -> None:
    """Move a checkpoint out of the way, under a name that is free."""
    shelf = path.parent / ASIDE
    shelf.mkdir(exist_ok=True)
    number, target = 1, shelf / path.name
    while target.exists():
        number, target = number + 1, shelf / f"{path.name}.{number + 1}"
    os.rename(path, target)
    log(WARNING, "moved the checkpoint %s to %s: %s", path.name, target, reason)


def _take(lock: int) -> bool:
    """Take the lock if it is free, and tell whether it is ours."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
