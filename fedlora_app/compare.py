"""Compare settings: the same seeded partitions, several arms, several seeds, one table.

``python -m fedlora_app.compare studies/autorank.toml`` runs every arm of the study that
has not run yet, in Flower's simulation, and prints one table per setting. A study that
was interrupted goes on where it stopped: what has a ``summary.json`` is not run again.

A study file holds ``clients``, ``seeds``, ``target`` (of the task's first score), and
run-config keys: ``[config]`` for all runs, ``[settings.NAME]`` for each setting, ``[arms.NAME]``
for each arm.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora_app.config import ConfigError
from fedlora_app.copies import Copies
from fedlora_app.ray_head import RayHead
from fedlora_app.records import RecordsError, of_kind, read_json, read_records
from fedlora_app.retiming import retime_folder, training_of
from fedlora_app.study import Flat, Run, Study
from fedlora_app.study_plots import plot_ranks, plot_study
from fedlora_app.superlink import SuperLink, exit_on_signals
from strategies.durations import duration

PROJECT = Path(__file__).resolve().parents[1]


def execute(study: Study, folder: Path) -> int:
    """Run what is not done yet and return how many runs failed."""
    reuse(study, folder)
    todo = [run for run in study.runs(folder) if not run.done]
    if not todo:
        return 0
    failed = 0
    began, ran = time.monotonic(), 0
    federation: Flat = {"num-supernodes": study.clients, "client-resources-num-cpus": 1}
    with (
        Copies() as copies,
        RayHead() as ray_head,
        SuperLink(simulation=True, copies=copies, ray_head=ray_head) as link,
    ):
        for number, run in enumerate(todo, start=1):
            if run.done:  # timed again from one of the runs before it
                continue
            left = time_left(time.monotonic() - began, ran, sum(not r.done for r in todo))
            print(f"[{number}/{len(todo)}] {run.name}{left} …", flush=True)
            shutil.rmtree(run.folder, ignore_errors=True)  # what an interrupted run left
            run_id = link.run(PROJECT, run.config, federation)
            for _ in link.stream(run_id):
                pass
            status = link.status(run_id)
            ran += 1
            if status.completed:
                scores = run.scores(study.target)
                print("  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
                reuse(study, folder)
            else:
                failed += 1
                print(f"  failed: {status.details}", file=sys.stderr, flush=True)
    return failed


def time_left(seconds: float, ran: int, waiting: int) -> str:
    """Return what is left of a study whose runs took so long, for the log; nothing before one."""
    return f", left {duration(seconds / ran * waiting)}" if ran else ""


def reuse(study: Study, folder: Path) -> None:
    """Time finished runs again for those that differ from them only in the clock."""
    finished: list[tuple[Flat, Run]] = []
    for run in study.runs(folder):
        if run.done and "retimed_from" not in read_json(run.folder / "summary.json"):
            training = training_of(run.config)
            if training is not None:
                finished.append((training, run))
    for run in study.runs(folder):
        if run.done or (training := training_of(run.config)) is None:
            continue
        source = next((other for known, other in finished if known == training), None)
        if source is None:
            continue
        try:
            retime_folder(source.folder, run.folder, run.config)
        except ValueError as error:
            print(f"{run.name}: cannot be timed from {source.folder}: {error}", file=sys.stderr)
        else:
            print(f"{run.name}: timed again from {source.folder}", flush=True)


def tables(study: Study, folder: Path) -> str:
    """Return one Markdown table per setting: mean ± standard deviation over the seeds."""
    lines: list[str] = []
    for setting in study.settings:
        lines += [f"**{setting}**", ""]
        arms = {
            arm: [
                run.scores(study.target)
                for run in study.runs(folder)
                if run.done and (run.setting, run.arm) == (setting, arm)
            ]
            for arm in study.arms
        }
        # Not every arm has a plan: the columns are those of all arms.
        head = list(dict.fromkeys(key for done in arms.values() for row in done for key in row))
        if head:
            lines += ["| arm | seeds | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
        for arm, done in arms.items():
            if done:
                cells = [_cell([row[key] for row in done if key in row]) for key in head]
                lines.append(f"| {arm} | {len(done)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    """Return mean ± spread; where not every seed got there, how many did."""
    if not values:
        return "–"
    x = np.array(values)
    known = x[~np.isnan(x)]
    if not len(known):
        return "not reached"
    digits = 3 if abs(known).max() < 2 else 1
    cell = f"{known.mean():.{digits}f} ± {known.std():.{digits}f}"
    return cell if len(known) == len(x) else f"{cell} ({len(known)} of {len(x)})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path, help="the study file (TOML)")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="(default: runs)")
    parser.add_argument("--only-table", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args(argv)
    try:
        study = Study.read(args.study)
    except (OSError, tomllib.TOMLDecodeError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    folder = (args.output / study.name).expanduser().absolute()
    failed = 0
    try:
        if not args.only_table:
            with exit_on_signals():
                failed = execute(study, folder)
        show(study, folder)
    except RecordsError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if failed else 0


def show(study: Study, folder: Path) -> None:
    """Print the tables of a study, draw its plots, and print where they are."""
    print(tables(study, folder))
    explained: dict[tuple[str, str], Run] = {
        (run.setting, run.arm): run
        for run in reversed(list(study.runs(folder)))
        if run.done and _scored(run.folder)
    }
    for (setting, arm), run in explained.items():
        file = folder / f"ranks-{setting}-{arm}.png"
        plot_ranks(run.folder, study.clients, file)
        print(file)
    for file in plot_study(study, folder):
        print(file)


def _scored(run: Path) -> bool:
    """Return whether the ranks of a run are by scores of the clients, as autorank's are."""
    books = of_kind(read_records(run / "metrics.jsonl"), "ranks")
    return any("score" in entry for book in books[-1:] for entry in book["clients"])


if __name__ == "__main__":
    sys.exit(main())
