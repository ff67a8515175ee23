"""Which scores a run has, and how they are drawn: one list of curves for the files and the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fedlora_app.config.keys import RunConfig
from fedlora_app.report.records import of_kind
from fedlora_app.tasks import LOSS, TASKS, Score
from strategies.records import Record
from strategies.scores import undeclared

TOGETHER = 3  # scores on one chart; with two curves of the clients' five, as many as have colours


@dataclass(frozen=True)
class Curves:
    """Curves that share a chart.

    Parameters
    ----------
    name : str
        Of the file.
    title : str
    series : Mapping[str, str]
        What a curve is called, by the key of a round's record.
    top : float, optional
        End of the axis (default: what the points need).
    """

    name: str
    title: str
    series: Mapping[str, str]
    top: float | None = None


LOSSES = Curves(
    "loss",
    "Loss",
    {
        "train_loss": "training loss, clients",
        "server_loss": "loss, server's test set",
        "clients_loss": "loss, clients' own rows (mean)",
    },
)
MOVED = Curves("bytes", "MB moved", {"megabytes": "MB moved since the start, both ways"})


@dataclass(frozen=True)
class Picture:
    """Curves over rounds or over seconds; the page and the PNG files draw the same.

    Parameters
    ----------
    curves : Curves
    x : str
        Key of a round's record.
    x_label : str
    """

    curves: Curves
    x: str = "round"
    x_label: str = "round"

    @property
    def file(self) -> str:
        """What its PNG is called."""
        return f"{self.curves.name}{'' if self.x == 'round' else '-over-time'}.png"

    @property
    def title(self) -> str:
        """What stands above it."""
        return f"{self.curves.title} over {'rounds' if self.x == 'round' else 'time'}"


def pictures(scores: Sequence[Score], clock: tuple[str, str] | None) -> list[Picture]:
    """Return what is drawn of a run, in order.

    Parameters
    ----------
    scores : sequence of Score
    clock : (str, str), optional
        The key of a round's record that holds seconds since the start, and what they are called
        (default: there are none).
    """
    charts = [*score_curves(scores), LOSSES]
    drawn = [Picture(chart, *x) for chart in charts for x in ((), clock) if x is not None]
    return [*drawn, Picture(MOVED)]


def scores_of(records: Iterable[Record], config: Mapping[str, Any]) -> tuple[Score, ...]:
    """Return the scores of a run, the first one first; the loss is not among them.

    A run says itself what it is measured by. One of before it did is of the task in its config;
    of a task that is not here the names are known alone.

    Parameters
    ----------
    records : Iterable[Record]
        What ``metrics.jsonl`` holds.
    config : Mapping[str, Any]
        What ``config.json`` holds.
    """
    records = list(records)
    starts = of_kind(records, "start")
    if starts and starts[-1].get("scores"):
        known = {field.name for field in fields(Score)}
        return tuple(
            Score(**{key: value for key, value in score.items() if key in known})
            for score in starts[-1]["scores"]
        )
    task = config.get("task", RunConfig().task)
    if task in TASKS:
        return TASKS[task].scores
    keys = dict.fromkeys(key for r in of_kind(records, "round") for key in r)
    names = [key.removeprefix("server_") for key in keys if key.startswith("server_")]
    return tuple(undeclared(name) for name in names if name != LOSS.name)


def first_of(scores: Sequence[Score]) -> Score:
    """Return the score that decides: the first, or the loss where there is none."""
    return (*scores, LOSS)[0]


def score_curves(scores: Sequence[Score]) -> list[Curves]:
    """Return the curves of the scores; those that end alike share a chart."""
    alike: dict[Any, list[Score]] = {}
    for score in scores:
        if score.name != LOSS.name:
            end = score.name if score.top is None else (score.top, score.higher_is_better)
            alike.setdefault(end, []).append(score)
    parts = [group[i : i + TOGETHER] for group in alike.values()
             for i in range(0, len(group), TOGETHER)]  # fmt: skip
    return [_curves(part) for part in parts]


def file_name(score: Score) -> str:
    """Return the name of a score as part of the name of a file."""
    return re.sub(r"[^\w.-]+", "-", score.name)


def title(score: Score) -> str:
    """Return the label of a score as the beginning of a line."""
    return score.label[:1].upper() + score.label[1:]


def _curves(scores: Sequence[Score]) -> Curves:
    first = scores[0]
    series = {f"server_{score.name}": f"{score.label}, server's test set" for score in scores}
    series[f"clients_{first.name}"] = f"{first.label}, clients' own rows (mean)"
    series[f"clients_{first.name}_worst"] = f"{first.label}, clients' own rows (worst)"
    top = first.top if first.higher_is_better else None  # the best of the others is at the foot
    return Curves(file_name(first), title(first), series, top)
