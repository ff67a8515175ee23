"""Look at how simulated clients would share the rows, without training.

    fedlora partition data.partition=shards --output shares.png

prints clients × classes and draws them. It needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora_app.config.fields import typed_value
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.config.plugins import load
from fedlora_app.launch.inspection import clients_of
from fedlora_app.report.plots import pyplot, save
from fedlora_app.tasks import make_task

PRINTED, DRAWN = 8, 11  # classes with a column, a colour of their own; the others are one
NAMED = 40  # clients whose names fit below a picture
# They stay apart for colour-blind readers: Okabe and Ito, then Tol's muted ones.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
           "#332288", "#88ccee", "#aa4499", "#999933", "#bbbbbb")  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """Who got how many rows of which class.

    Parameters
    ----------
    counts : ndarray of int64, shape (clients, classes)
    classes : sequence of str
        Names of the classes; one, ``rows``, where rows have none.
    clients : sequence of str
        Names of the clients: their numbers, or the values of ``data.partition-column``.
    title : str
        Which partition of which data.
    """

    counts: NDArray[np.int64]
    classes: Sequence[str]
    clients: Sequence[str]
    title: str

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each client."""
        found: NDArray[np.int64] = self.counts.sum(1)
        return found

    @property
    def mixes(self) -> NDArray[np.float64]:
        """Share of each class in each client's rows."""
        return self.counts / self.sizes[:, None]

    def gini_simpson(self) -> NDArray[np.float64]:
        """Return the chance that two of a client's rows differ in class: 0 with one class."""
        found: NDArray[np.float64] = 1 - (self.mixes**2).sum(1)
        return found

    def entropy(self) -> NDArray[np.float64]:
        """Return the entropy of each client's classes in bits: 0 with one class."""
        p = np.where(self.counts > 0, self.mixes, 1.0)
        found: NDArray[np.float64] = np.abs((p * np.log2(p)).sum(1))
        return found

    def distance(self) -> NDArray[np.float64]:
        """Return how far each client's mix is from that of all rows (total variation, 0 to 1)."""
        overall = self.counts.sum(0) / self.counts.sum()
        found: NDArray[np.float64] = np.abs(self.mixes - overall).sum(1) / 2
        return found

    def inequality(self) -> float:
        """Return the Gini coefficient of the sizes: 0 if all are equal, near 1 if one has all."""
        ordered = np.sort(self.sizes)
        ranks = 2 * np.arange(1, len(ordered) + 1) - len(ordered) - 1
        return float((ranks * ordered).sum() / (len(ordered) * ordered.sum()))

    def fewer(self, most: int) -> Shared:
        """Return the same with the most frequent classes alone, the rest as one."""
        if len(self.classes) <= most + 1:
            return self
        order = np.argsort(-self.counts.sum(0), kind="stable")
        kept, rest = np.sort(order[:most]), order[most:]
        counts = np.column_stack([self.counts[:, kept], self.counts[:, rest].sum(1)])
        names = [*(self.classes[i] for i in kept), f"{len(rest)} others"]
        return Shared(counts, names, self.clients, self.title)

    def __str__(self) -> str:
        shown, classed = self.fewer(PRINTED), len(self.classes) > 1
        head = ["client", "rows", *(shown.classes if classed else ())]
        head += ["Gini-Simpson", "entropy", "distance"] if classed else []
        lines = [head]
        columns = zip(self.gini_simpson(), self.entropy(), self.distance(), strict=True)
        for client, size, counts, measures in zip(
            self.clients, self.sizes, shown.counts, columns, strict=True
        ):
            cells = [client, str(size)]
            if classed:
                cells += [str(count or "·") for count in counts]
                cells += [f"{measure:.2f}" for measure in measures]
            lines.append(cells)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, "", *table, "", *self.summary()])

    def summary(self) -> list[str]:
        """Return lines about all clients together."""
        sizes = self.sizes
        lines = [
            f"sizes: {sizes.min()} to {sizes.max()}, median {np.median(sizes):g}; how unequal "
            f"(Gini, 0 to 1): {self.inequality():.2f}"
        ]
        if len(self.classes) > 1:
            held = (self.counts > 0).sum(1)
            lines.append(
                f"classes: {held.min()} to {held.max()} of {len(self.classes)} a client; mean "
                f"distance from the mix of all rows (0 to 1): {self.distance().mean():.2f}"
            )
        return lines


def look(config: RunConfig, clients: int | None = None) -> Shared:
    """Share out the training rows as a run with this config and so many clients does.

    Parameters
    ----------
    config : RunConfig
    clients : int, optional
        As ``run_simulation.py --clients`` (default: as there).

    Raises
    ------
    ValueError or FileNotFoundError
        If there are no such data, or they cannot be shared so.
    """
    from fedlora_app.data.partition import shares  # takes over a second
    from fedlora_app.data.partitioners import group_names

    task = make_task(config)
    rows = task.train_rows()
    parts = shares(task, rows, clients_of(task) if clients is None else clients)
    strata, names = task.strata(rows), list(task.strata_names(rows.about))
    if strata is None:
        strata, names = np.zeros(len(rows), np.int64), ["rows"]
    counts = np.array([np.bincount(strata[part], minlength=len(names)) for part in parts])
    who = [str(client) for client in range(len(parts))]
    if config.data.partition == "natural" and rows.groups is not None:
        who = group_names(rows.groups)
    title = f"{config.data.name}, {config.data.partition}, {len(parts)} clients, seed {config.seed}"
    return Shared(counts, names, who, title)


def draw(shared: Shared, file: Path) -> None:
    """Draw the rows of each client by class, and below them each client's mix, as PNG."""
    few, count = shared.fewer(DRAWN), len(shared.clients)
    plt = pyplot()
    classed = len(shared.classes) > 1
    figure, axes = plt.subplots(
        1 + classed, 1, figsize=(min(7 + count / 14, 16), 6 if classed else 3.4), sharex=True,
        squeeze=False,
    )  # fmt: skip
    x = np.arange(count)
    for i, (ax, values) in enumerate(zip(axes[:, 0], (few.counts, few.mixes), strict=False)):
        below = np.zeros(count)
        for name, heights, colour in zip(few.classes, values.T, COLOURS, strict=False):
            ax.bar(x, heights, 0.85, bottom=below, label=name, color=colour)
            below = below + heights
        ax.set_ylabel("share of its rows" if i else "training rows")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.01)
    axes[0, 0].set_title(shared.title, loc="left", fontsize=10)
    last = axes[-1, 0]
    last.set_xlabel("client")
    if count <= NAMED:
        short = [name if len(name) <= 16 else f"{name[:15]}…" for name in shared.clients]
        last.set_xticks(x, short, rotation=0 if max(map(len, short)) < 4 else 90, fontsize=8)
    if classed:
        axes[0, 0].legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, reverse=True
        )
    save(figure, file)


def show(
    pairs: Iterable[tuple[str, str]], clients: int | None = None, output: Path | None = None
) -> int:
    """Print who gets what with these keys of the run config, and return the exit code.

    ``output`` : a PNG to draw (default: none is drawn).
    """
    kinds = RunConfig().to_flat()
    try:
        config = RunConfig.from_flat({k: typed_value(v, kinds.get(k)) for k, v in pairs})
        if problems := load(config.plugins):
            raise ConfigError(problems)
        shared = look(config, clients)
        print(shared)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            draw(shared, output)
            print(f"drawn in {output}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    from fedlora_app.cli.main import run_as

    return run_as("partition", argv, "python -m fedlora_app.partition_report")


if __name__ == "__main__":
    sys.exit(main())
