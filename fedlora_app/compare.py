"""Compare settings: the same seeded partitions, several arms, several seeds, one table.

``python -m fedlora_app.compare studies/autorank.toml`` runs every arm of the study that
has not run yet, in Flower's simulation, and prints one table per setting. A study that
was interrupted goes on where it stopped: what has a ``summary.json`` is not run again.

A study file holds ``clients``, ``seeds``, ``target`` (an accuracy), and run-config keys:
``[config]`` for all runs, ``[settings.NAME]`` for each setting, ``[arms.NAME]`` for each arm.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_app.config import ConfigError, Scalar
from fedlora_app.copies import Copies
from fedlora_app.flower import flatten_dict
from fedlora_app.plots import megabytes
from fedlora_app.ray_head import RayHead
from fedlora_app.read import read_config
from fedlora_app.records import of_kind, plan_periods, read_json, read_records
from fedlora_app.retiming import retime_folder, training_of
from fedlora_app.study_plots import plot_ranks, plot_study
from fedlora_app.superlink import SuperLink, exit_on_signals

PROJECT = Path(__file__).resolve().parents[1]
Flat = dict[str, Scalar]


@dataclass(frozen=True)
class Study:
    """What is compared: every arm in every setting with every seed."""

    name: str
    clients: int
    seeds: list[int]
    target: float
    common: Flat
    settings: dict[str, Flat]
    arms: dict[str, Flat]

    @classmethod
    def read(cls, file: Path) -> Study:
        """Read a study file and check every run's config.

        Raises
        ------
        ConfigError
            If a key is missing or a run could not start.
        """
        toml = tomllib.loads(file.read_text(encoding="utf-8"))
        missing = [k for k in ("clients", "seeds", "target", "settings", "arms") if k not in toml]
        if missing:
            raise ConfigError([f"{file}: expected the keys {', '.join(missing)}"])
        study = cls(
            file.stem,
            toml["clients"],
            toml["seeds"],
            toml["target"],
            flatten_dict(toml.get("config", {})),
            {name: flatten_dict(keys) for name, keys in toml["settings"].items()},
            {name: flatten_dict(keys) for name, keys in toml["arms"].items()},
        )
        for run in study.runs(Path()):
            read_config(run.config)
        return study

    def runs(self, folder: Path) -> Iterator[Run]:
        """Yield every run; seeds outermost, so that an unfinished study is a fair one."""
        for seed, (setting, own), (arm, keys) in product(
            self.seeds, self.settings.items(), self.arms.items()
        ):
            output = folder / setting / arm / f"seed-{seed}"
            config = {**self.common, **own, **keys, "seed": seed, "output": str(output)}
            yield Run(setting, arm, seed, output, config)


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    setting: str
    arm: str
    seed: int
    folder: Path
    config: Flat

    @property
    def done(self) -> bool:
        """Whether it ran to its end; the summary is the last thing a run writes."""
        return (self.folder / "summary.json").exists()

    def scores(self, target: float) -> dict[str, float]:
        """Return final scores, and what it took to reach the target accuracy.

        The target is reached at the end of the first round whose accuracy on the server's test
        rows is at least that; there is no interpolation between rounds.
        """
        summary = read_json(self.folder / "summary.json")
        records = read_records(self.folder / "metrics.jsonl")
        rounds = of_kind(records, "round")
        ranks = [rank for r in rounds for rank in r["ranks"]]
        totals = megabytes(rounds)
        accuracies = [r.get("server_accuracy") or 0.0 for r in rounds]
        at = next((i for i, accuracy in enumerate(accuracies) if accuracy >= target), None)
        scores = {
            "accuracy": summary["accuracy"],
            "macro-F1": summary["macro_f1"],
            "mean rank": float(np.mean(ranks)) if ranks else np.nan,
            "MB": totals[-1],
            "MB to target": np.nan if at is None else totals[at],
            "rounds to target": np.nan if at is None else rounds[at]["round"],
        }
        if any(r.get("clock_total") for r in rounds):
            clock = [r.get("clock_total") or 0.0 for r in rounds]
            scores["seconds"] = max(clock)
            scores["seconds to target"] = np.nan if at is None else clock[at]
        ratios = [np.mean(real) / plan["round_seconds"] for plan, real in plan_periods(records)]
        if ratios:
            scores["real / planned"] = float(np.mean(ratios))
        return scores


def execute(study: Study, folder: Path) -> int:
    """Run what is not done yet and return how many runs failed."""
    reuse(study, folder)
    todo = [run for run in study.runs(folder) if not run.done]
    if not todo:
        return 0
    failed = 0
    federation: Flat = {"num-supernodes": study.clients, "client-resources-num-cpus": 1}
    with (
        Copies() as copies,
        RayHead() as ray_head,
        SuperLink(simulation=True, copies=copies, ray_head=ray_head) as link,
    ):
        for number, run in enumerate(todo, start=1):
            if run.done:  # timed again from one of the runs before it
                continue
            name = f"[{number}/{len(todo)}] {run.setting}, {run.arm}, seed {run.seed}"
            print(f"{name} …", flush=True)
            shutil.rmtree(run.folder, ignore_errors=True)  # what an interrupted run left
            run_id = link.run(PROJECT, run.config, federation)
            for _ in link.stream(run_id):
                pass
            status = link.status(run_id)
            if status.completed:
                scores = run.scores(study.target)
                print("  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
                reuse(study, folder)
            else:
                failed += 1
                print(f"  failed: {status.details}", file=sys.stderr, flush=True)
    return failed


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
        name = f"{run.setting}, {run.arm}, seed {run.seed}"
        try:
            retime_folder(source.folder, run.folder, run.config)
        except ValueError as error:
            print(f"{name}: cannot be timed from {source.folder}: {error}", file=sys.stderr)
        else:
            print(f"{name}: timed again from {source.folder}", flush=True)


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
    if not args.only_table:
        with exit_on_signals():
            failed = execute(study, folder)
    print(tables(study, folder))
    explained: dict[tuple[str, str], Any] = {
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
    return 1 if failed else 0


def _scored(run: Path) -> bool:
    """Return whether the ranks of a run are by scores of the clients, as autorank's are."""
    books = of_kind(read_records(run / "metrics.jsonl"), "ranks")
    return any("score" in entry for book in books[-1:] for entry in book["clients"])


if __name__ == "__main__":
    sys.exit(main())
