"""Compare settings: the same seeded partitions, several arms, several seeds, one table.

``python -m fedlora_app.compare studies/autorank.toml`` runs every arm of the study that
has not run yet, in Flower's simulation, and prints one table per setting. A study that
was interrupted goes on where it stopped: what has a ``summary.json`` is not run again. With cores
for it, or ``--jobs``, runs go side by side.

A study file holds ``clients``, ``seeds``, ``target`` (of the task's first score), and
run-config keys: ``[config]`` for all runs, ``[settings.NAME]`` for each setting, ``[arms.NAME]``
for each arm.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fedlora_app.compare.retiming import retime_folder, training_of
from fedlora_app.compare.study import Flat, Run, Study
from fedlora_app.compare.study_plots import plot_ranks, plot_study
from fedlora_app.compare.study_queue import StudyQueue, jobs_for
from fedlora_app.config.keys import ConfigError
from fedlora_app.launch.copies import Copies
from fedlora_app.launch.ray_head import RayHead
from fedlora_app.launch.superlink import SuperLink, exit_on_signals
from fedlora_app.report.records import RecordsError, of_kind, read_json, read_records

PROJECT = Path(__file__).resolve().parents[2]


def execute(study: Study, folder: Path, jobs: int = 1) -> int:
    """Run what is not done yet, so many side by side, and return how many runs failed."""
    reuse(study, folder)
    queue = StudyQueue(study, folder, lambda running: reuse(study, folder, running))
    if not queue.total:
        return 0
    jobs = min(jobs, queue.total)
    cores = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    # Entered first, so that its threads are waited for when all they wait for has ended.
    with ThreadPoolExecutor(jobs) as threads, Copies() as copies, ExitStack() as open_now:
        links = []
        for _ in range(jobs):  # a Ray each: two runs on one would take each other's cores
            ray_head = open_now.enter_context(RayHead(cores))
            link = SuperLink(simulation=True, copies=copies, ray_head=ray_head)
            links.append(open_now.enter_context(link))
        open_now.callback(queue.close)
        working = [threads.submit(_work, queue, link, study.clients) for link in links]
        for ended in wait(working, return_when=FIRST_EXCEPTION).done:
            ended.result()
    return queue.failed


def _work(queue: StudyQueue, link: SuperLink, clients: int) -> None:
    """Run what the queue hands out on one SuperLink, one after the other."""
    federation: Flat = {"num-supernodes": clients, "client-resources-num-cpus": 1}
    while (run := queue.next()) is not None:
        run_id = link.run(PROJECT, run.config, federation)
        for _ in link.stream(run_id):
            pass
        queue.over(run, link.status(run_id))


def reuse(study: Study, folder: Path, running: Collection[Path] = ()) -> None:
    """Time finished runs again for those that differ from them only in the clock.

    Those that are ``running`` now, by their folders, are left alone.
    """
    finished: list[tuple[Flat, Run]] = []
    for run in study.runs(folder):
        if run.done and "retimed_from" not in read_json(run.folder / "summary.json"):
            training = training_of(run.config)
            if training is not None:
                finished.append((training, run))
    for run in study.runs(folder):
        if run.done or run.folder in running:
            continue
        if (training := training_of(run.config)) is None:
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
    parser = argparse.ArgumentParser(
        prog="python -m fedlora_app.compare",
        description=(__doc__ or "").split("\n", 1)[0],
    )
    parser.add_argument("study", type=Path, help="the study file (TOML)")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="(default: runs)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        help="runs side by side (default: as many as there are cores for all clients of each)",
    )
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
                failed = execute(study, folder, args.jobs if args.jobs > 0 else jobs_for(study))
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
