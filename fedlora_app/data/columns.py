"""Which columns of a table are the texts and the labels, and whose its rows are."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.config.keys import DataConfig
from fedlora_app.data.labels import label_name
from fedlora_app.data.tables import Table
from fedlora_app.discretion import DataError

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question", "title")
LABEL_COLUMNS = ("label", "labels", "category", "class", "target", "topic", "intent")
# Two texts of a row: NLI, paraphrase, question and answer.
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "answer"),
         ("question", "sentence"), ("question1", "question2"), ("text", "text_pair"),
         ("text_a", "text_b"), ("text1", "text2"), ("question", "passage"),
         ("query", "passage"))  # fmt: skip
# A title beside a text is left; whatever else reads like a text is not, in silence.
BESIDE = ("title", "headline", "subject", "url", "date")
# The other half of a pair, also where its texts are short.
PARTNERS = {*TEXT_COLUMNS, *(name for pair in PAIRS for name in pair), "context", "response"}
LOOKED_AT = 1000  # rows that decide whether a column reads like texts
WORDS = 4  # on average, from which on a column of mostly different values reads like texts


def has_column(table: Table, wanted: str, usual: Sequence[str]) -> bool:
    """Tell whether there is such a column."""
    if wanted == "auto":
        return any(name.lower() in usual for name in table.columns)
    return wanted in table.columns


def label_column(table: Table, config: DataConfig) -> str:
    """Return the column of the labels, or raise DataError."""
    return named_column(table, config.label_column, LABEL_COLUMNS, "data.label-column")


def text_columns(table: Table, config: DataConfig, label: str) -> dict[str, str]:
    """Return the column of the texts, or the two of pairs of texts, by role.

    Parameters
    ----------
    table : Table
    config : DataConfig
        Its ``text_column`` names one column, or two with a comma between; auto takes two of
        usual names, else one, and refuses to choose where one more reads like texts.
    label : str
        The column of the labels.

    Returns
    -------
    dict
        ``{"text": column}`` or ``{"text": column, "second text": column}``.
    """
    key = "data.text-column"
    path, _ = table.place(None)
    pair = _pair(table, config.text_column, label)
    if len(pair) > 2 or len(set(pair)) < len(pair):
        raise DataError(
            path,
            "expected one column of texts, or two different ones for pairs of texts",
            repr(config.text_column),
            f"set {key}",
        )
    auto = config.text_column == "auto"
    texts = [named_column(table, "auto" if auto else name, (name,), key) for name in pair]
    texts = texts or [named_column(table, config.text_column, TEXT_COLUMNS, key)]
    if label in texts:
        raise DataError(
            path, "expected texts and labels in different columns", f"{label!r} for both",
            f"set {key}",
        )  # fmt: skip
    if auto:
        used = (*texts, label, config.partition_column)
        rivals = [name for name in table.columns if name not in used]
        rivals = [name for name in rivals if _reads_like_text(name, table.columns[name])]
        if rivals:
            raise DataError(
                path,
                "expected one column of texts, or two of usual names; which is meant of several "
                "is not to be guessed",
                ", ".join(map(repr, [*texts, *rivals])),
                f"set {key} (for pairs of texts, to two columns with a comma between)",
            )
    return dict(zip(("text", "second text"), texts, strict=False))


def has_texts(table: Table, wanted: str) -> bool:
    """Tell whether there are such columns of texts."""
    pair = _pair(table, wanted)
    if pair and wanted != "auto":
        return all(name in table.columns for name in pair)
    return bool(pair) or has_column(table, wanted, TEXT_COLUMNS)


def _pair(table: Table, wanted: str, label: str = "") -> list[str]:
    """Return the columns of pairs of texts, asked for or of usual names; none of single texts."""
    if wanted == "auto":
        found = {name.lower() for name in table.columns if name != label}
        return next((list(pair) for pair in PAIRS if found.issuperset(pair)), [])
    if "," not in wanted or wanted in table.columns:
        return []
    return [name.strip() for name in wanted.split(",")]


def groups_of(table: Table, config: DataConfig, kept: Sequence[int]) -> NDArray[np.str_] | None:
    """Return whose the ``kept`` rows of a table are; None without ``data.partition-column``.

    Values are read as labels are: ``1`` and ``1.0`` are one, blanks around them do not count.
    Where there is none, or something else than a word or a number, it is "".
    """
    if config.partition_column not in table.columns:
        return None
    values = table.columns[config.partition_column][:]
    return np.array([_group(values[i]) for i in kept], dtype=np.str_)


def refuse_holes(table: Table, config: DataConfig, groups: NDArray[np.str_] | None) -> None:
    """Raise DataError unless every training row says whose it is, for a natural partition."""
    column, key = config.partition_column, "data.partition-column"
    path, _ = table.place(None)
    if column not in table.columns:
        close = get_close_matches(column, table.columns, n=1)
        raise DataError(
            path,
            f"expected a column {repr(column) + ' ' if column else ''}that says whose a row is",
            ", ".join(table.columns),
            f"set {key}" + (f"; did you mean {close[0]!r}?" if close else ""),
        )
    if groups is not None and not all(groups):
        first = next(i for i, value in enumerate(table.columns[column][:]) if not _group(value))
        path, line = table.place(first)
        raise DataError(
            path,
            f"expected a word or a number in column {column!r} in every row",
            f"none in {int((groups == '').sum())} of {len(groups)}",
            f"fill them in, take these rows out, or set {key} to another column",
            line,
        )


def _group(value: Any) -> str:
    try:
        return label_name(value) or ""
    except TypeError:
        return ""


def _reads_like_text(name: str, values: Sequence[Any]) -> bool:
    if name.lower() in BESIDE:
        return False
    some = [v for v in values[:LOOKED_AT] if isinstance(v, str) and v.strip()]
    if not some:
        return False
    words = [sum(map(str.isalpha, value.replace(",", " ").split())) for value in some]
    if name.lower() in PARTNERS:
        return sum(count > 1 for count in words) > len(some) / 2
    return sum(words) >= WORDS * len(some) and len(set(some)) > len(some) / 2


def named_column(table: Table, wanted: str, usual: tuple[str, ...], key: str) -> str:
    """Return the column that is named, or the first of usual name; raise DataError if none is."""
    path, _ = table.place(None)
    if wanted in table.columns:
        return wanted
    expected, named = f"a column {wanted!r}", "the column that is named"
    if wanted == "auto":
        for name in usual:
            found = [column for column in table.columns if column.lower() == name]
            if len(found) > 1:
                raise DataError(
                    path,
                    "expected columns that differ in more than upper and lower case",
                    ", ".join(map(repr, found)),
                    f"set {key}",
                )
            if found:
                return found[0]
        expected = named = f"one of the columns {', '.join(usual)}"
    got = ", ".join(table.columns)
    error = DataError(path, f"expected {expected}", got, f"set {key}, or another task")
    # What was asked for is the server's own word, but a site need not repeat it.
    error.told = error.told.replace(expected, named)
    raise error
