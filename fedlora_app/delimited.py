"""Text files of rows: decoding, csv and tsv, jsonl. Every error names file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora_app.discretion import DataError

POINTER = b"version https://git-lfs.github.com/spec/"
DELIMITERS = ",;\t|"
LINE_END = re.compile(r"\r\n|\r|\n")  # as the csv module counts lines
FEW = 10  # whole rows; with fewer there is little to compare a doubtful line with
Lines = list[int]


def refuse_pointer(path: Path) -> None:
    """Raise DataError if Git LFS left a pointer where the file should be."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise DataError(
            path, "expected a file that can be read", error.strerror or "", "see to its permissions"
        ) from error
    if start == POINTER:
        raise DataError(
            path,
            "expected data, but this is a Git LFS pointer to them",
            remedy="run `git lfs pull` there, or download the file itself",
        )


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises
    ------
    DataError
        If it is not UTF-8, holds NUL bytes, or is a Git LFS pointer.
    """
    refuse_pointer(path)
    raw = path.read_bytes()
    try:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(path, "expected UTF-8, but this is UTF-16", remedy="save it as UTF-8")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its position counts from behind a byte order mark.
        line = _line_at(error.object, error.start)
        raise DataError(
            path, "expected UTF-8", f"byte 0x{error.object[error.start]:02x}", "save it as UTF-8",
            f"line {line}",
        ) from error  # fmt: skip
    if (at := text.find("\0")) >= 0:
        line = text[:at].count("\n") + 1
        raise DataError(
            path, "expected text, but there is a NUL byte", "", "save it as UTF-8", f"line {line}"
        )
    return text


def _line_at(raw: bytes, position: int) -> int:
    before = raw[:position].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return before.count(b"\n") + 1


class Delimited:
    """A csv or tsv file, read.

    Parameters
    ----------
    path : Path
    delimiter : str
        What should be between the columns. If the header has but one column with it, and
        several with another of ``DELIMITERS``, that is taken.
    skip : int
        Lines below the header that are no rows (default: 0).
    strict : bool
        Refuse quotes that are not closed where a field ends (default: True).
    """

    def __init__(self, path: Path, delimiter: str, *, skip: int = 0, strict: bool = True) -> None:
        self.path = path
        self.text = read_text(path)
        self.notes: list[str] = []
        if not self.text.strip():
            raise DataError(path, "expected a header and rows, but the file is empty")
        self.delimiter = self._delimiter(delimiter)
        try:
            header, self.rows, self.lines = self._read(csv.QUOTE_MINIMAL, skip, strict)
            if strict:
                self._refuse_swallowed(header)
        except DataError:
            if self.delimiter != "\t" or not strict:
                raise
            # Many tab-separated files know no quoting: a quote in them is a character.
            try:
                header, self.rows, self.lines = self._read(csv.QUOTE_NONE, skip, strict)
            except DataError:
                header = []
            if not header:
                raise
            self.notes.append("read without quoting")
        self.header = self._names(header)

    def columns(self) -> dict[str, Sequence[str]]:
        """Return the columns that have a name."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return {n: column for n, column in zip(self.header, columns, strict=True) if n}

    def _delimiter(self, wanted: str) -> str:
        header = next(csv.reader(io.StringIO(self.text, newline="")), [])
        first = self.text.splitlines()[0] if header is not None else ""
        if wanted in first:
            return wanted
        other = max(DELIMITERS, key=first.count)
        if not first.count(other):
            return wanted
        self.notes.append(f"separated by {other!r}")
        return other

    def _read(
        self, quoting: Any, skip: int, strict: bool
    ) -> tuple[list[str], list[list[str]], Lines]:
        rows: list[list[str]] = []
        lines: Lines = []
        begun = 1
        with _long_fields():
            reader = csv.reader(
                io.StringIO(self.text, newline=""),
                delimiter=self.delimiter, quoting=quoting, strict=strict,
            )  # fmt: skip
            try:
                header = next(reader, [])
                begun = reader.line_num + 1
                for number, row in enumerate(reader):
                    if number >= skip and row:
                        if len(row) != len(header):
                            raise DataError(
                                self.path,
                                f"expected {len(header)} columns as in the header, got {len(row)}",
                                "",
                                "quote fields that contain the delimiter",
                                f"line {begun}",
                            )
                        rows.append(row)
                        lines.append(begun)
                    begun = reader.line_num + 1
            except csv.Error as error:
                raise DataError(
                    self.path,
                    "a quote that opens a field here is not closed where a field ends",
                    str(error),
                    'close it, or write each quote within a quoted field twice ("")',
                    f"line {begun}",
                ) from error
        return header, rows, lines

    def _refuse_swallowed(self, header: list[str]) -> None:
        """Refuse a quoted field if each of its lines looks like a row of its own."""
        several = [i for i, row in enumerate(self.rows) if any("\n" in f or "\r" in f for f in row)]
        if not several or len(header) < 2:
            return
        text = LINE_END.split(self.text)
        begins = [*self.lines, len(text) + 1]
        lone = [self.rows[i] for i in set(range(len(self.rows))) - set(several)]
        # What also stands in whole rows, such as a label, tells a row from a line of prose.
        known = [{row[c].strip() for row in lone} - {""} for c in range(len(header))]

        def like_a_row(line: str) -> bool:
            parts = line.split(self.delimiter)
            if len(parts) != len(header):
                return False
            if self.delimiter == "\t" or any(
                p.strip(' "') in k for p, k in zip(parts, known, strict=True)
            ):
                return True
            return len(lone) < FEW and not any(part.startswith(" ") for part in parts)

        for i in several:
            lines = [line for line in text[begins[i] - 1 : begins[i + 1] - 1] if line]
            if all(map(like_a_row, lines)):
                raise DataError(
                    self.path,
                    "a quoted field that begins here holds lines that look like rows",
                    repr(lines[-1][:60]),
                    'close the quote, or write it twice ("") within quotes',
                    f"line {self.lines[i]}",
                )

    def _names(self, header: list[str]) -> list[str]:
        names = [name.strip() for name in header]
        twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
        if twice:
            raise DataError(
                self.path, "expected columns of different names", f"{twice[0]!r} twice",
                "rename one", "line 1",
            )  # fmt: skip
        for column, name in enumerate(names):
            if not name and any(row[column].strip() for row in self.rows):
                self.notes.append(f"column {column + 1} has no name: left")
        return names


@contextmanager
def _long_fields() -> Iterator[None]:
    previous = csv.field_size_limit(2**31 - 1)  # the largest that every platform takes
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def read_jsonl(path: Path) -> tuple[dict[str, Sequence[Any]], Lines]:
    """Return the columns of a file of JSON objects, one a line, and the line of each row."""
    rows: list[dict[str, Any]] = []
    lines: Lines = []
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except _TwiceError as error:
            raise DataError(
                path, "expected each name once in an object", f"{error} twice", "remove one", where
            ) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                path, "expected JSON", str(error), "one object a line; is the file cut off?", where
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                path, "expected a JSON object", repr(line[:60]), "write one object a line", where
            )
        rows.append(row)
        lines.append(number)
    if not rows:
        raise DataError(path, "expected rows, but the file is empty")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, lines


class _TwiceError(Exception):
    """A name stands twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return made
