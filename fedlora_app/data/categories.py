"""Kinds of rows that have no labels to learn: a column of categories, or how long the rows are.

Partitions share rows out by them, and AutoRank measures how mixed a client's are. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data.labels import label_name
from fedlora_app.data.tables import Table
from fedlora_app.discretion import DataError

USUAL = ("category", "topic", "intent", "subject", "domain", "label", "labels", "source", "task")
LENGTH = "length"  # in place of a column
LENGTHS = ("shortest", "short", "long", "longest")  # quarters of all training rows
NONE = "(none)"

KEY, BOUNDS = "categories", "length-bounds"  # in what all nodes agree on


@dataclass(frozen=True)
class Kinds:
    """Of which kind each row is.

    Parameters
    ----------
    ids : ndarray of int64, shape (n,)
        Positions in ``about["categories"]``; those beyond its end are of kinds that training lacks.
    about : dict
        What all nodes have to agree on.
    column : str
        Where they are from; empty: from no column.
    """

    ids: NDArray[np.int64]
    about: dict[str, Any]
    column: str = ""


def kinds_of(
    table: Table,
    wanted: str,
    kept: Sequence[int],
    lengths: Sequence[int],
    *,
    taken: Sequence[str],
    about: Mapping[str, Any] | None,
) -> Kinds | None:
    """Return the kinds of some rows of a table; None where they have none.

    Parameters
    ----------
    table : Table
    wanted : str
        A column; ``length``, if no column is called so; or ``auto``: the first of a usual name in
        which values come again, if there is one.
    kept : sequence of int
        The rows.
    lengths : sequence of int
        How long each of them is.
    taken : sequence of str
        Columns that are texts.
    about : mapping, optional
        What is known of the training rows (default: these are they).

    Raises
    ------
    DataError
        If there is no such column.
    """
    if about is not None and KEY not in about:
        return None  # the training rows have none, so nobody's count
    if wanted == LENGTH and wanted not in table.columns:
        return _by_length(np.asarray(lengths, np.float64), about)
    column = _column(table, wanted, kept, taken, known=about is not None)
    if column is None:
        return None if about is None else Kinds(np.full(len(kept), len(about[KEY])), dict(about))
    values = table.columns[column][:]
    names = [_name(values[i]) for i in kept]
    known = list(about[KEY]) if about else sorted(set(names))
    places = {name: i for i, name in enumerate(known)}
    ids = np.array([places.get(name, len(known)) for name in names], dtype=np.int64)
    return Kinds(ids, {KEY: known}, column)


def _by_length(lengths: NDArray[np.float64], about: Mapping[str, Any] | None) -> Kinds:
    bounds = about[BOUNDS] if about else np.quantile(lengths, (0.25, 0.5, 0.75)).tolist()
    ids = np.searchsorted(bounds, lengths, side="left").astype(np.int64)
    return Kinds(ids, {KEY: list(LENGTHS), BOUNDS: list(bounds)})


def _column(
    table: Table, wanted: str, kept: Sequence[int], taken: Sequence[str], *, known: bool
) -> str | None:
    if wanted != "auto":
        if wanted in table.columns:
            return wanted
        path, _ = table.place(None)
        close = get_close_matches(wanted, table.columns, n=1)
        raise DataError(
            path,
            "expected the column of categories that data.label-column names",
            ", ".join(table.columns),
            "set data.label-column" + (f"; did you mean {close[0]!r}?" if close else ""),
        )
    by_name = {name.lower(): name for name in table.columns if name not in taken}
    for name in USUAL:
        if name in by_name:
            values = table.columns[by_name[name]][:]
            names = {_name(values[i]) for i in kept}
            if known or 1 < len(names) <= len(kept) / 2:  # else every row its own, or all one
                return by_name[name]
    return None


def _name(value: Any) -> str:
    try:
        return label_name(value) or NONE
    except TypeError:  # a list or the like
        return NONE
