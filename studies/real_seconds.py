"""What runs on a testbed took in real seconds, beside what was expected and simulated.

    python -m studies.real_seconds FOLDER [TARGET]    # a table, and FOLDER/real-seconds.png

FOLDER has the runs, named PROFILE-ARM-SEED, with what ``deploy/testbed.py run`` leaves there;
those of this project: studies/records/real-network.tar.xz. TARGET: an accuracy (0.45).
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import matplotlib.pyplot as plt

from fedlora_app.report.records import of_kind, read_records

Row = dict[str, float | None]


class Run(NamedTuple):
    profile: str
    arm: str
    seed: int
    rows: list[Row]
    accuracy: dict[int, float]

    def until(self, target: float) -> list[Row]:
        """Return the rounds to a target; all if it was not reached."""
        for count, row in enumerate(self.rows, 1):
            if self.accuracy.get(int(row["round"] or 0), 0.0) >= target:
                return self.rows[:count]
        return self.rows


def read(folder: Path) -> Run:
    profile, arm, seed = folder.name.split("-")
    with (folder / "testbed.csv").open(encoding="utf-8") as file:
        table = csv.DictReader(file)
        rows = [{k: float(v) if v else None for k, v in row.items()} for row in table]
    rounds = of_kind(read_records(folder / "metrics.jsonl"), "round")
    whole = {r["round"]: r["train_seconds"] for r in rounds}
    found = {r["round"]: r["server_accuracy"] for r in rounds if "server_accuracy" in r}
    fixed = median(row["fixed"] for row in rows if row["fixed"] is not None)
    for row in rows:
        row["seconds"] = whole[row["round"]]  # with sending, which once was not in the table
        row["with_fixed"] = None if row["by_links"] is None else row["by_links"] + fixed
    return Run(profile, arm, int(seed), rows, found)


def total(rows: list[Row], name: str) -> float:
    return sum(row[name] or 0.0 for row in rows)


HEAD = (
    "links", "arm", "seeds", "rounds", "real seconds", "of uniform's", "real / expected",
    "within 20 %", "real / simulated", "with what is fixed", "cores busy",
)  # fmt: skip


def table(runs: list[Run], target: float) -> None:
    """Print a line for each arm: its rounds to the target, one number a seed."""
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.profile, run.arm].append(run)
    uniform = {(run.profile, run.seed): total(run.until(target), "seconds")
               for run in runs if run.arm == "uniform"}  # fmt: skip
    for (profile, arm), those in groups.items():
        parts = [run.until(target) for run in those]
        every = [row for rows in parts for row in rows]
        said = [row for row in every if row["expected"]]
        near = [abs(row["seconds"] / row["expected"] - 1) <= 0.2 for row in said]
        seconds = {run.seed: total(rows, "seconds") for run, rows in zip(those, parts, strict=True)}
        of = [f"{seconds[s] / uniform[profile, s]:.2f}" for s in seconds if (profile, s) in uniform]
        expected = total(said, "seconds") / total(said, "expected") if said else float("nan")
        simulated, with_fixed = (
            total(every, "seconds") / total(every, name) for name in ("by_links", "with_fixed")
        )
        busy = mean(row["busy"] for row in every if row["busy"] is not None)
        cells = [profile, arm, ", ".join(map(str, seconds)), ", ".join(str(len(p)) for p in parts)]
        cells += [", ".join(f"{s:.0f}" for s in seconds.values()), ", ".join(of)]
        cells += [f"{expected:.2f}", f"{sum(near)} of {len(near)}", f"{simulated:.2f}"]
        cells += [f"{with_fixed:.2f}"]
        print(f"| {' | '.join([*cells, f'{busy:.0%}'])} |")


def picture(runs: list[Run], path: Path) -> None:
    """Draw every round: real seconds over those expected before it, and over simulated ones."""
    sides = {
        "expected": "expected before the round",
        "by_links": "simulated, links and computing",
        "with_fixed": "simulated, and what is fixed",
    }
    figure, axes = plt.subplots(1, len(sides), figsize=(13, 4.4), sharey=True, layout="constrained")
    highest = max(row["seconds"] for run in runs for row in run.rows) * 1.05
    for axis, (name, title) in zip(axes, sides.items(), strict=True):
        for number, arm in enumerate(dict.fromkeys(run.arm for run in runs)):
            rows = [row for run in runs if run.arm == arm for row in run.rows if row[name]]
            xs, ys = ([row[part] for row in rows] for part in (name, "seconds"))
            axis.scatter(xs, ys, s=16, color=f"C{number}", alpha=0.7, label=arm, linewidths=0)
        ends = [0, highest]
        axis.plot(ends, ends, color="0.3", linewidth=1)
        axis.fill_between(ends, [0, 0.8 * highest], [0, 1.2 * highest], color="0.92", zorder=0)
        axis.set(xlim=ends, ylim=ends, xlabel=f"seconds: {title}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("real seconds of a round")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, facecolor="white")


def main() -> None:
    folder = Path(sys.argv[1])
    target = float(sys.argv[2]) if len(sys.argv) > 2 else 0.45
    runs = [read(file.parent) for file in sorted(folder.glob("*/testbed.csv"))]
    table(runs, target)
    rows = [row for run in runs for row in run.rows if row["by_links"]]
    for name, text in (("by_links", "simulated"), ("with_fixed", "that and what is fixed")):
        print(f"\nreal minus {text}, all {len(rows)} rounds: median "
              f"{median(row['seconds'] - row[name] for row in rows):.1f} s")  # fmt: skip
    picture(runs, folder / "real-seconds.png")


if __name__ == "__main__":
    main()
