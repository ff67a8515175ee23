"""Who was busy when, and how old the model was that a reply was trained from: a Gantt picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from fedlora_app.report.charts import _figure, bar_chart, ticks
from fedlora_app.report.records import of_kind
from strategies.records import ClientRecord, Record

MOST_ROWS = 60  # of more clients, those that were asked most often
MOST_SPANS = 4000
WIDTH, HIGH, LEFT = 920.0, 12.0, 62.0
KEYS = {"in time": "s1", "trained from an older model": "s2", "did not count": "bad"}


def section(records: Sequence[Record]) -> str:
    """Return the pictures of a run whose rounds do not wait for everybody; else nothing."""
    spans = [r for r in of_kind(records, "client") if r.get("began") is not None]
    spans = [r for r in spans if r.get("ended") is not None][-MOST_SPANS:]
    if not spans:
        return ""
    return f"<div class=charts>{_gantt(spans)}{_staleness(spans)}</div>"


def _gantt(spans: Sequence[ClientRecord]) -> str:
    """Draw a row for each client, with a bar for each order from its start to its end."""
    often = Counter(r["client"] for r in spans).most_common(MOST_ROWS)
    rows = {client: i for i, client in enumerate(sorted(client for client, _ in often))}
    end = max(r["ended"] or 0.0 for r in spans) or 1.0
    scale = (WIDTH - LEFT - 12) / end
    body = []
    for r in spans:
        if r["client"] not in rows:
            continue
        began, ended = r["began"] or 0.0, r["ended"] or 0.0
        stale, good = r.get("staleness", 0), r["status"] == "ok"
        colour = ("s2" if stale else "s1") if good else "bad"
        tip = f"client {r['client']}: {began:.4g} to {ended:.4g} s, asked in round {r['asked']}"
        tip += f", {stale} rounds late" if stale else ""
        y = 4 + HIGH * rows[r["client"]]
        body.append(
            f'<rect class="bar {colour}" x="{LEFT + began * scale:.1f}" y="{y:.1f}" '
            f'width="{max((ended - began) * scale - 0.6, 0.6):.1f}" height="{HIGH - 3:.1f}">'
            f"<title>{escape(tip)}</title></rect>"
        )
    bottom = 4 + HIGH * len(rows)
    body += [
        f'<text x="{LEFT - 5:.1f}" y="{4 + HIGH * (i + 0.5):.1f}" class="end mid">client {c}</text>'
        for c, i in rows.items()
    ]
    body += [
        f'<text x="{LEFT + t * scale:.1f}" y="{bottom + 13:.1f}" class="centre">{t:g}</text>'
        for t in ticks(0.0, end, 8)
    ]
    return _figure(
        "Who was busy when, in seconds of the run's clock", KEYS, body,
        width=WIDTH, height=bottom + 20, natural=True,
    )  # fmt: skip


def _staleness(spans: Sequence[ClientRecord]) -> str:
    """Draw how many replies were how many rounds late."""
    counts = Counter(r.get("staleness", 0) for r in spans if r["status"] == "ok")
    bars = [
        (late, float(n), "s2" if late else "s1", f"{n} replies, {late} rounds late")
        for late, n in sorted(counts.items())
    ]
    return bar_chart("Replies by how late they were", "rounds late", bars, (), {})
