"""Compare settings: the same seeded partitions, several arms, several seeds, one table.

``python -m fedlora_app.compare studies/autorank.toml`` runs every arm of the study that
has not run yet, in Flower's simulation, and prints one table per setting. A study that
was interrupted goes on where it stopped: what has a ``summary.json`` is not run again.

A study file holds ``clients``, ``seeds``, ``target`` (an accuracy), and run-config keys:
``[config]`` for all runs, ``[settings.NAME]`` for each setting, ``[arms.NAME]`` for each arm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common.config import flatten_dict

from fedlora_app.config import ConfigError, RunConfig, Scalar
from fedlora_app.superlink import SuperLink

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
            RunConfig.from_flat(run.config)
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
        """Return final scores, and what it took to reach the target accuracy."""
        summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        megabytes, reached = 0.0, {"MB to target": np.nan, "rounds to target": np.nan}
        ranks: list[int] = []
        for record in map(json.loads, lines):
            if record["kind"] != "round":
                continue
            ranks += record["ranks"]
            megabytes += (record["bytes_up"] + record["bytes_down"]) / 1e6
            if np.isnan(reached["MB to target"]) and (record.get("server_accuracy") or 0) >= target:
                reached = {"MB to target": megabytes, "rounds to target": record["round"]}
        return {
            "accuracy": summary["accuracy"],
            "macro-F1": summary["macro_f1"],
            "mean rank": float(np.mean(ranks)) if ranks else np.nan,
            "MB": megabytes,
            **reached,
        }


def execute(study: Study, folder: Path) -> int:
    """Run what is not done yet and return how many runs failed."""
    todo = [run for run in study.runs(folder) if not run.done]
    if not todo:
        return 0
    failed = 0
    federation: Flat = {"num-supernodes": study.clients, "client-resources-num-cpus": 1}
    with SuperLink(simulation=True) as link:
        for number, run in enumerate(todo, start=1):
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
            else:
                failed += 1
                print(f"  failed: {status.details}", file=sys.stderr, flush=True)
    return failed


def tables(study: Study, folder: Path) -> str:
    """Return one Markdown table per setting: mean ± standard deviation over the seeds."""
    lines: list[str] = []
    for setting in study.settings:
        lines += [f"**{setting}**", ""]
        head: list[str] | None = None
        for arm in study.arms:
            done = [
                run.scores(study.target)
                for run in study.runs(folder)
                if run.done and (run.setting, run.arm) == (setting, arm)
            ]
            if not done:
                continue
            if head is None:
                head = list(done[0])
                lines += [
                    "| arm | seeds | " + " | ".join(head) + " |",
                    "|---" * (len(head) + 2) + "|",
                ]
            cells = [_cell([scores[key] for scores in done]) for key in head]
            lines.append(f"| {arm} | {len(done)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    """Return mean ± spread; where not every seed got there, how many did."""
    x = np.array(values)
    known = x[~np.isnan(x)]
    if not len(known):
        return "not reached"
    digits = 3 if abs(known).max() < 2 else 1
    cell = f"{known.mean():.{digits}f} ± {known.std():.{digits}f}"
    return cell if len(known) == len(x) else f"{cell} ({len(known)} of {len(x)})"


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from fedlora_app.data import load_train, partition_indices

    config = RunConfig.from_flat(json.loads((run / "config.json").read_text(encoding="utf-8")))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    book = [r for r in map(json.loads, lines) if r["kind"] == "ranks"][-1]
    ranks = {entry["client"]: entry["rank"] for entry in book["clients"]}
    rows = load_train(config.data)
    shares = partition_indices(rows.labels, config.data, num_clients=clients, seed=config.seed)
    classes = range(len(rows.label_names))
    counts = np.array([[np.sum(rows.labels[share] == c) for c in classes] for share in shares])

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7.5, 6), sharex=True, height_ratios=[1, 2]
    )
    x = np.arange(clients)
    top.bar(x, [ranks.get(i, 0) for i in x], color="0.35")
    for i in x:
        top.text(i, ranks.get(i, 0), str(ranks.get(i, "–")), ha="center", va="bottom")
    top.set_ylabel("LoRA rank")
    top.set_title(f"{config.ranks.policy}, partition {config.data.partition}, seed {config.seed}")
    top.margins(y=0.2)
    below = np.zeros(clients)
    for c in classes:
        bottom.bar(x, counts[:, c], bottom=below, label=rows.label_names[c])
        below += counts[:, c]
    bottom.set_ylabel("training rows")
    bottom.set_xlabel("client")
    bottom.set_xticks(x)
    bottom.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


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
    failed = 0 if args.only_table else execute(study, folder)
    print(tables(study, folder))
    explained: dict[tuple[str, str], Any] = {
        (run.setting, run.arm): run
        for run in reversed(list(study.runs(folder)))
        if run.done and run.config.get("ranks.policy") == "autorank"
    }
    for (setting, arm), run in explained.items():
        file = folder / f"ranks-{setting}-{arm}.png"
        plot_ranks(run.folder, study.clients, file)
        print(file)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
