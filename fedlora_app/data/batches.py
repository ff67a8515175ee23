"""In which batches rows are seen, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlora_app.tasks.base import Indices, Inputs


def training_batches(
    rows: int, batch_size: int, total: int, rng: np.random.Generator
) -> Iterator[Indices]:
    """Yield ``total`` row numbers in shuffled batches, every row once before any comes again.

    Parameters
    ----------
    rows : int
        At least one.
    batch_size : int
        Rows of a batch; the last may be smaller.
    total : int
        Number of rows over all batches.
    rng : numpy.random.Generator
        Shuffles each pass.
    """
    if not rows:
        raise ValueError("expected rows to train on, got none")
    passes = -(-total // rows)
    order = np.concatenate([rng.permutation(rows) for _ in range(passes)])[:total]
    for start in range(0, total, batch_size):
        yield order[start : start + batch_size]


def evaluation_batches(
    inputs: Inputs, batch_size: int, most: int | None = None
) -> Iterator[Indices]:
    """Yield every row number once, sorted by size so that batches hold little padding.

    Parameters
    ----------
    inputs : Inputs
    batch_size : int
        Rows of a batch at most.
    most : int, optional
        A batch is no larger than this, in the unit of ``inputs.sizes``, unless its one row is.
    """
    order = np.argsort(-inputs.sizes, kind="stable")  # so the first of a batch is its longest
    start = 0
    while start < len(order):
        size = batch_size
        if most is not None:
            size = max(1, min(size, most // max(1, int(inputs.sizes[order[start]]))))
        yield order[start : start + size]
        start += size
