"""Names for the log, of which there may be ten thousand."""

from __future__ import annotations

from collections.abc import Sequence
from logging import WARNING

from flwr.common import log

#: So many are named; the others are counted.
MOST_NAMED = 20


def listed(names: Sequence[str], most: int = MOST_NAMED) -> str:
    """Return the first names in one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def log_each(lines: Sequence[str], level: int = WARNING) -> None:
    """Log the first lines one by one, and how many more there are."""
    for line in lines[:MOST_NAMED]:
        log(level, "%s", line)
    if len(lines) > MOST_NAMED:
        log(level, "… and so for %s more", len(lines) - MOST_NAMED)
