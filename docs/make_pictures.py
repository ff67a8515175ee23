"""Draw the pictures of the documentation: ``python docs/make_pictures.py``."""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from strategies.clients import Client
from strategies.profiling import METRICS
from strategies.ranks import AutoRank, RankPolicy, StaircaseRank, UniformRank

# summaries of runs by setting and rule, and by learning rate: one a seed
Scores = defaultdict[tuple[str, str], defaultdict[float, list[dict[str, Any]]]]

PICTURES = Path(__file__).parent / "pictures"

INK, SOFT, LINE, GROUND = "#1f2933", "#5f6c7b", "#cbd2d9", "#f7f8fa"
# Colours that stay apart for colour-blind readers, from Okabe and Ito; fill, edge.
MARKS = {
    "slice": ("#dcebf7", "#0072b2"),
    "SVD": ("#d9f0e8", "#009e73"),
    "merge": ("#fbe4d5", "#d55e00"),
    "sketch": ("#f6e3ee", "#b5578f"),
}
MEANINGS = {
    "slice": "leading r entries",
    "SVD": "best approximation of rank r",
    "merge": "slice, and a delta for the frozen weights",
    "sketch": "random r entries, rescaled",
}

# name, what sets it apart, how it is downloaded, centre
TOP, NEXT, LOW = 4.5, 3.5, 2.33
RULES = [
    ("fedit", "equal ranks only", "slice", (0.75, TOP)),
    ("zero-padding", "missing entries are zeros", "slice", (2.2, TOP)),
    ("hetlora", "weights: norm of s·BA", "slice", (3.65, TOP)),
    ("ffa", "A fixed, B averaged: exact", "slice", (0.75, NEXT)),
    ("rolora", "A, B fixed in turn: exact", "slice", (2.2, NEXT)),
    ("fslora", "mean of the changes", "sketch", (3.65, NEXT)),
    ("fedex", "mean factors + residual", "merge", (5.2, (TOP + NEXT) / 2)),
    ("flexlora", "mean, cut to the rank", "SVD", (6.75, TOP)),
    ("florist", "rank chosen by energy", "SVD", (8.2, TOP)),
    ("flora", "exact; clients start afresh", "merge", (7.475, NEXT)),
    ("rbla", "mean of the holders", "slice", (0.75, LOW)),
    ("replication", "others copy the holders", "slice", (2.2, LOW)),
    ("fedsa", "A only; B stays at home", "slice", (3.65, LOW)),
    ("rb-lora", "by rank-one term", "SVD", (6.75, LOW)),
    ("raflora", "by rank partition", "SVD", (8.2, LOW)),
]
WIDTH, HEIGHT = 1.34, 0.74
# What is drawn: study, setting, title and score; and a colour and a mark for each rule.
RATES = [
    ("rates", "dirichlet-01", "R8, Dirichlet 0.1", "accuracy"),
    ("rates", "r52-dirichlet-01", "R52, Dirichlet 0.1", "accuracy"),
    ("rates", "images-dirichlet-01", "digits, Dirichlet 0.1", "accuracy"),
    ("language_rates", "four", "language model, four clients", "perplexity"),
    ("rates", "dirichlet-05", "R8, Dirichlet 0.5", "accuracy"),
    ("rates", "r52-dirichlet-05", "R52, Dirichlet 0.5", "accuracy"),
    ("rates", "images-dirichlet-05", "digits, Dirichlet 0.5", "accuracy"),
    ("language_rates", "ten", "language model, ten clients", "perplexity"),
]
RULE_COLOURS = {
    "support": ("#0072b2", "o"),
    "zero-padding": ("#009e73", "s"),
    "flexlora": ("#b5578f", "^"),
    "replication": ("#d55e00", "D"),
}
FEW = 3  # holders of an entry below this are drawn as a warning
# left edge and width of the columns, lower edge and height of the rows
COLUMNS = [(-0.05, 5.2), (5.25, 3.75)]
ROWS = [(2.98, 2.04), (1.5, 1.34)]


def rules_picture(path: Path) -> None:
    """Draw how the rules relate: what is combined, and by whose weight it is divided."""
    figure, axes = plt.subplots(figsize=(11, 5.9), dpi=160)
    axes.set_xlim(-0.75, 9.1)
    axes.set_ylim(0.4, 5.75)
    axes.axis("off")
    for x, width in COLUMNS:
        for y, height in ROWS:
            _rounded(axes, x, y, width, height, GROUND, LINE)
    _heading(axes, 2.55, 5.43, "factor-wise", "A and B are averaged themselves")
    _heading(axes, 7.12, 5.43, "product", "the updates s·BA are averaged")
    _heading(axes, -0.43, 4.0, "over all", "divided by the\nweight of all", turned=True)
    _heading(axes, -0.43, 2.17, "over holders", "divided by the\nweight of holders", turned=True)
    for name, note, mark, (x, y) in RULES:
        _box(axes, x, y, name, note, mark)
    for x, note in ((1.475, "equal under data weights"), (7.475, "equal as read here")):
        axes.plot(
            [x - 0.72, x - 0.72, x + 0.72, x + 0.72], [1.9, 1.82, 1.82, 1.9],
            color=SOFT, linewidth=0.9,
        )  # fmt: skip
        axes.text(x, 1.68, note, ha="center", va="center", fontsize=8, color=SOFT)
    _legend(axes)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _rounded(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str
) -> None:
    style = f"round,pad=0,rounding_size={min(0.1, height / 4)}"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge)
    )


def _heading(
    axes: Axes, x: float, y: float, title: str, note: str, *, turned: bool = False
) -> None:
    rotation = 90 if turned else 0
    dx, dy = (0.13, 0.0) if turned else (0.0, -0.2)
    style = {"ha": "center", "va": "center", "rotation": rotation}
    axes.text(x - dx, y, title, fontsize=13, weight="bold", color=INK, **style)
    axes.text(x + dx, y + dy, note, fontsize=8.5, color=SOFT, linespacing=1.15, **style)


def _box(axes: Axes, x: float, y: float, name: str, note: str, mark: str) -> None:
    _rounded(axes, x - WIDTH / 2, y - HEIGHT / 2, WIDTH, HEIGHT, *MARKS[mark])
    axes.text(x, y + 0.12, name, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    axes.text(x, y - 0.17, note, ha="center", va="center", fontsize=7.4, color=INK)


def _legend(axes: Axes) -> None:
    axes.text(-0.05, 1.17, "What a client of rank r downloads", fontsize=9.5, weight="bold",
              color=INK, va="center")  # fmt: skip
    for x, mark in zip((-0.05, 1.85, 4.2, 7.0), MARKS, strict=True):
        _rounded(axes, x, 0.59, 0.24, 0.24, *MARKS[mark])
        axes.text(x + 0.34, 0.8, mark, fontsize=9, weight="bold", color=INK, va="center")
        axes.text(x + 0.34, 0.6, MEANINGS[mark], fontsize=8, color=SOFT, va="center")


# Ten clients of studies/ranks.toml, images-dirichlet, seed 1: rows, and AutoRank's three numbers.
CLIENTS = [
    (106, 4.638, 1.296, 0.643), (364, 5.882, 1.001, 0.566), (368, 5.885, 1.256, 0.581),
    (310, 5.716, 1.129, 0.537), (152, 5.004, 1.313, 0.691), (128, 4.836, 1.801, 0.796),
    (459, 6.108, 1.992, 0.852), (389, 5.944, 1.713, 0.800), (142, 4.938, 1.375, 0.656),
    (283, 5.619, 1.657, 0.761),
]  # fmt: skip


def ranks_picture(path: Path) -> None:
    """Draw the ranks that policies give the same ten clients, and how many hold each entry."""
    four = (*METRICS, "volume")
    policies: dict[str, RankPolicy] = {
        "uniform": UniformRank(8),
        "staircase": StaircaseRank([2, 4, 6, 10, 18]),
        "autorank, published": AutoRank(2, 32, budget=8),
        "autorank, with volume": AutoRank(2, 32, budget=8, criteria=four),
        "with volume, holders 0.3": AutoRank(2, 32, budget=8, criteria=four, holders=0.3),
    }
    clients = [Client(i, i, None, row[0]) for i, row in enumerate(CLIENTS)]
    order = sorted(clients, key=lambda client: client.num_examples or 0)
    figure, rows = plt.subplots(
        2, len(policies), figsize=(12, 4.6), dpi=130, sharey="row", layout="constrained"
    )
    for column, (name, policy) in enumerate(policies.items()):
        for client, row in zip(clients, CLIENTS, strict=True):
            policy.learn(client, dict(zip(METRICS, row[1:], strict=True)), 0)
        ranks = policy.choose(order, 1)
        top, bottom = rows[0][column], rows[1][column]
        top.bar(range(len(order)), ranks, color=MARKS["slice"][1])
        top.set_title(name, fontsize=10, color=INK)
        top.set_xticks(
            range(len(order)), [str(c.num_examples) for c in order], rotation=90, fontsize=7
        )
        top.set_xlabel("client, by its rows", fontsize=8)
        entries = range(1, max(ranks) + 1)
        held = [sum(rank >= entry for rank in ranks) for entry in entries]
        colours = [MARKS["merge" if n < FEW else "SVD"][1] for n in held]
        bottom.bar(entries, held, color=colours, width=1.0)
        bottom.axhline(FEW, color=SOFT, linewidth=0.8, linestyle=":")
        bottom.set_xlim(0, 19)
        bottom.set_xlabel("entry of the rank axis", fontsize=8)
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel("rank")
    rows[1][0].set_ylabel("clients that hold it")
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def scores_by_rate(archive: Path) -> Scores:
    """Read the packed records of a study whose arms are RULE-RATE."""
    found: Scores = defaultdict(lambda: defaultdict(list))
    with tarfile.open(archive) as packed:
        for member in packed:
            if not member.name.endswith("/summary.json"):
                continue
            _, setting, arm, *_ = Path(member.name).parts
            rule, _, rate = arm.rpartition("-")
            if (file := packed.extractfile(member)) is not None:
                found[setting, rule][float(rate)].append(json.load(file))
    return found


def rates_picture(path: Path, records: Path) -> None:
    """Draw what rules reach at each learning rate; of a perplexity the lower is drawn higher."""
    studies = {name: scores_by_rate(records / f"{name}.tar.xz") for name, *_ in RATES}
    figure, grid = plt.subplots(2, 4, figsize=(12, 6), dpi=130, layout="constrained")
    for axes, (study, setting, title, score) in zip(grid.flat, RATES, strict=True):
        for rule, (colour, shape) in RULE_COLOURS.items():
            curve = sorted(studies[study][setting, rule].items())
            values = [[summary[score] for summary in summaries] for _, summaries in curve]
            rates = [rate for rate, _ in curve]
            means = [sum(of) / len(of) for of in values]
            axes.plot(rates, means, color=colour, marker=shape, label=rule)
            for rate, of in zip(rates, values, strict=True):
                axes.plot([rate] * len(of), of, ".", color=colour, alpha=0.35, markersize=5)
        axes.set_xscale("log")
        axes.set_xticks([0.001, 0.003, 0.009], ["0.001", "0.003", "0.009"])
        axes.minorticks_off()
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_ylabel(score, fontsize=9)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if score == "perplexity":
            axes.invert_yaxis()
    figure.supxlabel("learning rate", fontsize=9)
    grid[1][0].legend(frameon=False, fontsize=9)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    rules_picture(PICTURES / "rules.png")
    ranks_picture(PICTURES / "ranks-policies.png")
    rates_picture(PICTURES / "rates.png", PICTURES.parents[1] / "studies/records")
