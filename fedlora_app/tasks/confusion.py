"""What a classifier takes for what, and how far its probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15  # as in Guo et al., ICML 2017 (arXiv 1706.04599), section 4
WRITTEN = 20  # classes of which the picture has room for numbers
Counts = NDArray[np.int64]
Chances = NDArray[np.float64]


def matrix(labels: Counts, given: Counts, classes: int) -> Counts:
    """Return how many rows of each class (first axis) were taken for which (second)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, given), 1)
    return counts


def by_class(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return, class by class, its rows, precision, recall, F1, and what it is mostly taken for.

    None stands where nothing can be said: precision of a class that was never given, recall of one
    that does not occur.
    """
    found = []
    for i, name in enumerate(names):
        hits, true, given = int(counts[i, i]), int(counts[i].sum()), int(counts[:, i].sum())
        wrong = counts[i].copy()
        wrong[i] = 0
        other = int(wrong.argmax())
        found.append(
            {
                "class": name,
                "rows": true,
                "given": given,
                "precision": hits / given if given else None,
                "recall": hits / true if true else None,
                "f1": 2 * hits / (true + given) if true + given else None,
                "mostly taken for": f"{names[other]} ({wrong[other]})" if wrong.any() else "",
            }
        )
    return found


def reliability(labels: Counts, chances: Chances) -> list[dict[str, Any]]:
    """Return, by equal parts of the range of probabilities, how often the likeliest label is right.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,)
    chances : ndarray of float64, shape (n, labels)

    Returns
    -------
    list of dict
        ``from``, ``to`` (the upper end belongs to the part), ``rows``, ``confidence`` (mean
        probability of the likeliest label) and ``right`` (share); parts without rows are left out.
    """
    top, right = chances.max(1), chances.argmax(1) == labels
    part = np.clip(np.ceil(top * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for i in range(BINS):
        held = part == i
        if held.any():
            found.append(
                {
                    "from": i / BINS,
                    "to": (i + 1) / BINS,
                    "rows": int(held.sum()),
                    "confidence": float(top[held].mean()),
                    "right": float(right[held].mean()),
                }
            )
    return found


def calibration_error(bins: Sequence[Mapping[str, Any]]) -> float:
    """Return the expected calibration error: the mean over rows of |confidence − right| by part."""
    rows = sum(part["rows"] for part in bins)
    return float(sum(p["rows"] * abs(p["confidence"] - p["right"]) for p in bins) / rows)


def brier(labels: Counts, chances: Chances) -> float:
    """Return the mean squared distance from the truth, over all labels: 0 is best, 2 worst."""
    wanted = np.eye(chances.shape[1])[labels]
    return float(((chances - wanted) ** 2).sum(1).mean())


def draw_matrix(counts: Counts, names: Sequence[str], file: Path) -> None:
    """Draw the matrix as a PNG: each row of it in shares of its class."""
    from fedlora_app.report.plots import pyplot

    plt = pyplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(4 + 0.35 * len(names), 20)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    for (i, j), count in np.ndenumerate(counts) if len(names) <= WRITTEN else ():
        if count:
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_reliability(bins: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw how often the likeliest label is right by how likely it is said to be, as a PNG."""
    from fedlora_app.report.plots import pyplot

    plt = pyplot()
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(5, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    middle = [(part["from"] + part["to"]) / 2 for part in bins]
    top.bar(middle, [part["right"] for part in bins], 0.9 / BINS, label="right")
    top.plot([0, 1], [0, 1], "k--", lw=1, label="as said")
    top.plot([p["confidence"] for p in bins], [p["right"] for p in bins], "o", color="C1", ms=3)
    top.set(ylabel="share that is right", ylim=(0, 1), xlim=(0, 1))
    top.set_title(f"expected calibration error {calibration_error(bins):.3f}")
    top.legend(loc="upper left")
    below.bar(middle, [part["rows"] for part in bins], 0.9 / BINS, color="grey")
    below.set(ylabel="rows", xlabel="probability of the likeliest label")
    figure.savefig(file, dpi=120)
    plt.close(figure)
