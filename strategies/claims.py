"""What a client says beside its arrays, numbers and text: cleaned and bounded in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What of a reply beside its arrays is kept: far more than any client of good will sends.
MOST_METRICS = 256
LONGEST_NAME = 128
MOST_NOTES = 8
REASON_LENGTH = 500
"""How much of a client's own text is kept."""
LARGEST = 3.4028234663852886e38
"""The largest number that is believed: what float32 holds. Sums of larger ones overflow."""


class ReplyError(ValueError):
    """A reply cannot be used; the message says why."""


def clean(text: str, length: int = REASON_LENGTH) -> str:
    """Return a client's text as part of one line of ours: no line of its own, and not a book.

    Whatever a client names, says or raises goes through here before it reaches a log, an error
    or a record.
    """
    said = "".join(c if c.isprintable() else " " for c in text[: 4 * length])
    return " ".join(said.split())[:length]


def is_usable(value: float) -> bool:
    """Return whether a client's number can be summed: finite, and not too large."""
    return abs(value) <= LARGEST  # false for NaN; whole numbers may be beyond every float


def weight_of(metrics: Mapping[str, Any], key: str) -> float:
    """Return how much a reply counts.

    Raises
    ------
    ReplyError
        If it does not say so, or with no number above 0.
    """
    if key not in metrics:
        raise ReplyError(f"the metric {key!r}, by which replies are weighted, is missing")
    weight = metrics[key]
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ReplyError(f"{key} is {clean(repr(weight), 60)}, expected a number")
    if not (is_usable(weight) and weight > 0):
        most = f", at most {LARGEST:.3g}" if weight > LARGEST else ""
        raise ReplyError(f"{key} is {_shown(weight)}, expected a number above 0{most}")
    return float(weight)


def numbers(
    items: Mapping[str, Any], weight_key: str, vital: str
) -> tuple[dict[str, float], float, tuple[str, ...]]:
    """Return the usable numbers of a reply, its weight, and what was left out.

    A NumPyClient's metrics may hold text as well. A number that is none, or so large that a sum
    overflows, would spread to every mean it enters, so it is dropped here, once.

    Parameters
    ----------
    items : Mapping[str, Any]
        Whatever the client reported.
    weight_key : str
        Which of it is the weight.
    vital : str
        What must be a usable number above 0 if it is there at all.

    Raises
    ------
    ReplyError
        If the weight or what is vital is none.
    """
    weight = weight_of(items, weight_key)
    found: dict[str, float] = {}
    notes: list[str] = []
    for key, value in items.items():
        if key == vital:
            found[key] = weight_of(items, key)
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if len(key) > LONGEST_NAME or clean(key, LONGEST_NAME) != key:
            notes.append(f"a metric named {clean(key, 40)!r} …")
        elif len(found) >= MOST_METRICS and key != weight_key:
            notes.append(f"all metrics after the first {MOST_METRICS}")
            break
        elif is_usable(value):
            found[key] = value
        else:
            notes.append(f"{key} = {_shown(value)}")
    found[weight_key] = weight
    return found, weight, tuple(notes[:MOST_NOTES])


def _shown(value: float) -> str:
    try:
        return f"{value:g}"
    except OverflowError:
        return "a number beyond every float"
