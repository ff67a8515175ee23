"""The part of a run's page about what the model makes of some rows, before the run and after."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_app.report.html import number, table
from fedlora_app.report.records import of_kind
from strategies.records import Record


def section(records: Sequence[Record]) -> str:
    """Return a table: what was asked and wanted, what came first and last; nothing without any."""
    kept = of_kind(records, "samples")
    if not kept:
        return ""
    first, last = kept[0], kept[-1]
    shown = [first] if first["round"] == last["round"] else [first, last]
    head = ["asked", "wanted", *(f"after round {record['round']}" for record in shown)]
    rows = []
    for i, sample in enumerate(first["samples"]):
        came = [record["samples"][i] for record in shown if i < len(record["samples"])]
        given = [f"{one['given']} [{number(one['score'])}]" for one in came]
        rows.append([sample["asked"], sample["wanted"], *given])
    return table(head, rows)
