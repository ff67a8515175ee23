"""Charts as inline SVG: they take their colours from the page, so they suit light, dark and paper.

Every function returns HTML with all text escaped. Colours are classes of the page's style sheet:
``s1`` to ``s5`` for series, ``muted``, ``bad`` and ``late``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 460.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 36.0
FEW = 80  # points that are marked, with a tooltip


def line_chart(
    title: str,
    x_label: str,
    series: Mapping[str, Sequence[Point]],
    *,
    y_top: float | None = None,
    whole_x: bool = False,
) -> str:
    """Draw lines; a series without points is left out, and without any there is no chart.

    Parameters
    ----------
    title, x_label : str
    series : Mapping[str, Sequence[Point]]
        Points (x, y) by label, at most five.
    y_top : float, optional
        Upper end of the y axis (default: what the points need).
    whole_x : bool
        x has whole numbers only. (default: False)
    """
    series = {name: list(xy) for name, xy in series.items() if xy}
    if not series:
        return ""
    every = [p for xy in series.values() for p in xy]
    axes = Axes(every, y_top, whole_x=whole_x)
    body = [axes.frame(x_label)]
    for number, (name, xy) in enumerate(series.items(), start=1):
        path = "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in xy)
        body.append(f'<path class="line s{number}" d="M{path}"/>')
        if len(xy) <= FEW:
            body += [
                f'<circle class="dot s{number}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.6">'
                f"<title>{escape(name)}: {y:.4g} at {escape(x_label)} {x:.6g}</title></circle>"
                for x, y in xy
            ]
    keys = {name: f"s{i}" for i, name in enumerate(series, start=1)}
    return _figure(title, keys, body)


def bar_chart(
    title: str,
    x_label: str,
    bars: Sequence[tuple[int, float, str, str]],
    marks: Sequence[Point],
    keys: Mapping[str, str],
) -> str:
    """Draw one bar for each whole x, and a dash where a value was expected.

    Parameters
    ----------
    title, x_label : str
    bars : Sequence of (x, height, colour class, tooltip)
    marks : Sequence of (x, y)
    keys : Mapping[str, str]
        Colour class by label, for the legend.
    """
    if not bars:
        return ""
    low, high = bars[0][0], bars[-1][0]
    axes = Axes([(low - 0.6, 0.0), (high + 0.6, 0.0), *((x, h) for x, h, _, _ in bars), *marks],
                None, whole_x=True)  # fmt: skip
    half = max(0.3, 0.38 * (axes.x(1) - axes.x(0)))
    body = [axes.frame(x_label)]
    for x, height, colour, tip in bars:
        top = axes.y(height)
        body.append(
            f'<rect class="bar {colour}" x="{axes.x(x) - half:.1f}" y="{top:.1f}" '
            f'width="{2 * half:.1f}" height="{max(axes.y(0) - top, 0):.1f}">'
            f"<title>{escape(tip)}</title></rect>"
        )
    for at, y in marks:
        body.append(
            f'<path class="mark" d="M{axes.x(at) - half - 1:.1f} {axes.y(y):.1f}'
            f'h{2 * half + 2:.1f}"><title>predicted {y:.4g}</title></path>'
        )
    return _figure(title, keys, body)


def grid_chart(
    rows: Sequence[str],
    columns: Sequence[int],
    cells: Mapping[str, Sequence[tuple[int, int]]],
    keys: Mapping[str, str],
) -> str:
    """Draw a grid with one cell for each (row, column) that is filled.

    Parameters
    ----------
    rows : Sequence[str]
        Labels, top to bottom.
    columns : Sequence[int]
        Labels, left to right.
    cells : Mapping[str, Sequence[tuple of int]]
        Positions (row, column) by colour class; those of ``bad`` and ``late`` are crossed out.
    keys : Mapping[str, str]
        Colour class by label, for the legend.
    """
    if not rows or not columns:
        return ""
    wide = min(22.0, max(1.0, 880 / len(columns)))
    high = min(15.0, max(2.0, 900 / len(rows)))
    left = 12.0 + 6.2 * max(map(len, rows))
    gap = 1.0 if min(wide, high) > 4 else 0.0
    body = []
    for colour, places in cells.items():
        w, h = wide - gap, high - gap
        path = "".join(
            f"M{left + c * wide:.1f} {4 + r * high:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}z"
            for r, c in places
        )
        body.append(f'<path class="cell {colour}" d="{path}"/>')
        if colour in ("bad", "late"):
            crosses = "".join(
                f"M{left + c * wide + 1:.1f} {5 + r * high:.1f}l{w - 2:.1f} {h - 2:.1f}"
                for r, c in places
            )
            body.append(f'<path class="cross" d="{crosses}"/>')
    every = math.ceil(11 / high)
    body += [
        f'<text x="{left - 5:.1f}" y="{4 + (i + 0.5) * high:.1f}" class="end mid">{escape(row)}'
        "</text>"
        for i, row in enumerate(rows)
        if i % every == 0
    ]
    bottom = 4 + len(rows) * high
    step = max(1, math.ceil(28 / wide))
    body += [
        f'<text x="{left + (i + 0.5) * wide:.1f}" y="{bottom + 13:.1f}" class="centre">{column}'
        "</text>"
        for i, column in enumerate(columns)
        if i % step == 0
    ]
    width = max(left + len(columns) * wide + 14, 120)
    return _figure("", keys, body, width=width, height=bottom + 20, natural=True)


class Axes:
    """A linear scale from data to the picture, from 0 up, with its grid and numbers."""

    def __init__(self, points: Sequence[Point], y_top: float | None, *, whole_x: bool) -> None:
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        self.x0, self.x1 = (min(xs), max(xs)) if whole_x else (min(0.0, *xs), max(xs))
        self.x1 += self.x1 == self.x0
        self.x_ticks = ticks(self.x0, self.x1, 8, whole=whole_x)
        top = y_top if y_top is not None and y_top >= max(ys) else max(ys)
        self.y0 = min(0.0, *ys)
        self.y_ticks = ticks(self.y0, top if top > self.y0 else self.y0 + 1, 5, beyond=True)
        self.y1 = max(top, self.y_ticks[-1], self.y0 + 1e-12)

    def x(self, value: float) -> float:
        """Return the place of x in the picture."""
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the place of y in the picture."""
        part = (value - self.y0) / (self.y1 - self.y0)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_label: str) -> str:
        """Return grid lines, numbers and the label of the x axis."""
        out = []
        for value in self.y_ticks:
            y = self.y(value)
            out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y:.1f}" class="end mid">{value:.6g}</text>')
        out += [
            f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" class="centre">{value:.6g}'
            "</text>"
            for value in self.x_ticks
        ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        out.append(
            f'<text x="{middle}" y="{HEIGHT - 4}" class="centre label">{escape(x_label)}</text>'
        )
        return "".join(out)


def ticks(
    low: float, high: float, most: int, *, whole: bool = False, beyond: bool = False
) -> list[float]:
    """Return about ``most`` round numbers within the limits; ``beyond`` adds one above."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if beyond and last * step < high * (1 - 1e-9):
        last += 1
    return [i * step for i in range(first, last + 1)]


def _figure(
    title: str,
    keys: Mapping[str, str],
    body: Sequence[str],
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
    natural: bool = False,
) -> str:
    legend = "".join(
        f'<span><i class="{colour}"></i>{escape(name)}</span>' for name, colour in keys.items()
    )
    head = f"<b>{escape(title)}</b>" if title else ""
    size = f' style="max-width:{width:.0f}px"' if natural else ""
    return (
        f"<figure><figcaption>{head}<span class=legend>{legend}</span></figcaption>"
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}"{size} role="img" '
        f'aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )
