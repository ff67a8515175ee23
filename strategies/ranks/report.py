"""An assignment of ranks as a record for listeners and as a table for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from strategies.clients import Client
from strategies.ranks.base import RankPolicy
from strategies.records import RankRecord

#: So many clients have a line in the log; all are in the record.
MOST_LINES = 50


def rank_record(
    policy: RankPolicy, clients: Sequence[Client], ranks: Mapping[int, int], server_round: int
) -> RankRecord:
    """Return who trains which rank and why, as one JSON-able record.

    ``clients`` in it has one entry a client: ``client`` (its index), ``samples``, what the
    policy derived the rank from, and ``rank``.
    """
    why = policy.explain()
    # A policy may know more of some clients than of others; a table has one set of columns.
    columns = list(dict.fromkeys(key for details in why.clients.values() for key in details))
    entries: list[dict[str, Any]] = []
    for client in clients:
        details = why.clients.get(client.index, {})
        entries.append(
            {
                "client": client.index,
                "samples": client.num_examples,
                **{key: details.get(key) for key in columns},
                "rank": ranks[client.node_id],
            }
        )
    return {
        "kind": "ranks",
        "round": server_round,
        "policy": policy.name,
        "weights": dict(why.weights),
        "clients": entries,
        "notes": list(why.notes),
    }


def rank_table(record: RankRecord) -> list[str]:
    """Return the record as lines of text; a policy that explains nothing has no table."""
    entries = record["clients"]
    if not entries or len(entries[0]) <= 3:
        return []
    columns = list(entries[0])
    width = {column: max(7, len(column)) for column in columns}
    lines = [f"ranks by {record['policy']}, round {record['round']}:"]
    lines.append("  ".join(f"{column:>{width[column]}}" for column in columns))
    if record["weights"]:
        cells = [record["weights"].get(column, "") for column in columns]
        cells[0] = "weights"
        lines.append("  ".join(_cell(x, width[c]) for x, c in zip(cells, columns, strict=True)))
    shown = entries[:MOST_LINES]
    lines += ["  ".join(_cell(entry[c], width[c]) for c in columns) for entry in shown]
    if len(entries) > len(shown):
        lines.append(f"… and {len(entries) - len(shown)} clients more")
    return lines


def _cell(value: object, width: int) -> str:
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:>{width}.4f}" if isinstance(value, float) else f"{value!s:>{width}}"
