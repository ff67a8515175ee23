"""The part of a run's page about its clients: who took part when, with which rank, how much."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fedlora_app.report.charts import grid_chart
from fedlora_app.report.html import Html, bar, table
from fedlora_app.report.plots import bottlenecks
from fedlora_app.report.records import numbers, of_kind
from fedlora_app.tasks import LOSS, Score
from strategies.records import ClientRecord, Record

SHADES = 5
MEMORY = tuple(f"memory_{phase}_mb" for phase in ("load", "forward", "backward", "optimizer"))


def section(records: Sequence[Record], scores: Sequence[Score], unit: str = "rows") -> str:
    """Return the grid of participation and the table of clients; nothing without clients.

    ``unit``: what the clients' sizes are counted in.
    """
    done = of_kind(records, "client")
    if not done:
        return ""
    return participation(done) + client_table(records, scores, unit)


def participation(done: Sequence[ClientRecord]) -> str:
    """Return a grid, clients by rounds, shaded by rank."""
    clients = sorted({r["client"] for r in done})
    last = max(r["round"] for r in done)
    row = {client: i for i, client in enumerate(clients)}
    ranks = sorted({r.get("rank") or 0 for r in done})
    shade = {rank: min(SHADES - 1, i * SHADES // len(ranks)) for i, rank in enumerate(ranks)}
    if len(ranks) <= SHADES:  # spread few ranks over all shades
        steps = max(len(ranks) - 1, 1)
        shade = {rank: round(i * (SHADES - 1) / steps) for i, rank in enumerate(ranks)}
    cells: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for r in done:
        status = r.get("status")
        colour = {"ok": f"r{shade[r.get('rank') or 0]}", "late": "late"}.get(str(status), "bad")
        cells[colour].append((row[r["client"]], r["round"] - 1))
    keys = {}
    for level in sorted(set(shade.values())):
        own = [rank for rank in ranks if shade[rank] == level]
        span = str(own[0]) if len(own) == 1 else f"{own[0]}–{own[-1]}"
        keys[f"rank {span}"] = f"r{level}"
    if "late" in cells:
        keys["late"] = "late"
    if "bad" in cells:
        keys["not used"] = "bad"
    names = [f"client {c}" for c in clients]
    grid = grid_chart(names, range(1, last + 1), cells, keys)
    return f"<h3>Who trained in which round</h3>{grid}"


def client_table(records: Sequence[Record], scores: Sequence[Score], unit: str = "rows") -> str:
    """Return one line a client; see ``client_rows``."""
    return f"<h3>Bytes, ranks and participation</h3>{table(*client_rows(records, scores, unit))}"


def client_rows(
    records: Sequence[Record], scores: Sequence[Score], unit: str = "rows"
) -> tuple[list[str], list[list[Any]]]:
    """Return titles and one line a client: participation, ranks, bytes, seconds, own scores."""
    done = of_kind(records, "client")
    own: dict[int, list[ClientRecord]] = defaultdict(list)
    for r in done:
        own[r["client"]].append(r)
    tested = {r["client"]: r for r in of_kind(records, "client-evaluation")}  # the last of each
    plans = of_kind(records, "plan")
    planned = {e["client"]: e for e in (plans[-1].get("clients") or ())} if plans else {}
    slow = bottlenecks(of_kind(records, "round"))
    moved = {c: _total(rs, "bytes_up") + _total(rs, "bytes_down") for c, rs in own.items()}
    most = max(moved.values(), default=0)
    clients = sorted({*own, *planned})

    columns: list[tuple[str, dict[int, Any]]] = [
        ("client", {c: c for c in clients}),
        ("node", {c: rs[-1].get("node") for c, rs in own.items()}),
        (unit.replace("-", " "), {c: _last(rs, "num-examples") for c, rs in own.items()}),
        ("asked", {c: len(rs) for c, rs in own.items()}),
        ("good", {c: _count(rs, "ok") for c, rs in own.items()}),
        ("late", {c: _count(rs, "late") or None for c, rs in own.items()}),
        ("not used", {c: _count(rs, "rejected") or None for c, rs in own.items()}),
        ("rank", {c: _span([r.get("rank") or 0 for r in rs]) for c, rs in own.items()}),
        ("planned q", {c: e.get("q") for c, e in planned.items()}),
        ("planned rank", {c: e.get("rank") for c, e in planned.items()}),
        ("MB down", {c: _total(rs, "bytes_down") / 1e6 for c, rs in own.items()}),
        ("MB up", {c: _total(rs, "bytes_up") / 1e6 for c, rs in own.items()}),
        ("moved", {c: bar(n, most) for c, n in moved.items()}),
        ("compute s, mean", {c: _mean(rs, "compute_seconds") for c, rs in own.items()}),
        ("peak MB", {c: _most(rs, MEMORY) for c, rs in own.items()}),
        ("fixed s, mean", {c: _mean(rs, "fixed_seconds") for c, rs in own.items()}),
        ("upload s, mean", {c: _mean(rs, "upload_seconds") for c, rs in own.items()}),
        ("s per MB (90 %)", {c: _rate(rs) for c, rs in own.items()}),
        ("queue s, mean", {c: _mean(rs, "queue_seconds") for c, rs in own.items()}),
        ("bottleneck", {c: slow.get(c) for c in own}),
        *(
            (f"{s.label}, own rows", {c: tested[c].get(s.name) for c in own if c in tested})
            for s in scores or (LOSS,)
        ),
    ]
    kept = [(t, values) for t, values in columns if any(v is not None for v in values.values())]
    rows = [[values.get(c, Html("") if t == "moved" else None) for t, values in kept]
            for c in clients]  # fmt: skip
    return [title for title, _ in kept], rows


def _total(records: Sequence[ClientRecord], key: str) -> float:
    return sum(numbers(records, key))


def _count(records: Sequence[ClientRecord], status: str) -> int:
    return sum(r.get("status") == status for r in records)


def _mean(records: Sequence[ClientRecord], key: str) -> float | None:
    known = numbers(records, key)
    return float(sum(known) / len(known)) if known else None


def _rate(records: Sequence[ClientRecord]) -> str | None:
    """Return the last known seconds of a megabyte, with their interval."""
    keys = ("mb_seconds", "mb_seconds_low", "mb_seconds_high")
    known = [numbers(records, key) for key in keys]
    if not all(known):
        return None
    value, low, high = (values[-1] for values in known)
    return f"{value:.3g} ({low:.3g}–{high:.3g})"


def _most(records: Sequence[ClientRecord], keys: Sequence[str]) -> float | None:
    known = [value for key in keys for value in numbers(records, key)]
    return max(known, default=None)


def _last(records: Sequence[ClientRecord], key: str) -> int | None:
    known = numbers(records, key)
    return round(known[-1]) if known else None


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"
