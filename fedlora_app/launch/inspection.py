"""A look at the rows before anything starts: what was taken, what was left, what is wrong.

``inspect`` is for the server's door, ``check_own_data`` for a SuperNode that starts. Neither
needs torch, and both take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_app.config.keys import RunConfig
from fedlora_app.data.kept import shares_of
from fedlora_app.discretion import DataError, SiteError
from fedlora_app.tasks import About, Rows, Task, make_task

CHECKED = "FEDLORA_CHECKED"
"""An environment variable that says that a run was checked before it was submitted."""

CORES = "FEDLORA_CORES"
"""One that says how many cores are for a run that has others beside it."""

CLIENTS = 10  # of a simulation that names no number
SHOWN = 12  # classes, columns and files that a block names


@dataclass(frozen=True)
class Report:
    """What a run trains and tests on; ``str`` of it is a block of text for the console.

    Parameters
    ----------
    task : Task
    train, test : Rows
        All training rows, and the server's test rows.
    shares : sequence of int
        Rows of each simulated client (default: none were shared out).
    """

    task: Task
    train: Rows
    test: Rows
    shares: Sequence[int] = ()

    @property
    def about(self) -> About:
        """What all nodes have to agree on."""
        return self.train.about

    def __str__(self) -> str:
        lines = [*block(self.task, "train", self.train), *block(self.task, "test", self.test)]
        return "\n".join([*lines, self.shared_out] if self.shares else lines)

    @property
    def shared_out(self) -> str:
        """A line about the shares of simulated clients; empty without them."""
        if not self.shares:
            return ""
        low, high = min(self.shares), max(self.shares)
        return f"shares: {len(self.shares)} clients with {low} to {high} rows each"


def clients_of(task: Task) -> int:
    """Return how many clients a simulation has that names no number.

    Raises
    ------
    ValueError or FileNotFoundError
        If the rows name them (``data.partition = 'natural'``) and cannot be read.
    """
    if task.config.data.partition != "natural":
        return CLIENTS
    groups = task.train_rows().groups
    return 1 if groups is None else len(np.unique(groups))


def inspect(task: Task, *, clients: int | None = None, looked: bool = False) -> Report:
    """Load all training and test rows and share them out once, as a run will.

    Parameters
    ----------
    task : Task
    clients : int, optional
        Simulated clients that share the training rows (default: the rows are not shared out).
    looked : bool (default: False)
        Whether another process of this run has read every item already, which may take long.

    Raises
    ------
    ValueError or FileNotFoundError
        If there are no such data, something in them is certainly wrong, or clients would get
        too few rows.
    """
    train, test = task.train_rows(), task.test_rows()
    for rows in () if looked else (train, test):
        task.look_at(rows)
    if clients is None:
        return Report(task, train, test)
    return Report(task, train, test, [len(part) for part in shares_of(task, train, clients)])


def block(task: Task, split: str, rows: Rows) -> list[str]:
    """Return lines about rows: files, columns, rows, classes, the first row, the longest text."""
    o = rows.origin
    left = f"; left: {_some(o.left)}" if o.left else ""
    out = f" ({o.blank} left out: no {next(iter(o.columns))})" if o.blank else ""
    taken = "".join(f", {role} from {column!r}" for role, column in o.columns.items())
    lines = [
        f"{split}: {_some([Path(f).name for f in o.files]) or 'no file'}{taken}{left}",
        f"  {len(rows)} rows{out}",
    ]
    if (strata := task.strata(rows)) is not None:
        names = list(task.strata_names(rows.about))
        counts = np.bincount(strata, minlength=len(names))
        names += ["another"] * (len(counts) - len(names))  # that training does not have
        lines[-1] += ": " + _some([f"{n} {c}" for n, c in zip(names, counts, strict=True)])
    return [*lines, *task.show(rows), *(f"  note: {note}" for note in o.notes)]


def check_own_data(node: Mapping[str, Any], config: RunConfig | None = None) -> str:
    """Return a block of text about a node's own rows and limits, or raise what is wrong.

    For a SuperNode that starts, before it says that it is there; for its own log alone, since
    the block quotes a row. Needs neither torch nor a server.

    Parameters
    ----------
    node : mapping
        The node config: ``data-path``, or ``partition-id`` and ``num-partitions``;
        ``max-rank``, ``dp-noise-multiplier``, ``dp-clip``, ``num-examples`` if it has them.
    config : RunConfig, optional
        Which task, and which columns are read (default: texts to classify, and columns detected,
        as a run does that names none; if none is, the block says so, as a run may name them).

    Raises
    ------
    ValueError or FileNotFoundError
        If the data cannot be read, are too few, or a limit is none.
    """
    check_limits(node)
    if "data-path" not in node:
        if "partition-id" in node and "num-partitions" in node:
            share, shares = node["partition-id"], node["num-partitions"]
            return f"data: share {share} of {shares} of what the run names"
        raise SiteError(*[NO_DATA] * 2)
    path, task = str(node["data-path"]), make_task(config or RunConfig())
    table = task.own_table(path)
    if not task.knows(table):
        return (
            f"{path}: columns {_some(list(table.columns))}; {task.name} does not know which of "
            "them to take, so the run has to name its columns (data.…-column) or another task"
        )
    rows = task.own_rows(path, None)
    refuse_few(rows, path)
    task.look_at(rows)
    return "\n".join(block(task, "own rows", rows))


NO_DATA = (
    "this node has no data: expected data-path, or partition-id and num-partitions, in its node "
    "config; start it with flower-supernode --node-config 'data-path=\"/path/to/rows.csv\"'"
)


def refuse_few(rows: Rows, path: str | Path) -> None:
    """Raise DataError if a node has too few rows to train on one and validate on another."""
    if len(rows) < 2:
        what = next(iter(rows.origin.columns), "something in them")
        raise DataError(
            path,
            f"expected at least 2 rows with {what}, one to train on and one to validate on",
            str(len(rows)),
            "add rows, or leave this node out",
        )


def check_limits(node: Mapping[str, Any]) -> None:
    """Raise SiteError if a number in a node config is none, or not a possible one."""
    wholes = {"max-rank": 1, "num-examples": 1, "num-partitions": 1, "partition-id": 0}
    for key, low in wholes.items():
        value = node.get(key, low)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise SiteError(
                f"node config: {key}: expected a whole number of at least {low}, got {value!r}",
                f"node config: {key}: expected a whole number of at least {low}",
            )
    for key in ("dp-noise-multiplier", "dp-clip"):
        value = node.get(key, 1)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise SiteError(
                f"node config: {key}: expected a number above 0, got {value!r}",
                f"node config: {key}: expected a number above 0",
            )
    share, shares = node.get("partition-id"), node.get("num-partitions")
    if share is not None and shares is not None and share >= shares:
        raise SiteError(
            f"node config: partition-id: expected 0 to {shares - 1}, got {share}",
            "node config: partition-id: expected less than num-partitions",
        )


def _some(names: Sequence[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in names]  # no control characters
    return ", ".join(names[:SHOWN]) + (f", … ({len(names)})" if len(names) > SHOWN else "")
