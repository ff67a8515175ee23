"""How labels are read: one rule for server and sites, whatever the format of the file.

A label is known by its name. ``1``, ``1.0`` and ``"1"`` are the label ``1``; ``true`` and
``"TRUE"`` are ``True``; blanks around a name do not count. Nothing is shifted: -1 is a class
named ``-1``.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

WHOLE = re.compile(r"[-+]?(0|[1-9]\d*)(\.0*)?", re.ASCII)
NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?\s?%?", re.ASCII)
# As tables write a missing value.
HOLES = {"nan", "-nan", "null", "nil", "none", "na", "n/a", "n.a.", "#n/a", "<na>", "?", "-", "--",
         "missing", "undefined"}  # fmt: skip
MANY = 20  # labels; more than these want two rows each, and broken numbers want half of them

Fail = Callable[..., NoReturn]  # called with (row or None, kind, got, remedy)


def label_name(value: Any) -> str | None:
    """Return the name of a label as it stands in a file; None if there is none.

    Raises
    ------
    TypeError
        If it is neither a word nor a number, such as a list.
    """
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating | Decimal):
        if not math.isfinite(value):
            return None
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    name = unicodedata.normalize("NFC", value.strip())
    if WHOLE.fullmatch(number := name.replace("\N{MINUS SIGN}", "-")):
        whole = number.partition(".")[0].removeprefix("+")
        return "0" if whole == "-0" else whole
    if name.lower() in ("true", "false"):
        return name.capitalize()
    return name or None


def hidden(values: Sequence[Any], names: Sequence[str]) -> bool:
    """Tell whether a split hides its labels: as nothing, or as -1 where that is no class."""
    nothing = {None} if "-1" in names else {None, "-1"}
    return all(not isinstance(v, list | dict) and label_name(v) in nothing for v in values)


def encode(
    values: Sequence[Any],
    declared: Sequence[str] | None,
    known: Sequence[str] | None,
    fail: Fail,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return label ids and the names of all labels.

    Parameters
    ----------
    values : sequence
        Labels as they stand in the file.
    declared : sequence of str, optional
        Names that the file itself gives to its numbers (a ``ClassLabel`` of ``datasets``).
    known : sequence of str, optional
        The labels of the task in the order of their ids (default: those declared, or those
        found, sorted). Whole numbers count as ids if none of these is a number.
    fail : callable
        Raises the error, given the row and what is wrong.
    """
    read: dict[tuple[type, Any], str] = {}
    found = [_name(row, value, read, fail) for row, value in enumerate(values)]
    counts = Counter(found)
    if declared is not None:
        ids = {str(i): label_name(name) or name for i, name in enumerate(declared)}
        if not all(isinstance(value, str) for value in values):
            _refuse_unknown(found, ids, declared, fail)
            found = [ids[name] for name in found]
    elif known is None:
        _refuse_doubtful(found, counts, fail)
    names = tuple(known or declared or _ordered(counts))
    index = {label_name(name) or name: i for i, name in enumerate(names)}
    if len(index) < len(names):
        fail(None, "two labels have the same name", ", ".join(names), "rename one")
    numbers = all(WHOLE.fullmatch(name) for name in found)
    if declared is None and numbers and not any(map(NUMBER.fullmatch, index)):
        index = {str(i): i for i in range(len(names))}
    _refuse_unknown(found, index, names, fail)
    return np.array([index[name] for name in found], dtype=np.int64), names


def _name(row: int, value: Any, read: dict[tuple[type, Any], str], fail: Fail) -> str:
    try:
        return read[type(value), value]
    except (KeyError, TypeError):  # not seen yet, or a list
        pass
    try:
        name = label_name(value)
    except TypeError:
        fail(row, "expected one label a row, a word or a number", repr(value), "choose one of them")
    if name is None:
        fail(row, "expected a label", repr(value), "add it or remove the row")
    if not name.isprintable():
        fail(row, "expected a label of printable characters", repr(value), "correct it")
    read[type(value), value] = name
    return name


def _ordered(names: Counter[str]) -> list[str]:
    if all(map(WHOLE.fullmatch, names)):
        return sorted(names, key=int)
    if all(map(NUMBER.fullmatch, names)):
        return sorted(names, key=lambda name: float(name.rstrip("% ").replace(",", ".")))
    return sorted(names)


def _refuse_doubtful(found: list[str], counts: Counter[str], fail: Fail) -> None:
    """Refuse what no set of classes looks like."""
    numbers = {name for name in counts if NUMBER.fullmatch(name)}
    broken = numbers - {name for name in numbers if WHOLE.fullmatch(name)}
    crowd = len(counts) > len(found) / 2
    if len(numbers) == len(counts) and broken and (len(counts) > MANY / 2 or crowd):
        fail(
            found.index(next(name for name in found if name in broken)),
            f"expected labels that are words or whole numbers; {len(counts)} numbers in "
            f"{len(found)} rows are scores, and this classifies",
            next(name for name in found if name in broken),
            "turn them into classes or set data.label-column",
        )
    if len(counts) > MANY and crowd:
        fail(
            None,
            f"expected labels that come again; {len(counts)} different ones in {len(found)} rows "
            "are texts, ids or scores",
            remedy="set data.label-column",
        )
    if all(map(_is_list, counts)):
        fail(0, "expected one label a row, a word or a number", found[0], "choose one of them")
    truths = counts.keys() & {"True", "False"}
    if truths and len(counts) > len(truths) and counts.keys() <= {"True", "False", "0", "1"}:
        fail(
            found.index(next(name for name in found if name not in truths)),
            "expected truth values alone or numbers alone",
            ", ".join(_ordered(counts)),
            "write all labels in one way",
        )
    holes = {name for name in counts if name.lower() in HOLES}
    if holes and numbers and len(numbers) + len(holes) == len(counts):
        hole = next(name for name in found if name in holes)
        fail(found.index(hole), "expected a number as label", repr(hole), "remove the row")


def _is_list(name: str) -> bool:
    """Tell whether a label is a list, written out."""
    if not name.startswith("["):
        return False
    try:
        return isinstance(json.loads(name.replace("'", '"')), list)
    except ValueError:
        return False


def _refuse_unknown(
    found: list[str], index: dict[str, int] | dict[str, str], names: Sequence[str], fail: Fail
) -> None:
    unknown = dict.fromkeys(name for name in found if name not in index)
    if unknown:
        some = ", ".join(map(repr, list(unknown)[:5])) + (", …" if len(unknown) > 5 else "")
        known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        fail(
            found.index(next(iter(unknown))),
            f"expected labels among the {len(names)} known ones",
            f"{some} where {known} are known",
            "correct them or remove their rows",
        )
