"""Which texts and labels a run trains and tests on: loading, sharing, tokens, batches.

Data come from packages, local files, saved data sets or the Hugging Face Hub, and leave
here as ``TextRows`` and ``TokenizedRows``. Nothing slow is imported unless it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_app import packaged
from fedlora_app.config import DataConfig
from fedlora_app.tables import TEST_SPLITS, Table, read_local, read_splits

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question", "title")
LABEL_COLUMNS = ("label", "labels", "category", "class", "target", "topic", "intent")

# Data without a test split lose this part of the training rows to one. The seed is fixed
# because server and clients, each on its own, must hold out the same rows.
HOLD_OUT = 0.1
HOLD_OUT_SEED = 0

Indices = NDArray[np.int64]


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
    """

    texts: Sequence[str]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Indices) -> TextRows:
        """Return the rows at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        texts = [self.texts[i] for i in chosen]
        return TextRows(texts, self.labels[chosen], self.label_names)


@dataclass(frozen=True)
class TokenizedRows:
    """Token ids of n texts, padded on the right to the longest of them.

    Parameters
    ----------
    input_ids : int32 Tensor, shape (n, longest)
        Token ids.
    lengths : ndarray of int64, shape (n,)
        Tokens of each text before the padding.
    labels : ndarray of int64, shape (n,)
        Label ids.
    """

    input_ids: Tensor
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | Indices) -> TokenizedRows:
        """Return the rows at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        ids = self.input_ids[torch.from_numpy(chosen)]
        return TokenizedRows(ids, self.lengths[chosen], self.labels[chosen])


class Batch(NamedTuple):
    """Some rows as a model takes them; the tensors are int64."""

    input_ids: Tensor  # (batch, longest of the batch)
    attention_mask: Tensor  # the same shape: 1 on tokens, 0 on padding
    labels: Tensor  # (batch,)
    rows: Indices  # (batch,) where they lie in the TokenizedRows


def load_train(config: DataConfig, label_names: Sequence[str] | None = None) -> TextRows:
    """Return the training rows of ``config.name``.

    Parameters
    ----------
    config : DataConfig
        ``name`` is a packaged data set (``packaged:reuters-r8``, ``packaged:reuters-r52``,
        ``packaged:20newsgroups``); a csv, tsv, jsonl or parquet file; a folder with
        ``train.*`` and perhaps ``test.*`` of these; a folder written by
        ``Dataset.save_to_disk``; or a Hugging Face data set id, with the name of its
        subset after a colon if it has several (``nyu-mll/glue:sst2``).
        Without a labelled test or validation split a seeded tenth of the training rows is
        held out for ``load_test``.
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
    train, held_out = _splits(config)
    rows = _rows(train, config, label_names, f"{config.name}, train")
    if len(rows.label_names) < 2:
        raise ValueError(
            f"{config.name}: expected at least two labels, got {', '.join(rows.label_names)}; "
            "set data.label-column"
        )
    return rows if held_out is not None else rows.take(_hold_out(len(rows))[0])


def load_test(config: DataConfig, label_names: Sequence[str] | None = None) -> TextRows:
    """Return the test rows of ``config.name``; the label names default to those of training.

    They are the first labelled split of test, validation, valid and dev, or else the
    rows held out from training. See ``load_train`` for parameters and errors.
    """
    train, test = _splits(config)
    rows = _rows(train, config, label_names, f"{config.name}, train")
    if test is None:
        return rows.take(_hold_out(len(rows))[1])
    rows_of_test = _rows(test, config, rows.label_names, f"{config.name}, test")
    if config.name == packaged.PREFIX + "20newsgroups":
        known = set(rows.texts)  # seven posts are in both files
        fresh = [i for i, text in enumerate(rows_of_test.texts) if text not in known]
        return rows_of_test.take(fresh)
    return rows_of_test


def load_own(path: str | Path, config: DataConfig, label_names: Sequence[str]) -> TextRows:
    """Return all training rows of a node's own file or folder.

    Parameters
    ----------
    path : str or Path
        A csv, tsv, jsonl or parquet file, a folder with ``train.*``, or a folder written
        by ``Dataset.save_to_disk``.
    config : DataConfig
        Says which columns are read.
    label_names : sequence of str
        The labels of the federation in the order of their ids. Labels that are whole
        numbers count as ids unless the names are numbers too.

    Raises
    ------
    FileNotFoundError
        If the path does not exist or holds no such data.
    ValueError
        If columns, texts or labels are not what is expected.
    """
    location = Path(path).expanduser()
    if not location.exists():
        raise FileNotFoundError(f"expected this node's data at {location.absolute()}: not there")
    return _rows(_train_of(read_local(location), str(path)), config, label_names, str(path))


def partition_indices(
    labels: NDArray[np.int64], config: DataConfig, *, num_clients: int, seed: int
) -> list[Indices]:
    """Share the training rows out to simulated clients.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,)
        Label of each row.
    config : DataConfig
        ``partition`` is one of

        - ``iid``: equal shares of the shuffled rows;
        - ``dirichlet``: each class is shared in proportions drawn from Dirichlet(alpha);
        - ``pathological``: each client holds ``classes_per_client`` classes;
        - ``double-imbalance``: client i holds the first i + 1 classes, each class split
          equally over its holders (see ``partition.double_imbalance`` for a number of
          clients other than that of the classes).
    num_clients : int
        Number of clients.
    seed : int
        Same seed, same shares.

    Returns
    -------
    list of ndarray of int64
        Sorted row numbers per client; every row is in exactly one of them, and each has
        at least ``config.min_samples``.

    Raises
    ------
    ValueError
        If that cannot be had.
    """
    from fedlora_app.partition import partition  # takes over a second

    return partition(labels, config, num_clients=num_clients, seed=seed)


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


def tokenize(rows: TextRows, tokenizer: Any, max_length: int) -> TokenizedRows:
    """Turn texts into token ids, at most ``max_length`` (and what the model takes) each."""
    if not len(rows):
        return TokenizedRows(torch.zeros(0, 0, dtype=torch.int32), rows.labels, rows.labels)
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(list(rows.texts), truncation=True, max_length=limit)["input_ids"]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    padded = np.full((len(rows), lengths.max()), tokenizer.pad_token_id, dtype=np.int32)
    # One assignment through a mask: a loop over rows takes several times as long.
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(encoded)
    return TokenizedRows(torch.from_numpy(padded), lengths, rows.labels)


def training_batches(
    rows: TokenizedRows, batch_size: int, total: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yield ``total`` rows in shuffled batches, every row once before any comes again.

    Parameters
    ----------
    rows : TokenizedRows
        At least one row.
    batch_size : int
        Rows of a batch; the last may be smaller.
    total : int
        Number of rows over all batches.
    rng : numpy.random.Generator
        Shuffles each pass.
    """
    if not len(rows):
        raise ValueError("expected rows to train on, got none")
    passes = -(-total // len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(passes)])[:total]
    for start in range(0, total, batch_size):
        yield _batch(rows, order[start : start + batch_size])


def evaluation_batches(rows: TokenizedRows, batch_size: int) -> Iterator[Batch]:
    """Yield every row once, sorted by length so that batches hold little padding."""
    order = np.argsort(rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield _batch(rows, order[start : start + batch_size])


def _batch(rows: TokenizedRows, chosen: Indices) -> Batch:
    lengths = rows.lengths[chosen]
    # Few distinct widths, in steps of 8, suit both the matrix kernels and the allocator.
    width = min(-(-int(lengths.max()) // 8) * 8, rows.input_ids.shape[1])
    ids = rows.input_ids[torch.from_numpy(chosen), :width].long()
    mask = torch.arange(width) < torch.from_numpy(lengths)[:, None]
    return Batch(ids, mask.long(), torch.from_numpy(rows.labels[chosen]), chosen)


def _splits(config: DataConfig) -> tuple[Table, Table | None]:
    """Return the training table and the labelled test table, if there is one."""
    splits = read_splits(config.name)
    train = _train_of(splits, config.name)
    for split in TEST_SPLITS:
        # Public benchmarks hide the labels of their test split as -1.
        if split in splits and not _hidden(splits[split], config):
            return train, splits[split]
    return train, None


def _train_of(splits: Mapping[str, Table], name: str) -> Table:
    if "train" not in splits:
        raise ValueError(f"{name}: expected a split 'train', got {', '.join(splits) or 'none'}")
    return splits["train"]


def _hidden(table: Table, config: DataConfig) -> bool:
    column = _column(table, config.label_column, LABEL_COLUMNS, "data.label-column", "test split")
    return all(label in (-1, None) for label in table.columns[column][:])


def _hold_out(rows: int) -> tuple[Indices, Indices]:
    return train_validation_split(np.arange(rows), HOLD_OUT, HOLD_OUT_SEED)


def _rows(
    table: Table, config: DataConfig, label_names: Sequence[str] | None, where: str
) -> TextRows:
    """Pick the text and label columns, skip rows without text, number the labels."""
    text = _column(table, config.text_column, TEXT_COLUMNS, "data.text-column", where)
    label = _column(table, config.label_column, LABEL_COLUMNS, "data.label-column", where)
    pairs = [
        (words, value)
        for words, value in zip(table.columns[text][:], table.columns[label][:], strict=True)
        if words is not None and str(words).strip()
    ]
    if not pairs:
        raise ValueError(f"{where}: expected texts in column {text!r}, got none")
    texts, values = zip(*pairs, strict=True)
    wrong = next((words for words in texts if not isinstance(words, str)), None)
    if wrong is not None:
        raise ValueError(f"{where}: expected strings in column {text!r}, got {wrong!r}")
    ids, names = _encode(
        values, table.class_names.get(label), label_names, f"{where}, column {label!r}"
    )
    return TextRows(texts, ids, names)


def _column(table: Table, wanted: str, usual: tuple[str, ...], key: str, where: str) -> str:
    if wanted in table.columns:
        return wanted
    if wanted == "auto":
        by_lower = {name.lower(): name for name in table.columns}
        for name in usual:
            if name in by_lower:
                return by_lower[name]
        expected = f"one of the columns {', '.join(usual)}"
    else:
        expected = f"a column {wanted!r}"
    raise ValueError(f"{where}: expected {expected}, got {', '.join(table.columns)}; set {key}")


def _encode(
    values: Sequence[Any],
    class_names: tuple[str, ...] | None,
    label_names: Sequence[str] | None,
    where: str,
) -> tuple[Indices, tuple[str, ...]]:
    """Return label ids and their names."""
    if all(isinstance(value, str) and value.isdecimal() for value in values):
        values = [int(value) for value in values]  # a csv file knows only strings
    whole_numbers = all(isinstance(value, int) for value in values)
    if not whole_numbers:
        wrong = [value for value in values if not isinstance(value, str) or not value.strip()]
        if wrong:
            raise ValueError(
                f"{where}: expected labels that are all strings or all whole numbers, "
                f"got {wrong[0]!r}"
            )
    elif class_names is not None:
        _refuse(
            {value for value in values if not 0 <= value < len(class_names)}, where, class_names
        )
        values = [class_names[value] for value in values]
        whole_numbers = False
    names = tuple(label_names or class_names or map(str, sorted(set(values))))
    index: dict[str | int, int] = {name: i for i, name in enumerate(names)}
    if whole_numbers:
        numeric = any(name.isdecimal() for name in names)
        index = {
            int(name) if numeric and name.isdecimal() else i: i for i, name in enumerate(names)
        }
    _refuse(set(values) - set(index), where, names)
    return np.array([index[value] for value in values], dtype=np.int64), names


def _refuse(unknown: set[Any], where: str, names: tuple[str, ...]) -> None:
    if unknown:
        got = ", ".join(map(repr, sorted(unknown)[:5]))
        known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise ValueError(
            f"{where}: expected labels among the {len(names)} known ones ({known}), got {got}; "
            "correct them or remove their rows"
        )
