"""Compare settings: the same seeded partitions, several arms, several seeds, one table.

``fedlora compare studies/autorank.toml`` runs every arm of the study that
has not run yet, in Flower's simulation, and prints one table per setting. A study that
was interrupted goes on where it stopped: what has a ``summary.json`` is not run again. Runs go
side by side, one a core.

A study file holds ``clients``, ``seeds``, ``target`` (of the task's first score), ``baseline``
(the arm that others are compared with; default: the first), and run-config keys: ``[config]`` for
all runs, ``[settings.NAME]`` for each setting, ``[arms.NAME]`` for each arm. ``clients`` may stand
in a setting instead; in one of a natural partition its column says how many there are.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import psutil

from fedlora_app.compare.retiming import retime_folder, training_of
from fedlora_app.compare.study import Flat, Run, Study
from fedlora_app.compare.study_plots import plot_arms, plot_ranks, plot_study
from fedlora_app.compare.study_queue import StudyQueue, jobs_for, listing
from fedlora_app.compare.tables import tables
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.data.kept import shares_of
from fedlora_app.launch.copies import Copies
from fedlora_app.launch.inspection import CORES
from fedlora_app.launch.processes import exit_on_signals
from fedlora_app.launch.project import project_folder
from fedlora_app.launch.ray_head import RayHead
from fedlora_app.launch.superlink import POLL, SuperLink, SuperLinkError
from fedlora_app.report.records import RecordsError, of_kind, read_json, read_records
from fedlora_app.tasks import Rows, make_task


def check_shares(study: Study, folder: Path) -> None:
    """Share out the rows of every run that is to do, so that none fails an hour later.

    Raises
    ------
    ValueError or FileNotFoundError
        Which runs cannot be, and why.
    """
    read: dict[object, Rows] = {}
    seen = set()
    for run in study.runs(folder):
        config = RunConfig.from_flat(run.config)
        data = config.task, config.data, config.model  # seeds share them
        kind = (data, config.seed, run.clients)
        if run.done or kind in seen:
            continue
        seen.add(kind)
        task = make_task(config)
        if data not in read:
            read[data] = task.train_rows()
        try:
            shares_of(task, read[data], run.clients)
        except ValueError as error:
            raise ValueError(f"{run.setting}, seed {run.seed}: {error}") from error


def check_gpus(gpus: float) -> None:
    """Refuse a share of GPUs that are not here; say where there are some that nobody uses.

    Raises
    ------
    ValueError
        What is asked for, and what there is.
    """
    from fedlora_app.launch.door import idle_gpus, resource_problems  # torch takes seconds

    if problems := resource_problems(1, gpus):
        raise ValueError("\n".join(problems))
    if hint := idle_gpus(1, gpus):
        print(hint, flush=True)


def execute(study: Study, folder: Path, jobs: int = 1, gpus: float = 0.0) -> int:
    """Run what is not done yet, so many side by side, and return how many runs failed."""
    reuse(study, folder)
    queue = StudyQueue(study, folder, lambda running: reuse(study, folder, running))
    if not queue.total:
        return 0
    jobs = min(jobs, queue.total)
    cores = max(1, (os.cpu_count() or 1) // jobs)
    # Entered first, so that its threads are waited for when all they wait for has ended.
    with ThreadPoolExecutor(jobs) as threads, Copies() as copies, ExitStack() as open_now:
        # A Ray each: two runs on one would take each other's cores. All start side by side.
        rays = [open_now.enter_context(RayHead(cores, logs=False)) for _ in range(jobs)]
        links = []
        for ray_head in rays:
            # Others train while one waits to begin: looking more often costs more than it gains.
            own = {CORES: f"{cores}", POLL: "0.5"}
            link = SuperLink(
                simulation=True, copies=copies, ray_head=ray_head, environment=own, wait=False
            )
            links.append(open_now.enter_context(link))
        project = open_now.enter_context(project_folder())
        open_now.callback(queue.close)
        working = [threads.submit(_work, queue, link, project, gpus) for link in links]
        for ended in wait(working, return_when=FIRST_EXCEPTION).done:
            ended.result()
    return queue.failed


def _work(queue: StudyQueue, link: SuperLink, project: Path, gpus: float) -> None:
    """Run what the queue hands out on one SuperLink, one after the other."""
    while (run := queue.next()) is not None:
        federation: Flat = {
            "num-supernodes": run.clients,
            "client-resources-num-cpus": 1,
            "client-resources-num-gpus": gpus,
        }
        run_id = link.run(project, run.config, federation)
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


def compare(
    file: Path,
    output: Path = Path("runs"),
    *,
    jobs: int = 0,
    gpus: float = 0.0,
    only_table: bool = False,
    listed: bool = False,
    against: str | None = None,
) -> int:
    """Run what a study lacks, print its tables, and return the exit code.

    Parameters
    ----------
    file : Path
        The study file.
    output : Path
        Folder of the study's own folder (default: ``runs``).
    jobs : int
        Runs side by side; 0: one a core where memory allows, with a GPU one (default).
    gpus : float
        Share of a GPU that each client gets (default: 0, they train on the CPU). Runs side by
        side all see the same GPU.
    only_table, listed : bool
        Run nothing: print the tables, or say what is to do (default: False).
    against : str, optional
        The baseline (default: the study's).
    """
    try:
        study = Study.read(file, baseline=against)
    except (OSError, tomllib.TOMLDecodeError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    folder = (output / study.name).expanduser().absolute()
    jobs = jobs if jobs > 0 else _jobs()
    failed = 0
    try:
        if listed:
            print(listing(study, folder, jobs))
            return 0
        if not only_table:
            check_gpus(gpus)
            check_shares(study, folder)
            with exit_on_signals():
                failed = execute(study, folder, jobs, gpus)
        show(study, folder)
    except (RecordsError, ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except SuperLinkError as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if failed else 0


def _jobs() -> int:
    """Return how many runs this machine does side by side."""
    import torch  # takes seconds to import

    free = psutil.virtual_memory().available
    return jobs_for(os.cpu_count() or 1, free, torch.cuda.is_available())


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
        plot_ranks(run.folder, run.clients, file)
        print(file)
    for file in [*plot_arms(study, folder), *plot_study(study, folder)]:
        print(file)


def _scored(run: Path) -> bool:
    """Return whether the ranks of a run are by scores of the clients, as autorank's are."""
    books = of_kind(read_records(run / "metrics.jsonl"), "ranks")
    return any("score" in entry for book in books[-1:] for entry in book["clients"])
