"""What is compared: the runs of a study, and what came of each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from fedlora_app.config.keys import ConfigError, Scalar
from fedlora_app.config.read import read_config
from fedlora_app.flower import flatten_dict
from fedlora_app.report.plots import megabytes
from fedlora_app.report.records import numbers, of_kind, plan_periods, read_json, read_records
from fedlora_app.report.scores import first_of, scores_of

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
    def name(self) -> str:
        """Return how it is called in the log."""
        return f"{self.setting}, {self.arm}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it ran to its end; the summary is the last thing a run writes."""
        return (self.folder / "summary.json").exists()

    def scores(self, target: float) -> dict[str, float]:
        """Return final scores by their label, and what it took to reach the target.

        The target is reached at the end of the first round whose first score on the server's test
        rows is at least as good; there is no interpolation between rounds.
        """
        summary = read_json(self.folder / "summary.json")
        records = read_records(self.folder / "metrics.jsonl")
        rounds = of_kind(records, "round")
        ranks = [rank for r in rounds for rank in r["ranks"]]
        totals = megabytes(rounds)
        measured = scores_of(records, read_json(self.folder / "config.json"))
        first = first_of(measured)
        at = next((i for i, r in enumerate(rounds) for value in numbers([r], f"server_{first.name}")
                   if first.reached(value, target)), None)  # fmt: skip
        found = {s.label: summary.get(s.name) for s in measured or (first,)}
        scores: dict[str, float] = {
            **{label: value for label, value in found.items() if value is not None},
            "mean rank": float(np.mean(ranks)) if ranks else np.nan,
            "MB": totals[-1],
            "MB to target": np.nan if at is None else totals[at],
            "rounds to target": np.nan if at is None else rounds[at]["round"],
        }
        if any(r.get("clock_total") for r in rounds):
            clock = [r.get("clock_total") or 0.0 for r in rounds]
            scores["seconds"] = max(clock)
            scores["seconds to target"] = np.nan if at is None else clock[at]
        periods = ((plan["round_seconds"], real) for plan, real in plan_periods(records))
        ratios = [np.mean(real) / promised for promised, real in periods if promised]
        if ratios:
            scores["real / planned"] = float(np.mean(ratios))
        return scores
