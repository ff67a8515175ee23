"""The files of a run folder: JSON records, one a line, that may end in the middle of one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, overload

from strategies.records import (
    RECORDS_VERSION,
    ClientEvaluationRecord,
    ClientRecord,
    ClockRecord,
    PilotsRecord,
    PlanRecord,
    RankRecord,
    Record,
    RoundRecord,
    SamplesRecord,
    StartRecord,
    WayRecord,
)

Fields = Mapping[str, object]
"""Any record, for readers that look for a key of which the name is not known beforehand."""


class RecordsError(ValueError):
    """A run folder was written by a program that knew more than this one."""


def read_records(file: Path) -> list[Record]:
    """Return the records of a ``metrics.jsonl``; lines that hold none are left out.

    Such a line is the last one of a run that is writing it, or that was ended while it did.
    Records of before they had a version are read; they lack fields that are new.

    Raises
    ------
    RecordsError
        If a field may mean something else than is known here.
    """
    records = parsed(file.read_bytes())
    for start in of_kind(records, "start"):
        if (version := start.get("version", 0)) > RECORDS_VERSION:
            raise RecordsError(
                f"{file}: expected records of version {RECORDS_VERSION} or older, got {version}; "
                "read it with the release of fedlora that wrote it, or a newer one"
            )
    return records


def parsed(data: bytes) -> list[Record]:
    """Return the records of whole lines; lines that hold none are left out."""
    found: list[Record] = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not even text
            continue
        if isinstance(record, dict) and "kind" in record:
            found.append(cast(Record, record))
    return found


def write_lines(file: Path, records: Iterable[Record]) -> None:
    """Write ``metrics.jsonl`` anew: afterwards there is the new file or the old one, whole."""
    _replace(file, "".join(line_of(record) for record in records))


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read: the new one or the old one, whole."""
    _replace(file, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where there is no such file."""
    if not file.exists():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def line_of(record: Fields) -> str:
    """Return one record as its line of ``metrics.jsonl``."""
    return json.dumps(plain(record)) + "\n"


def plain(value: Any) -> Any:
    """Return the value with NaN and Inf, which JSON does not have, as null at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def rounded(seconds: float | None) -> float | None:
    """Return seconds with as many digits as mean something, whatever their size."""
    return None if seconds is None else float(f"{seconds:.6g}")


@overload
def of_kind(records: Iterable[Record], kind: Literal["round"]) -> list[RoundRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["client"]) -> list[ClientRecord]: ...
@overload
def of_kind(
    records: Iterable[Record], kind: Literal["client-evaluation"]
) -> list[ClientEvaluationRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["plan"]) -> list[PlanRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["way"]) -> list[WayRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["pilots"]) -> list[PilotsRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["ranks"]) -> list[RankRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["clock"]) -> list[ClockRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["samples"]) -> list[SamplesRecord]: ...
@overload
def of_kind(records: Iterable[Record], kind: Literal["start"]) -> list[StartRecord]: ...
def of_kind(records: Iterable[Record], kind: str) -> list[Any]:
    """Return the records of one kind, in order."""
    return [r for r in records if r["kind"] == kind]


def numbers(records: Iterable[Fields], key: str) -> list[float]:
    """Return the values of a field, of the records that have a number there."""
    return [v for r in records if isinstance(v := r.get(key), int | float)]


def plan_periods(records: Iterable[Record]) -> list[tuple[PlanRecord, list[float]]]:
    """Return every plan with the clock's seconds of the rounds that followed it."""
    periods: list[tuple[PlanRecord, list[float]]] = []
    for record in records:
        if record["kind"] == "plan":
            periods.append((record, []))
        elif record["kind"] == "round" and periods and record.get("planned_seconds"):
            periods[-1][1].append(record.get("clock_seconds") or 0.0)
    return [(plan, seconds) for plan, seconds in periods if seconds]


def _replace(file: Path, text: str) -> None:
    from strategies.files import replace_text  # torch comes with it, and readers need none

    replace_text(file, text)
