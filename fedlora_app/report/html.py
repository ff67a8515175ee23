"""Numbers and tables as HTML text. What comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

LONG = 36  # characters of a cell that may be broken into lines


def number(value: float | None) -> str:
    """Return a number as short as its size allows; a dash where there is none."""
    if value is None:
        return "–"
    size = abs(value)
    if 0.01 <= size < 1000:
        return f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"
    return f"{value:.4g}"


def seconds_text(seconds: float | None) -> str:
    """Return a duration in the unit that suits it."""
    if seconds is None:
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def data_size(count: float) -> str:
    """Return bytes in the unit that suits them (1 MB = 10^6 bytes)."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def spans(numbers: Iterable[int]) -> str:
    """Return whole numbers with neighbours drawn together: ``1, 3–5``."""
    found = sorted(set(numbers))
    parts = []
    for _, run in groupby(enumerate(found), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}")
    return ", ".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; columns of numbers to the right, None as a dash. A cell may be ``Html``."""
    right = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(head))]
    out = ["<div class=wide><table><thead><tr>"]
    out += [_cell("th", title, r) for title, r in zip(head, right, strict=True)]
    out.append("</tr></thead><tbody>")
    for row in rows:
        cells = (_cell("td", value, r) for value, r in zip(row, right, strict=True))
        out.append(f"<tr>{''.join(cells)}</tr>")
    out.append("</tbody></table></div>")
    return "".join(out)


class Html(str):
    """Text that is HTML already."""


def bar(value: float, largest: float, colour: str = "s1") -> Html:
    """Return a bar of a length in proportion to the value."""
    share = 100 * value / largest if largest > 0 else 0
    return Html(f'<i class="hbar {colour}" style="width:{share:.1f}%"></i>')


def bar_rows(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Return one bar a line from (label, value, text, colour class); nothing without rows."""
    if not rows:
        return ""
    largest = max(value for _, value, _, _ in rows)
    return "<table class=bars>" + "".join(
        f"<tr><td>{escape(label)}</td><td class=track>{bar(value, largest, colour)}</td>"
        f"<td>{escape(text)}</td></tr>"
        for label, value, text, colour in rows
    ) + "</table>"  # fmt: skip


def _cell(tag: str, value: Any, right: bool) -> str:
    if isinstance(value, Html):
        return f"<{tag} class=track>{value}</{tag}>"
    if value is None or isinstance(value, float):
        value = number(value)
    text = str(value)
    kind = " class=right" if right else " class=long" if len(text) > LONG else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"
