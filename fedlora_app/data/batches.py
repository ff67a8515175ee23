"""In which batches rows are seen, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fedlora_app.tasks.base import Indices, Inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: So many batches are sorted by length at a time: more of them hold less padding, but long rows
#: then meet the same others in every pass.
WINDOW = 50


def training_batches(
    rows: int,
    batch_size: int,
    total: int,
    rng: np.random.Generator,
    sizes: NDArray[np.int64] | None = None,
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
    sizes : ndarray of int, shape (rows,), optional
        Put rows of like size into a batch, the batches in random order (default: any rows).
    """
    if not rows:
        raise ValueError("expected rows to train on, got none")
    passes = -(-total // rows)
    order = np.concatenate([rng.permutation(rows) for _ in range(passes)])[:total]
    if sizes is not None:
        order = _by_size(order, sizes, batch_size, rng)
    for start in range(0, total, batch_size):
        yield order[start : start + batch_size]


def _by_size(
    order: Indices, sizes: NDArray[np.int64], batch_size: int, rng: np.random.Generator
) -> Indices:
    """Return the order with rows of like size in a batch; what fills no batch stays at the end."""
    found = []
    for start in range(0, len(order), WINDOW * batch_size):
        part = order[start : start + WINDOW * batch_size]
        whole = len(part) - len(part) % batch_size
        batches = part[:whole][np.argsort(sizes[part[:whole]], kind="stable")]
        found += [rng.permutation(batches.reshape(-1, batch_size)).ravel(), part[whole:]]
    return np.concatenate(found)


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
