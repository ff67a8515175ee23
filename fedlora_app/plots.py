"""The plots that a run leaves in its folder, as PNG files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedlora_app.records import Record

TOP = 5  # bottlenecks with a colour of their own
ACCURACY = {
    "server_accuracy": "accuracy, server's test set",
    "server_macro_f1": "macro-F1, server's test set",
    "clients_accuracy": "accuracy, clients' own rows (mean)",
    "clients_accuracy_worst": "accuracy, clients' own rows (worst)",
}
LOSS = {
    "train_loss": "training loss, clients",
    "server_loss": "loss, server's test set",
    "clients_loss": "loss, clients' own rows (mean)",
}


def plot_run(rounds: Sequence[Record], folder: Path) -> list[str]:
    """Draw what there is to draw of a run; return the names of the PNG files.

    Accuracy, loss and bytes over rounds; with a clock, accuracy over its seconds and the
    seconds of each round with the planner's prediction and the bottlenecks.
    """
    rounds = [{**r, "megabytes": total} for r, total in zip(rounds, megabytes(rounds), strict=True)]
    names = []
    for name, x, curves in (
        ("accuracy", "round", ACCURACY),
        ("loss", "round", LOSS),
        ("bytes", "round", {"megabytes": "MB moved since the start, both ways"}),
        ("accuracy-over-time", "clock_total", ACCURACY),
    ):
        found = {label: points(rounds, x, key) for key, label in curves.items()}
        if x == "round" or any(len(xy) > 1 for xy in found.values()):
            _curves(folder / f"{name}.png", x, found)
            names.append(f"{name}.png")
    if any(r.get("clock_seconds") for r in rounds):
        _round_seconds(folder / "round-seconds.png", rounds)
        names.append("round-seconds.png")
    return names


def points(rounds: Iterable[Record], x: str, y: str) -> list[tuple[float, float]]:
    """Return the pairs of two fields in the rounds that have both."""
    pairs = ((r.get(x), r.get(y)) for r in rounds)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def megabytes(rounds: Iterable[Record]) -> list[float]:
    """Return the MB moved until the end of each round, down and up."""
    return list(accumulate((r["bytes_down"] + r["bytes_up"]) / 1e6 for r in rounds))


def bottlenecks(rounds: Iterable[Record]) -> Counter[int | None]:
    """Return how many rounds each client was the bottleneck of."""
    return Counter(r["bottleneck"] for r in rounds if r.get("bottleneck") is not None)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which takes a while to import and must not want a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _curves(file: Path, x: str, curves: dict[str, list[tuple[float, float]]]) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for label, xy in curves.items():
        if xy:
            axes.plot(*zip(*xy, strict=True), marker="o", markersize=3, label=label)
    if x == "round":
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xlabel("seconds by the clock of the run")
        axes.set_xlim(left=0)
    if file.stem.startswith("accuracy"):
        axes.set_ylim(0, 1)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save(figure, file)


def _round_seconds(file: Path, rounds: Sequence[Record]) -> None:
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
