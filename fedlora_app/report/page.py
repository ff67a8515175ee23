"""One page about a run, from the files in its folder: ``fedlora report RUN``.

The page holds everything it shows: no scripts, no requests. It suits light, dark and paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, cast

from fedlora_app.config.keys import RunConfig
from fedlora_app.report import busy, clients_table, samples, style
from fedlora_app.report.charts import bar_chart, line_chart
from fedlora_app.report.html import bar_rows, data_size, number, seconds_text, spans, table
from fedlora_app.report.plots import TOP, bottlenecks, curves_of, points, with_megabytes
from fedlora_app.report.records import (
    Fields,
    numbers,
    of_kind,
    plan_periods,
    read_json,
    read_records,
)
from fedlora_app.report.scores import first_of, pictures, scores_of, title
from fedlora_app.tasks import LOSS, Score
from strategies.records import ClientRecord, Record, RoundRecord, WayRecord

MOST_FAILURES = 200


@dataclass(frozen=True)
class RunFiles:
    """What a run has written so far."""

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    records: Sequence[Record]

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read the files of a run folder, which may still grow.

        Raises
        ------
        FileNotFoundError
            If the folder holds no run.
        RecordsError
            If it is of a newer program.
        """
        metrics = folder / "metrics.jsonl"
        if not metrics.exists():
            raise FileNotFoundError(
                f"{metrics} does not exist; name the output folder of a run, such as runs/demo"
            )
        return cls(
            folder.resolve().name,
            read_json(folder / "config.json"),
            read_json(folder / "summary.json"),
            read_records(metrics),
        )

    @cached_property
    def rounds(self) -> list[RoundRecord]:
        """The records of rounds, the start (round 0) included."""
        return of_kind(self.records, "round")

    @cached_property
    def clients(self) -> list[ClientRecord]:
        """The records of what clients did in training."""
        return of_kind(self.records, "client")

    @cached_property
    def scores(self) -> tuple[Score, ...]:
        """What it is measured by beside the loss, the first score first."""
        return scores_of(self.records, self.config)

    @property
    def failures(self) -> list[ClientRecord]:
        """The records of clients whose work did not count."""
        return [r for r in self.clients if r.get("status") != "ok"]

    @property
    def seconds(self) -> float | None:
        """Real seconds from the start of the run to its last sign."""
        last: float | None = next(
            (r["at"] for r in reversed(self.records) if r.get("at") is not None), None
        )
        return float(self.summary["seconds"]) if "seconds" in self.summary else last

    @cached_property
    def timed(self) -> bool:
        """Whether rounds have seconds by the clock of the run."""
        return any(r.get("clock_total") for r in self.rounds)


def page(run: RunFiles) -> str:
    """Return the page about a run as HTML."""
    sections = {
        "": headline(run),
        "Warnings": warnings(run),
        _heading(run.scores): curves(run),
        "Time of the rounds": round_times(run),
        "Who was busy when": busy.section(run.records),
        "Plans and pilots": plans(run),
        "Samples": samples.section(run.records),
        "Clients": clients_table.section(
            run.records, run.scores, str(run.config.get("weight-by", "rows"))
        ),
        "Failures": failures(run.failures),
        "Configuration": configuration(run.config),
    }
    body = "".join(
        f"<section>{f'<h2>{escape(title)}</h2>' if title else ''}{content}</section>"
        for title, content in sections.items()
        if content
    )
    return style.document(run.name, body)


def headline(run: RunFiles) -> str:
    """Return title, state and the numbers that matter most."""
    config, summary, rounds = run.config, run.summary, run.rounds
    wanted = config.get("rounds")
    done = max((r["round"] for r in rounds), default=0)
    over = bool(summary)
    # The last known of each field.
    last: dict[str, Any] = {k: v for r in rounds for k, v in r.items() if v is not None}
    where = "whole test set" if over else f"server's test rows, round {done}"
    scores = [
        (s.label, s.text(summary.get(s.name, last.get(f"server_{s.name}"))), where)
        for s in run.scores or (first_of(run.scores),)
    ]
    down, up = (sum(numbers(rounds, key)) for key in ("bytes_down", "bytes_up"))
    taken_part = {r.get("client") for r in run.clients if r.get("status") == "ok"}
    lost = len(run.failures)
    tiles = [
        *scores,
        ("rounds", f"{done}" + (f" of {wanted}" if wanted else ""), ""),
        ("clients that trained", str(len(taken_part)), f"of {last.get('clients_total', '?')}"),
        ("data moved", data_size(down + up), f"{data_size(down)} down, {data_size(up)} up"),
        ("real time", seconds_text(run.seconds), ""),
    ]
    if run.timed:
        tiles.append(("time by the clock", seconds_text(last["clock_total"]), clock_name(config)))
    if "epsilon_local" in last:
        note = f"{last['epsilon_central']:.2f} against who sees only the models"
        tiles.append(("ε against the server", f"{last['epsilon_local']:.2f}", note))
    tiles.append(("replies not used", str(lost), f"of {len(run.clients)}"))
    state = (
        "finished"
        if over
        else f"no summary yet: in progress, or interrupted, "
        f"{seconds_text(run.seconds)} after its start"
    )
    keys = (
        "task",
        "method",
        "aggregation",
        "model.name",
        "data.name",
        "ranks.policy",
        "sampling.policy",
    )
    about = " · ".join(str(config[key]) for key in keys if key in config)
    return (
        f"<h1>{escape(run.name)}</h1><p class=sub>{escape(about)}</p>"
        f'<p class="state {"done" if over else "open"}">{escape(state)}</p><div class=tiles>'
        + "".join(
            f"<div><span>{escape(label)}</span><b>{escape(value)}</b>"
            f"<small>{escape(note)}</small></div>"
            for label, value, note in tiles
        )
        + "</div>"
    )


def clock_name(config: Mapping[str, Any]) -> str:
    """Return what the seconds of the clock are."""
    profile = config.get("clock.profile", "measured")
    return "measured" if profile == "measured" else f"simulated: {profile}"


def warnings(run: RunFiles) -> str:
    """Return what a reader should know before believing the numbers."""
    notes = []
    # Where everybody's coin said no, the model is meant to stay.
    trained = [r for r in run.rounds if r["round"] > 0 and r.get("clients")]
    least = run.config.get("min-replies", 1)
    if unchanged := [r["round"] for r in trained if (r.get("accepted") or 0) < least]:
        notes.append(
            f"Too few good replies in round {spans(unchanged)}: the model stayed as it was."
        )
    notes += _of_rounds(run.rounds)
    for record in run.records:
        when = f"Round {cast(Fields, record).get('round', '?')}"
        if record["kind"] == "ranks":
            notes += [f"{when}, ranks: {note}" for note in record.get("notes") or ()]
        elif record["kind"] == "pilots" and not record.get("reliable"):
            notes.append(
                f"{when}, pilots: the estimate is not reliable: {record.get('reason', '?')}"
            )
        elif record["kind"] == "plan" and record.get("reason"):
            notes.append(f"{when}, plan: {record['reason']}")
    tested = ((f"server_{s.name}", f"{s.label} on the test rows") for s in (LOSS, *run.scores))
    for key, what in (("train_loss", "training loss"), *tested):
        if lost := [r["round"] for r in trained if r.get(key, 0) is None and r["accepted"]]:
            notes.append(f"No finite {what} in round {spans(lost)}.")
    missing = sorted(set(range(1, max((r["round"] for r in trained), default=0))) - {
        r["round"] for r in trained
    })  # fmt: skip
    if missing:
        notes.append(f"There is no record of round {spans(missing)}.")
    unique = list(dict.fromkeys(notes))
    return "".join(f"<p class=warning>{escape(note)}</p>" for note in unique)


def _of_rounds(rounds: Iterable[RoundRecord]) -> list[str]:
    """Return the warnings in the records of rounds, each with the rounds it is of."""
    found: dict[tuple[str, int], tuple[list[int], str]] = {}
    for r in rounds:
        for warning in r.get("warnings") or ():
            own, _ = found.get((warning["about"], warning["client"]), ([], ""))
            found[warning["about"], warning["client"]] = [*own, r["round"]], warning["text"]
    return [f"Round {spans(own)}: {text}" for own, text in found.values()]


def curves(run: RunFiles) -> str:
    """Return scores and loss over rounds and over seconds, and the data moved."""
    rounds = with_megabytes(run.rounds)
    clock, label = "clock_total", f"seconds by the clock ({clock_name(run.config)})"
    if not run.timed:
        clock, label = "at", "real seconds since the start of the run"
    out = []
    for picture in pictures(run.scores, (clock, label)):
        series, top = curves_of(picture, rounds), picture.curves.top
        whole = picture.x == "round"
        out.append(line_chart(picture.title, picture.x_label, series, y_top=top, whole_x=whole))
    return f"<div class=charts>{''.join(out)}</div>" if any(out) else ""


def _heading(scores: Sequence[Score]) -> str:
    return f"{title(scores[0])} and loss" if scores else "Loss"


def round_times(run: RunFiles) -> str:
    """Return the seconds of each round with the bottlenecks and the planner's prediction."""
    rounds = [r for r in run.rounds if r["round"] > 0 and r.get("clock_seconds") is not None]
    if not rounds:
        return ""
    counts = bottlenecks(rounds)
    colours = {client: f"s{i}" for i, (client, _) in enumerate(counts.most_common(TOP), start=1)}
    bars = []
    for r in rounds:
        seconds, slowest = r["clock_seconds"] or 0.0, r.get("bottleneck")
        tip = f"round {r['round']}: {seconds:.4g} s"
        tip += "" if slowest is None else f", bottleneck client {slowest}"
        bars.append((r["round"], seconds, colours.get(slowest, "muted"), tip))
    keys = {f"client {client}": colour for client, colour in colours.items()}
    if len(counts) > len(colours):
        keys["another client"] = "muted"
    marks = points(rounds, "round", "planned_seconds")
    if marks:
        keys["predicted by the planner"] = "dash"
    chart = bar_chart("Seconds of each round, by its bottleneck", "round", bars, marks, keys)
    often = bar_rows(
        [(f"client {c}", n, str(n), colours.get(c, "muted")) for c, n in counts.most_common(12)]
    )
    if often:
        often = (
            "<figure><figcaption><b>Rounds as the bottleneck</b></figcaption>"
            f"{often}<p class=sub>Without this client the round would have been over soonest."
            f"{f' {len(counts) - 12} more clients.' if len(counts) > 12 else ''}</p></figure>"
        )
    return f"<div class=charts>{chart}{often}</div>"


def plans(run: RunFiles) -> str:
    """Return what the run chose, what pilots found, and every plan with what became of it."""
    out = [f"<p>{escape(_way(record))}</p>" for record in of_kind(run.records, "way")]
    for record in of_kind(run.records, "pilots"):
        out.append(
            f"<p>Pilots: α = {number(record.get('alpha'))}, β = {number(record.get('beta'))}, "
            f"{'reliable' if record.get('reliable') else 'not reliable'}"
            f"{escape(': ' + str(record['reason'])) if record.get('reason') else ''}</p>"
        )
        pilots: Any = record.get("losses") or ()
        series = {
            f"pilot {n}": [(i, y) for i, y in enumerate(losses) if y is not None]
            for n, losses in enumerate(pilots, start=1)
            if isinstance(losses, list)
        }
        if chart := line_chart("Loss in the pilots", "round of the pilot", series, whole_x=True):
            out.append(f"<div class=charts>{chart}</div>")
    realised = {id(plan): seconds for plan, seconds in plan_periods(run.records)}
    rows = []
    for plan in of_kind(run.records, "plan"):
        seconds = realised.get(id(plan), [])
        mean, promised = sum(seconds) / max(len(seconds), 1), plan.get("round_seconds")
        entries = plan.get("clients") or ()
        expected = sum(entry.get("q") or 0 for entry in entries)
        others = sorted((v, k) for k, v in (plan.get("alternatives") or {}).items() if v)
        rows.append([
            plan.get("round"), plan.get("alpha"), plan.get("beta"),
            f"{expected:.1f} of {len(entries)}", _promise(promised, plan.get("round_between")),
            mean if seconds else None, mean / promised if seconds and promised else None,
            plan.get("rounds"), seconds_text(plan.get("total_seconds")),
            ", ".join(f"{name} {seconds_text(total)}" for total, name in others),
        ])  # fmt: skip
    if rows:
        out.append(table(
            ["round", "α", "β", "clients a round", "seconds a round, predicted", "real, mean",
             "real / predicted", "rounds to target", "total", "alternatives"], rows,
        ))  # fmt: skip
    return "".join(out)


def _promise(seconds: float | None, between: Sequence[float] | None) -> float | str | None:
    """Return the predicted seconds of a round, with what they lie between where that is known."""
    if seconds is None or not between:
        return seconds
    return f"{seconds:.3g} ({between[0]:.3g} to {between[1]:.3g})"


def _way(record: WayRecord) -> str:
    said = {
        "deadline": f" of {seconds_text(record.get('deadline'))}",
        "buffered": f", {record.get('busy')} clients busy, a model for every {record.get('buffer')}"
        " of their replies",
    }.get(record.get("way", ""), "")
    others = ", ".join(
        f"{name} {seconds_text(total)}"
        for name, total in (record.get("alternatives") or {}).items()
        if total
    )
    return f"Chosen before the run: {record.get('way', '?')}{said}. Predicted: {others}."


def failures(records: Iterable[ClientRecord]) -> str:
    """Return who failed when and why; what happened again is one line."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for r in records:
        key = (r.get("client"), r.get("node"), r.get("status"), r.get("reason") or "")
        groups.setdefault(key, []).append(r.get("round", 0))
    if not groups:
        return "<p>None.</p>"
    rows = [
        [client, node, status, spans(rounds), len(rounds), reason]
        for (client, node, status, reason), rounds in groups.items()
    ]
    rows.sort(key=lambda row: -row[4])
    out = table(["client", "node", "status", "rounds", "times", "reason"], rows[:MOST_FAILURES])
    if len(rows) > MOST_FAILURES:
        out += f"<p class=sub>and {len(rows) - MOST_FAILURES} more in metrics.jsonl</p>"
    return out


def configuration(config: Mapping[str, Any]) -> str:
    """Return the config, what differs from the defaults first, the rest folded."""
    defaults = RunConfig().to_flat()
    changed = [
        [key, str(value), str(defaults[key]) or "(empty)"]
        for key, value in config.items()
        if key in defaults and defaults[key] != value
    ]
    rest = [[k, str(v)] for k, v in config.items() if k not in defaults or defaults[k] == v]
    out = table(["changed key", "value", "default"], changed) if changed else ""
    if rest:
        what = (
            f"{len(rest)} keys as they are by default" if changed else "every key has its default"
        )
        out += (
            f"<details><summary>{what}</summary>"
            f"<div class=columns>{table(['key', 'value'], rest)}</div></details>"
        )
    return out
