"""The plots that a run leaves in its folder, as PNG files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedlora_app.report.records import Fields
from fedlora_app.report.scores import Picture, pictures
from fedlora_app.tasks import Score
from strategies.records import RoundRecord

TOP = 5  # bottlenecks with a colour of their own


def plot_run(rounds: Sequence[RoundRecord], folder: Path, scores: Sequence[Score]) -> list[str]:
    """Draw what there is to draw of a run; return the names of the PNG files.

    Scores, loss and bytes over rounds; with a clock, scores and loss over its seconds and the
    seconds of each round with the planner's prediction and the bottlenecks.
    """
    fields, names = with_megabytes(rounds), []
    for picture in pictures(scores, ("clock_total", "seconds by the clock of the run")):
        found = curves_of(picture, fields)
        if picture.x == "round" or any(len(xy) > 1 for xy in found.values()):
            names.append(picture.file)
            _curves(folder / picture.file, picture, found)
    if any(r.get("clock_seconds") for r in rounds):
        _round_seconds(folder / "round-seconds.png", rounds)
        names.append("round-seconds.png")
    return names


def points(rounds: Iterable[Fields], x: str, y: str) -> list[tuple[float, float]]:
    """Return the pairs of two fields in the rounds that have both."""
    pairs = ((r.get(x), r.get(y)) for r in rounds)
    return [(a, b) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]


def curves_of(picture: Picture, rounds: Sequence[Fields]) -> dict[str, list[tuple[float, float]]]:
    """Return the points of a picture's curves by their label."""
    series = picture.curves.series.items()
    return {label: points(rounds, picture.x, key) for key, label in series}


def with_megabytes(rounds: Sequence[RoundRecord]) -> list[Fields]:
    """Return the records of rounds with the MB moved until the end of each."""
    totals = zip(rounds, megabytes(rounds), strict=True)
    return [{**r, "megabytes": total} for r, total in totals]


def megabytes(rounds: Iterable[RoundRecord]) -> list[float]:
    """Return the MB moved until the end of each round, down and up."""
    return list(accumulate((r["bytes_down"] + r["bytes_up"]) / 1e6 for r in rounds))


def bottlenecks(rounds: Iterable[RoundRecord]) -> Counter[int | None]:
    """Return how many rounds each client was the bottleneck of."""
    return Counter(r["bottleneck"] for r in rounds if r.get("bottleneck") is not None)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which takes a while to import and must not want a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def from_zero(axes: Any, top: float | None) -> None:
    """Let the y axis begin at 0, or lower where a value is, and end at ``top``."""
    if all(min(line.get_ydata(), default=0.0) >= 0 for line in axes.lines):
        axes.set_ylim(bottom=0)
    if top is not None:
        axes.set_ylim(top=top)


def _curves(file: Path, picture: Picture, curves: dict[str, list[tuple[float, float]]]) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for label, xy in curves.items():
        if xy:
            axes.plot(*zip(*xy, strict=True), marker="o", markersize=3, label=label)
    axes.set_xlabel(picture.x_label)
    if picture.x == "round":
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xlim(left=0)
    from_zero(axes, picture.curves.top)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save(figure, file)


def _round_seconds(file: Path, rounds: Sequence[RoundRecord]) -> None:
    """Draw each round's seconds in the colour of its bottleneck, and how often each was one."""
    plt = pyplot()
    counts = bottlenecks(rounds)
    colours = {c: f"C{i}" for i, (c, _) in enumerate(counts.most_common(TOP))}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 4), width_ratios=[3, 1] if counts else [1, 0.001]
    )
    timed = [r for r in rounds if r.get("clock_seconds") is not None and r["round"] > 0]
    left.bar(
        [r["round"] for r in timed],
        [r["clock_seconds"] for r in timed],
        color=[colours.get(r.get("bottleneck"), "0.7") for r in timed],
    )
    if planned := points(timed, "round", "planned_seconds"):
        left.plot(*zip(*planned, strict=True), "k_", markersize=9, label="predicted by the planner")
        left.legend()
    left.set_xlabel("round")
    left.set_ylabel("seconds")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3, axis="y")
    shown = counts.most_common(15)[::-1]
    right.barh(
        [f"client {c}" for c, _ in shown],
        [n for _, n in shown],
        color=[colours.get(c, "0.7") for c, _ in shown],
    )
    right.set_xlabel("rounds as bottleneck")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_visible(bool(counts))
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a figure as PNG and forget it."""
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot().close(figure)
