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
# What a file of another kind begins with, its name, and what to do.
FOREIGN = {
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"BZh91AY": ("a bzip2 archive", "unpack it"),
    b"\xfd7zXZ": ("an xz archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save it as csv in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an Excel file", "save it as csv in UTF-8"),
    b"PAR1": ("a parquet file", "name it .parquet"),
    b"<!doctype html": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}
MARKS = {  # the byte orders of other encodings, the longer ones first
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
DELIMITERS = ",;\t|"
QUOTED = re.compile(r'"[^"]*"')
LINE_END = re.compile(r"\r\n|\r|\n")  # as the csv module counts lines
FEW = 10  # whole rows; with fewer there is little to compare a doubtful line with
Lines = list[int]


def refuse_foreign(path: Path, own: bytes = b"") -> None:
    """Raise DataError if a file is a Git LFS pointer or begins as a file of another kind.

    Parameters
    ----------
    path : Path
    own : bytes, optional
        What a file of the kind that is wanted begins with.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise DataError(
            path, "expected a file that can be read", error.strerror or "", "see to its permissions"
        ) from error
    if start.startswith(POINTER):
        raise DataError(
            path,
            "expected data, but this is a Git LFS pointer to them",
            remedy="run `git lfs pull` there, or download the file itself",
        )
    for sign, (kind, remedy) in FOREIGN.items():
        if sign != own and (start.lower() if sign[:1] == b"<" else start).startswith(sign):
            raise DataError(path, f"expected rows, but this is {kind}", remedy=remedy)


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises
    ------
    DataError
        If it is not UTF-8, holds NUL bytes, or is a file of another kind.
    """
    refuse_foreign(path)
    raw = path.read_bytes()
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            raise DataError(
                path, f"expected UTF-8, but this is {encoding}", remedy="save it as UTF-8"
            )
    try:
        text = raw.decode("utf-8-sig").lstrip("\ufeff")  # some tools write the mark twice
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
        first = next(line for line in LINE_END.split(self.text) if line.strip())
        if re.fullmatch(r"sep=.", first):
            raise DataError(
                self.path, "expected a header, but this names the delimiter, for Excel alone", "",
                "remove the line", "line 1",
            )  # fmt: skip
        bare = QUOTED.sub("", first)  # a delimiter in quotes is none
        if wanted in bare:
            return wanted
        other = max(DELIMITERS, key=bare.count)
        if not bare.count(other):
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
                header = next((row for row in reader if _said(row)), [])
                begun = reader.line_num + 1
                for number, row in enumerate(reader):
                    if number >= skip and (_said(row) or (row and len(header) == 1)):
                        self._refuse_row(row, header, f"line {begun}")
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

    def _refuse_row(self, row: list[str], header: list[str], line: str) -> None:
        """Refuse a row of another length than the header, and the header once more."""
        if len(row) != len(header):
            other = [d for d in DELIMITERS if d != self.delimiter and d in "".join(header)]
            remedy = f"quote fields that contain the delimiter, {self.delimiter!r}"
            if other:
                remedy += f", or quote names in the header that do, if it is {other[0]!r}"
            raise DataError(
                self.path, f"expected {len(header)} columns as in the header, got {len(row)}", "",
                remedy, line,
            )  # fmt: skip
        if len(row) > 1 and row == header:
            raise DataError(
                self.path, "expected a row, but this is the header once more", "",
                "remove it: were files put together?", line,
            )  # fmt: skip

    def _refuse_swallowed(self, header: list[str]) -> None:
        """Refuse a quoted field if each of its lines looks like a row of its own."""
        several = [i for i, row in enumerate(self.rows) if any("\n" in f or "\r" in f for f in row)]
        if not several or len(header) < 2:
            return
        # The lines of prose in quotes seldom all have as many delimiters as a row does.
        text = LINE_END.split(self.text)
        begins = [*self.lines, len(text) + 1]
        lone = [self.rows[i] for i in set(range(len(self.rows))) - set(several)]
        # What also stands in whole rows, such as a label, tells a row from a line of prose.
        known = [{row[c].strip() for row in lone} - {""} for c in range(len(header))]

        def has_known(parts: list[str]) -> bool:
            return any(p.strip(' "') in k for p, k in zip(parts, known, strict=True))

        def like_rows(lines: list[str]) -> bool:
            parts = [line.split(self.delimiter) for line in lines]
            if any(len(part) != len(header) for part in parts):
                return False
            if self.delimiter == "\t" or 2 * sum(map(has_known, parts)) > len(parts):
                return True
            return len(lone) < FEW and not any(p.startswith(" ") for part in parts for p in part)

        for i in several:
            lines = [line for line in text[begins[i] - 1 : begins[i + 1] - 1] if line]
            if like_rows(lines):
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


def _said(row: list[str]) -> bool:
    """Tell whether a line says anything; a file may have empty ones."""
    return len(row) > 1 or any(field.strip() for field in row)


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
