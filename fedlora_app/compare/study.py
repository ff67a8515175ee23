"""What is compared: the runs of a study, and what came of each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from fedlora_app.config.keys import ConfigError, Scalar
from fedlora_app.config.read import read_config
from fedlora_app.flower import flatten_dict
from fedlora_app.launch.inspection import clients_of
from fedlora_app.report.plots import megabytes, points
from fedlora_app.report.records import numbers, of_kind, plan_periods, read_json, read_records
from fedlora_app.report.scores import first_of, scores_of
from fedlora_app.tasks import Score
from strategies.records import ClockRecord, Record

Flat = dict[str, Scalar]


@dataclass(frozen=True)
class Study:
    """What is compared: every arm in every setting with every seed."""

    name: str
    clients: dict[str, int]  # by setting
    seeds: list[int]
    target: dict[str, float]  # by setting
    common: Flat
    settings: dict[str, Flat]
    arms: dict[str, Flat]
    baseline: str  # the arm that others are compared with

    @classmethod
    def read(cls, file: Path, *, baseline: str | None = None) -> Study:
        """Read a study file and check every run's config.

        Parameters
        ----------
        file : Path
        baseline : str, optional
            The arm that others are compared with (default: what the file says, else its first).

        Raises
        ------
        ConfigError
            If a key is missing, there is no such arm, or a run could not start.
        """
        toml = tomllib.loads(file.read_text(encoding="utf-8"))
        missing = [k for k in ("seeds", "target", "settings", "arms") if k not in toml]
        if missing:
            raise ConfigError([f"{file}: expected the keys {', '.join(missing)}"])
        settings, arms = toml["settings"], toml["arms"]
        against = baseline or toml.get("baseline", next(iter(arms), ""))
        if against not in arms:
            raise ConfigError(
                [f"{file}: baseline: expected one of the arms {', '.join(arms)}; got {against!r}"]
            )
        study = cls(
            file.stem,
            {name: keys.pop("clients", 0) for name, keys in settings.items()},
            toml["seeds"],
            {name: keys.pop("target", toml["target"]) for name, keys in settings.items()},
            flatten_dict(toml.get("config", {})),
            {name: flatten_dict(keys) for name, keys in settings.items()},
            {name: flatten_dict(keys) for name, keys in arms.items()},
            against,
        )
        found: dict[str, int] = {}
        for run in study.runs(Path()):
            parts = read_config(run.config)
            if run.setting not in found:
                natural = parts.config.data.partition == "natural"
                found[run.setting] = run.clients or (
                    clients_of(parts.task) if natural else toml.get("clients", 0)
                )
        if lacking := [name for name, clients in found.items() if not clients]:
            raise ConfigError(
                [f"{file}: expected the key clients, at the top or in settings {lacking[0]!r}"]
            )
        return replace(study, clients=found)

    def runs(self, folder: Path) -> Iterator[Run]:
        """Yield every run; seeds outermost, so that an unfinished study is a fair one."""
        for seed, (setting, own), (arm, keys) in product(
            self.seeds, self.settings.items(), self.arms.items()
        ):
            output = folder / setting / arm / f"seed-{seed}"
            config = {**self.common, **own, **keys, "seed": seed, "output": str(output)}
            clients, target = self.clients[setting], self.target[setting]
            yield Run(setting, arm, seed, output, config, clients, target)


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    setting: str
    arm: str
    seed: int
    folder: Path
    config: Flat
    clients: int
    target: float

    @property
    def name(self) -> str:
        """Return how it is called in the log."""
        return f"{self.setting}, {self.arm}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it ran to its end; the summary is the last thing a run writes."""
        return (self.folder / "summary.json").exists()

    @cached_property
    def records(self) -> list[Record]:
        """What a finished run has told."""
        return read_records(self.folder / "metrics.jsonl")

    @cached_property
    def measured(self) -> tuple[Score, ...]:
        """What a finished run is measured by, the first score first."""
        return scores_of(self.records, read_json(self.folder / "config.json"))

    @property
    def score(self) -> Score:
        """The first of these, by which runs are compared."""
        return first_of(self.measured)

    @property
    def final(self) -> float | None:
        """The first score of a finished run, on the whole test set; None where it has none."""
        value = read_json(self.folder / "summary.json").get(self.score.name)
        return value if isinstance(value, int | float) else None

    def scores(self) -> dict[str, float]:
        """Return final scores by their label, what the run cost, and what the target cost.

        The target is reached at the end of the first round whose first score on the server's test
        rows is at least as good; there is no interpolation between rounds. ``over rounds`` is the
        mean of that score from the start to the end, straight between the rounds that have one: the
        area under its curve. ``server s`` are the seconds of aggregation, ``TFLOP`` what the
        clients computed in training, counted for a simulated clock.
        """
        summary, records = read_json(self.folder / "summary.json"), self.records
        rounds = of_kind(records, "round")
        ranks = [rank for r in rounds for rank in r["ranks"]]
        totals = megabytes(rounds)
        first = self.score
        at = next((i for i, r in enumerate(rounds) for value in numbers([r], f"server_{first.name}")
                   if first.reached(value, self.target)), None)  # fmt: skip
        found = {s.label: summary.get(s.name) for s in self.measured or (first,)}
        curve = np.array(points(rounds, "round", f"server_{first.name}"))
        if len(curve) > 1:
            x, y = curve.T
            area = np.average((y[1:] + y[:-1]) / 2, weights=np.diff(x))
            found[f"{first.label} over rounds"] = float(area)
        worst = f"{first.name}_worst"  # of a round, or of clients alone
        seen = numbers(rounds, f"clients_{worst}")
        of_all = numbers(rounds, f"clients_{first.name}")[-1:]
        for end, key in (("", first.name), (", global", f"{first.name}_global")):
            # Of clients that train for themselves the summary says it, of others the last round.
            own = [summary.get(f"own_{key}"), *(() if end else of_all)]
            found[f"{first.label}, own rows{end}"] = next((v for v in own if v is not None), None)
        known = [summary.get(f"own_{worst}"), *seen[-1:], summary.get(worst)]
        found["worst client"] = next((v for v in known if v is not None), None)
        scores: dict[str, float] = {
            **{label: value for label, value in found.items() if value is not None},
            "mean rank": float(np.mean(ranks)) if ranks else np.nan,
            "MB": totals[-1],
            "MB to target": np.nan if at is None else totals[at],
            "rounds to target": np.nan if at is None else rounds[at]["round"],
            "server s": sum(numbers(rounds, "aggregate_seconds")),
        }
        if counted := of_kind(records, "clock"):
            work = _teraflops(records, counted[-1])
            done = None if at is None else rounds[at]["round"]
            scores["TFLOP"] = sum(work.values())
            scores["TFLOP to target"] = (
                np.nan if done is None else sum(f for n, f in work.items() if n <= done)
            )
        if any(r.get("clock_total") for r in rounds):
            clock = [r.get("clock_total") or 0.0 for r in rounds]
            scores["seconds"] = max(clock)
            scores["seconds to target"] = np.nan if at is None else clock[at]
        periods = ((plan["round_seconds"], real) for plan, real in plan_periods(records))
        ratios = [np.mean(real) / promised for promised, real in periods if promised]
        if ratios:
            scores["real / planned"] = float(np.mean(ratios))
        return scores


def _teraflops(records: Sequence[Record], work: ClockRecord) -> dict[int, float]:
    """Return what clients computed in training, by round, whether or not it was used."""
    found: dict[int, float] = {}
    for r in of_kind(records, "client"):
        if r["status"] in ("ok", "late"):
            steps = work["steps"] if (own := r.get("steps")) is None else own
            flops = steps * (work["base_flops"] + work["rank_flops"] * r["rank"])
            found[r["round"]] = found.get(r["round"], 0.0) + flops / 1e12
    return found
