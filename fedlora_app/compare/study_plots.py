"""The plots of a study: arms against each other, predictions against what came, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora_app.config.keys import RunConfig
from fedlora_app.report.plots import from_zero, points, pyplot, save
from fedlora_app.report.records import of_kind, plan_periods, read_json, read_records
from fedlora_app.report.scores import file_name
from fedlora_app.tasks import Score, make_task

if TYPE_CHECKING:
    from fedlora_app.compare.study import Study

Points = Sequence[tuple[float, float]]
Finals = dict[str, dict[str, dict[int, float]]]  # by setting, arm and seed
Array = NDArray[np.float64]

WIDE = 8.0  # the slowest arm takes so many times as long as the quickest: a logarithmic axis


def plot_study(study: Study, folder: Path) -> list[Path]:
    """Draw the first score over the clock's seconds, and predicted against realised round seconds.

    Returns
    -------
    list of Path
        One PNG a setting and kind, where there are data for it.
    """
    files = []
    for setting in study.settings:
        score: Score | None = None
        curves: dict[str, list[Points]] = {}
        periods: dict[str, list[tuple[float, float, float]]] = {}
        for run in study.runs(folder):
            if run.setting != setting or not run.done:
                continue
            score = score or run.score
            if run.score != score:  # runs of another task share no axis with the first
                continue
            curve = points(of_kind(run.records, "round"), "clock_total", f"server_{score.name}")
            if any(seconds > 0 for seconds, _ in curve):
                curves.setdefault(run.arm, []).append(curve)
            for plan, real in plan_periods(run.records):
                error = float(np.std(real) / np.sqrt(len(real)))
                if promised := plan["round_seconds"]:
                    periods.setdefault(run.arm, []).append((promised, float(np.mean(real)), error))
        if curves and score:
            files.append(folder / f"{file_name(score)}-over-time-{setting}.png")
            _over_time(files[-1], setting, score, study.target[setting], curves)
        if periods:
            files.append(folder / f"predicted-{setting}.png")
            _predicted(files[-1], setting, periods)
    return files


def plot_arms(study: Study, folder: Path) -> list[Path]:
    """Draw the final score of every arm in every setting: who is ahead of the baseline, and where.

    Returns
    -------
    list of Path
        One PNG for each score that runs are compared by, none where there are no runs.
    """
    found: dict[Score, Finals] = {}
    for run in study.runs(folder):
        if run.done and (final := run.final) is not None:
            panels = found.setdefault(run.score, {})
            panels.setdefault(run.setting, {}).setdefault(run.arm, {})[run.seed] = final
    files = []
    for score, panels in found.items():
        files.append(folder / f"{file_name(score)}-of-arms.png")
        _arms(files[-1], study, score, panels)
    return files


def _arms(file: Path, study: Study, score: Score, panels: Finals) -> None:
    """Draw one panel a setting, one line an arm, best in the mean at the top, one dot a seed."""
    sign = 1 if score.higher_is_better else -1
    arms = sorted(
        {arm for seeds in panels.values() for arm in seeds},
        key=lambda arm: (_ahead(panels, arm, study.baseline, sign), arm == study.baseline),
    )
    plt = pyplot()
    figure, row = plt.subplots(
        1, len(panels), figsize=(2.2 + 2.8 * len(panels), 1.4 + 0.3 * len(arms)),
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, (setting, seeds) in zip(row[0], panels.items(), strict=True):
        base = seeds.get(study.baseline, {})
        if base:
            axes.axvline(np.mean(list(base.values())), color="0.6", linewidth=1)
        for y, arm in enumerate(arms):
            own = seeds.get(arm, {})
            if not own:
                continue
            ahead = _differences(seeds, arm, study.baseline, sign)
            colour = "0.2" if arm == study.baseline else _colour(ahead)
            values = list(own.values())
            axes.plot(values, [y] * len(values), "o", color=colour, markersize=4, alpha=0.45,
                      markeredgewidth=0)  # fmt: skip
            axes.plot(np.mean(values), y, "|", color=colour, markersize=13, markeredgewidth=3)
        axes.set_title(setting, fontsize=10)
        axes.set_xlabel(score.label)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # The same span in every panel: what is a hair in one must not look like a mile in another.
    ends = [axes.get_xlim() for axes in row[0]]
    span = max(right - left for left, right in ends)
    for axes, (left, right) in zip(row[0], ends, strict=True):
        end = (left + right + span) / 2
        if score.top is not None and score.higher_is_better:
            end = min(end, max(right, score.top))
        axes.set_xlim(end - span, end)
    row[0][0].set_yticks(range(len(arms)), arms)
    row[0][0].set_ylim(-0.6, len(arms) - 0.4)
    figure.suptitle(
        f"dots: seeds, bars: means; against {study.baseline}:\nblue ahead in every seed, orange "
        "behind in every seed, of more than one",
        fontsize=9,
    )
    save(figure, file)


def _ahead(panels: Finals, arm: str, baseline: str, sign: int) -> float:
    """Return by how much an arm is better than the baseline, mean over the runs that both have."""
    found = [d for seeds in panels.values() for d in _differences(seeds, arm, baseline, sign)]
    return float(np.mean(found)) if found else -np.inf


def _differences(
    seeds: Mapping[str, Mapping[int, float]], arm: str, baseline: str, sign: int
) -> list[float]:
    own, base = seeds.get(arm, {}), seeds.get(baseline, {})
    return [sign * (value - base[seed]) for seed, value in own.items() if seed in base]


def _colour(ahead: Sequence[float]) -> str:
    """Return grey where seeds disagree, or there is but one."""
    if len(ahead) > 1 and min(ahead) > 0:
        return "#0072b2"
    return "#d55e00" if len(ahead) > 1 and max(ahead) < 0 else "0.55"


def mean_curve(curves: Sequence[Points]) -> tuple[Array, Array]:
    """Return the mean of curves, linear between their points, where all of them are known."""
    first = max(curve[0][0] for curve in curves)
    last = min(curve[-1][0] for curve in curves)
    every = np.unique([x for curve in curves for x, _ in curve] + [first, last])
    grid = every[(every >= first) & (every <= last)]
    values = [np.interp(grid, *np.array(curve, np.float64).T) for curve in curves]
    return grid, np.mean(values, axis=0)


def _over_time(
    file: Path, setting: str, score: Score, target: float, curves: dict[str, list[Points]]
) -> None:
    ends = [curve[-1][0] for seeds in curves.values() for curve in seeds]
    wide = max(ends) > WIDE * min(ends)
    if wide:  # which has no place for 0
        curves = {
            arm: [[(x, y) for x, y in curve if x > 0] for curve in seeds]
            for arm, seeds in curves.items()
        }
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for i, (arm, seeds) in enumerate(curves.items()):
        for curve in seeds:
            axes.plot(*zip(*curve, strict=True), color=f"C{i}", linewidth=0.6, alpha=0.4)
        axes.plot(*mean_curve(seeds), color=f"C{i}", linewidth=2, label=arm)
    axes.axhline(target, color="0.4", linestyle=":", label=f"target {target:g}")
    if wide:
        axes.set_xscale("log")
    axes.set_xlabel("seconds by the clock")
    axes.set_ylabel(f"{score.label}, server's test rows")
    from_zero(axes, score.top if score.higher_is_better else None)
    axes.set_title(f"{setting}: mean over seeds, and each seed")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file)


def _predicted(
    file: Path, setting: str, periods: dict[str, list[tuple[float, float, float]]]
) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 5))
    most = max(max(x, y) for rows in periods.values() for x, y, _ in rows) * 1.1
    axes.plot([0, most], [0, most], color="0.6", linewidth=1, label="as predicted")
    for arm, rows in periods.items():
        x, y, error = zip(*rows, strict=True)
        axes.errorbar(x, y, yerr=error, fmt="o", markersize=5, label=arm)
    axes.set_xlabel("seconds of a round, predicted by the planner")
    axes.set_ylabel("mean of the rounds after that plan, with its standard error")
    axes.set_xlim(0, most)
    axes.set_ylim(0, most)
    axes.set_title(setting)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file)


def plot_ranks(run: Path, clients: int, file: Path) -> None:
    """Draw the rank of each client above its label distribution.

    Parameters
    ----------
    run : Path
        Folder of a simulated run whose rank policy explained itself (``kind: ranks``).
    clients : int
        Simulated clients of that run.
    file : Path
        PNG to write.
    """
    from fedlora_app.data.partition import shares

    config = RunConfig.from_flat(read_json(run / "config.json"))
    book = of_kind(read_records(run / "metrics.jsonl"), "ranks")[-1]
    ranks = {entry["client"]: entry["rank"] for entry in book["clients"]}
    task = make_task(config)
    rows = task.train_rows()
    names = task.strata_names(rows.about)
    strata = task.strata(rows)
    if strata is None:  # rows of no class: their number alone
        strata, names = np.zeros(len(rows), np.int64), ("rows",)
    parts = shares(task, rows, clients)
    counts = np.array([np.bincount(strata[part], minlength=len(names)) for part in parts])

    plt = pyplot()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.5, 6), sharex=True, height_ratios=[1, 2])
    x = np.arange(clients)
    top.bar(x, [ranks.get(i, 0) for i in x], color="0.35")
    for i in x:
        top.text(i, ranks.get(i, 0), str(ranks.get(i, "–")), ha="center", va="bottom")
    top.set_ylabel("LoRA rank")
    top.set_title(f"{config.ranks.policy}, partition {config.data.partition}, seed {config.seed}")
    top.margins(y=0.2)
    below = np.zeros(clients)
    for c, name in enumerate(names):
        bottom.bar(x, counts[:, c], bottom=below, label=name)
        below += counts[:, c]
    bottom.set_ylabel("training rows")
    bottom.set_xlabel("client")
    bottom.set_xticks(x)
    bottom.legend(fontsize=8, ncols=2)
    save(figure, file)
