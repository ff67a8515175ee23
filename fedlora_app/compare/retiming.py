"""Runs of a study that differ from a finished one only in the clock: timed again, not repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from fedlora_app.config.fields import Scalar
from fedlora_app.config.keys import RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.report.folder import clock_total
from fedlora_app.report.plots import plot_run
from fedlora_app.report.records import (
    of_kind,
    read_json,
    read_records,
    rounded,
    write_json,
    write_lines,
)
from fedlora_app.report.scores import scores_of
from strategies.records import MEASURED, ClientRecord, Record, RoundRecord

Flat = Mapping[str, Scalar]


class Time(Protocol):
    """What a clock says of a round: see ``strategies.wallclock.RoundTime``."""

    @property
    def seconds(self) -> float:  # noqa: D102
        ...

    @property
    def bottleneck(self) -> int | None:  # noqa: D102
        ...

    @property
    def compute_seconds(self) -> Mapping[int, float]:  # noqa: D102
        ...

    @property
    def upload_seconds(self) -> Mapping[int, float]:  # noqa: D102
        ...


Timer = Callable[[Sequence[Record], RunConfig], Sequence[Time]]


def training_of(flat: Flat) -> dict[str, Scalar] | None:
    """Return the part of a config that training depends on; None if it depends on the clock.

    It does where a planner, a deadline or who is there acts on the seconds, and may with a sampler
    of a plug-in that does not declare ``clock_blind``. A run on the real clock cannot be timed
    again: what its machine did is not known to a simulated one.
    """
    from strategies.promises import declares  # with torch, which takes seconds to import

    parts = read_config(flat)
    config = parts.config
    acts = not declares(parts.sampler, "clock_blind")
    acts = acts or config.clock.deadline > 0 or config.clock.availability != "always"
    acts = acts or parts.waiting.closes
    if acts or not config.clock.simulated or not config.federated:
        return None
    return {
        key: value
        for key, value in config.to_flat().items()
        if key != "output" and not key.startswith("clock.")
    }


def timed_by_clock(records: Sequence[Record], config: RunConfig) -> Sequence[Time]:
    """Time records again by the clock of a config, with the work that the run counted.

    Raises
    ------
    ValueError
        If the records do not say how much work a training step was.
    """
    from fedlora_app.timing import Timing  # takes seconds to import
    from strategies.wallclock.retime import retime

    counted = of_kind(records, "clock")
    if not counted:
        raise ValueError("the run has no record of kind 'clock', with the FLOPs of a step")
    work = {key: float(counted[-1][key]) for key in ("base_flops", "rank_flops", "steps")}
    return retime(records, Timing(config).clock(**work))


def retime_folder(source: Path, target: Path, flat: Flat, timer: Timer = timed_by_clock) -> None:
    """Make a run folder from a finished one: the same training by another clock.

    Parameters
    ----------
    source : Path
        Folder of the finished run.
    target : Path
        Folder to make; what is in it is removed.
    flat : Mapping[str, Scalar]
        The run config of the new folder.
    timer : callable
        Returns the time of each ``round`` record. (default: by the clock of the config)

    Raises
    ------
    ValueError
        If the finished run cannot be timed again; there is no new folder then.
    """
    config = RunConfig.from_flat(flat)
    records = read_records(source / "metrics.jsonl")
    retimed = with_times(records, timer(records, config))
    rounds = of_kind(retimed, "round")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    key = "train.precision"  # what "auto" became is a matter of then and there
    made = {k: v for k, v in read_json(source / "config.json").items() if k == key}
    write_json(target / "config.json", config.to_flat() | made)
    write_lines(target / "metrics.jsonl", retimed)
    plot_run(rounds, target, scores_of(records, config.to_flat()))
    summary = {k: v for k, v in read_json(source / "summary.json").items() if k != "clock_seconds"}
    summary |= {**clock_total(rounds), "retimed_from": str(source)}
    write_json(target / "summary.json", summary)  # last: it says all is there


def with_times(records: Iterable[Record], times: Sequence[Time]) -> list[Record]:
    """Return the records with the clock's fields of each round and its clients replaced."""
    records = list(records)
    numbers = [r["round"] for r in of_kind(records, "round")]
    by_round = dict(zip(numbers, times, strict=True))
    total = 0.0
    out: list[Record] = []
    for record in records:
        if record["kind"] == "round":
            record = cast(RoundRecord, _without_measured(record))
            time = by_round[record["round"]]
            seconds = time.seconds if record["round"] else 0.0  # round 0 is the start
            total += seconds
            record["clock_seconds"], record["clock_total"] = rounded(seconds), rounded(total)
            record["bottleneck"] = time.bottleneck
        elif record["kind"] == "client" and record["round"] in by_round:
            record = cast(ClientRecord, _without_measured(record))
            time, i = by_round[record["round"]], record["client"]
            record["compute_seconds"] = rounded(time.compute_seconds.get(i))
            record["upload_seconds"] = rounded(time.upload_seconds.get(i))
        out.append(record)
    return out


def _without_measured(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in MEASURED}
