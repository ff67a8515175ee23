"""Rows as a model takes them: sharing, tokens, batches (for loading them see ``rows.py``).

Data come from packages, local files, saved data sets or the Hugging Face Hub, and leave
here as ``TextRows`` and ``TokenizedRows``. Nothing slow is imported unless it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_app.config import DataConfig
from fedlora_app.rows import (
    Indices,
    TextRows,
    load_own,
    load_test,
    load_train,
    train_validation_split,
)

__all__ = [
    "Batch",
    "Indices",
    "TextRows",
    "TokenizedRows",
    "evaluation_batches",
    "load_own",
    "load_test",
    "load_train",
    "partition_indices",
    "tokenize",
    "train_validation_split",
    "training_batches",
]


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


def partition_indices(
    labels: NDArray[np.int64],
    config: DataConfig,
    *,
    num_clients: int,
    seed: int,
    label_names: Sequence[str] = (),
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
    label_names : sequence of str
        Names for errors (default: the labels' numbers).

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

    return partition(labels, config, num_clients=num_clients, seed=seed, label_names=label_names)


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


def evaluation_batches(
    rows: TokenizedRows, batch_size: int, tokens: int | None = None
) -> Iterator[Batch]:
    """Yield every row once, sorted by length so that batches hold little padding.

    Parameters
    ----------
    rows : TokenizedRows
    batch_size : int
        Rows of a batch at most.
    tokens : int, optional
        A batch holds no more of them, unless its one row does.
    """
    order = np.argsort(-rows.lengths, kind="stable")  # so the first of a batch is its longest
    start = 0
    while start < len(order):
        size = batch_size
        if tokens is not None:
            size = max(1, min(size, tokens // max(1, int(rows.lengths[order[start]]))))
        yield _batch(rows, order[start : start + size])
        start += size


def _batch(rows: TokenizedRows, chosen: Indices) -> Batch:
    lengths = rows.lengths[chosen]
    # Few distinct widths, in steps of 8, suit both the matrix kernels and the allocator.
    width = min(-(-int(lengths.max()) // 8) * 8, rows.input_ids.shape[1])
    ids = rows.input_ids[torch.from_numpy(chosen), :width].long()
    mask = torch.arange(width) < torch.from_numpy(lengths)[:, None]
    return Batch(ids, mask.long(), torch.from_numpy(rows.labels[chosen]), chosen)
