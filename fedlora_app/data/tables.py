"""Read labelled data into columns: packaged, local, saved or from the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora_app.data import packaged
from fedlora_app.data.delimited import Delimited, read_jsonl, refuse_foreign
from fedlora_app.data.dialogues import dialogues
from fedlora_app.discretion import DataError, NoDataError

TEST_SPLITS = ("test", "validation", "valid", "dev")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# train.csv, or a shard as the Hugging Face Hub names it: train-00000-of-00002.parquet
FILE = re.compile(rf"({'|'.join(('train', *TEST_SPLITS))})(?:-(\d+)-of-(\d+)(?:-[0-9a-f]+)?)?")


@dataclass(frozen=True)
class Part:
    """The rows of one file: where each begins."""

    path: Path | str
    unit: str  # line or row
    numbers: Sequence[int | str]


@dataclass(frozen=True)
class Table:
    """Columns as they were read, the class names of columns that declare them, and whence."""

    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()

    def place(self, row: int | None) -> tuple[Path | str, str]:
        """Return the file of a row and where in it, or of the table as a whole."""
        if row is not None:
            for part in self.parts:
                if row < len(part.numbers):
                    return part.path, f"{part.unit} {part.numbers[row]}"
                row -= len(part.numbers)
        paths = [part.path for part in self.parts]
        return (paths[0] if paths else "the data"), ""


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
    files = [*path.iterdir(), *(path / "data").glob("*")] if path.is_dir() else [path]
    return _read_cached(path, tuple(sorted((str(f), f.stat().st_mtime_ns) for f in files)))


@lru_cache(maxsize=4)
def _read_cached(path: Path, modified: tuple[tuple[str, int], ...]) -> dict[str, Table]:
    """Read once per process; ``modified`` makes a changed file a new key."""
    return read_local(path)


@lru_cache(maxsize=4)
def _read_remote(name: str) -> dict[str, Table]:
    if name.startswith(packaged.PREFIX):
        # Orange's format: names, types and roles of the columns before the rows.
        files = packaged.dataset_files(name)
        if all(file.suffix == ".jsonl" for file in files.values()):
            return {split: _read_file(file) for split, file in files.items()}
        if files["train"].is_dir():
            return {"train": _dialogues(files["train"])}
        return {split: _delimited(file, "\t", skip=2) for split, file in files.items()}
    if name.startswith((".", "/", "~")) or Path(name).suffix in SUFFIXES:
        raise NoDataError(Path(name).absolute(), "data.name: expected data here: not there")
    import datasets

    repository, _, subset = name.partition(":")
    try:
        return _tables(datasets.load_dataset(repository, subset or None), name)
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
        return _read_saved(path)
    # A copy of a hub's data set keeps its files in data/.
    places = [found for f in (path, path / "data") if f.is_dir() and (found := _files(f))]
    if len(places) > 1:
        files = [file for found in places for files in found.values() for file in files]
        raise DataError(
            path,
            "expected all splits in one place",
            ", ".join(file.relative_to(path).as_posix() for file in files[:8]),
            "move them together, or name the folder that is meant",
        )
    for found in places:
        return {split: _joined([_read_file(f) for f in files]) for split, files in found.items()}
    held = sorted(f.name for f in path.iterdir())
    raise NoDataError(
        path.absolute(),
        "expected train.csv, .tsv, .jsonl or .parquet, or a saved data set, here or in data/",
        ", ".join(held[:8]) + (", …" if len(held) > 8 else "") or "an empty folder",
        "rename the files, or name the file or folder with the rows itself; or set another task",
    )


def _files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split in a folder, shards in their order."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        match = FILE.fullmatch(file.stem.lower())
        if match and file.suffix.lower() in SUFFIXES and file.is_file():
            found.setdefault(match[1], []).append(file)
    for split, files in found.items():
        matches = [FILE.fullmatch(file.stem.lower()) for file in files]
        numbers = [(m[2], m[3]) for m in matches if m]
        suffixes = {file.suffix.lower() for file in files}
        whole = numbers == [(None, None)]
        shards = [int(n) for n, _ in numbers if n]
        complete = all(of and int(of) == len(files) for _, of in numbers)
        if not whole and not (complete and len(suffixes) == 1 and shards == [*range(len(files))]):
            names = ", ".join(file.name for file in files[:8])
            raise DataError(
                folder,
                "expected one file, or all shards of one, for each split",
                f"{names} for {split}",
                "remove what is superfluous, or add the missing shards",
            )
    return found


def _joined(tables: list[Table]) -> Table:
    first = tables[0]
    for other in tables[1:]:
        if list(other.columns) != list(first.columns) or other.class_names != first.class_names:
            raise DataError(
                other.place(None)[0],
                "expected the columns and class names of the first shard",
                ", ".join(other.columns),
                "write all shards alike",
            )
    if len(tables) == 1:
        return first
    columns = {name: [v for table in tables for v in table.columns[name]] for name in first.columns}
    return Table(columns, first.class_names, tuple(p for t in tables for p in t.parts), first.notes)


def _read_file(path: Path) -> Table:
    match path.suffix.lower():
        case ".csv":
            return _delimited(path, ",")
        case ".tsv":
            return _delimited(path, "\t")
        case ".jsonl":
            columns, lines = read_jsonl(path)
            return Table(columns, parts=(Part(path, "line", lines),))
        case ".parquet":
            return _read_parquet(path)
        case other:
            packed = other in (".gz", ".bz2", ".xz", ".zst", ".zip")
            raise DataError(
                path,
                f"expected a file {', '.join(SUFFIXES)}",
                repr(other),
                "unpack it" if packed else "save it as one of these",
            )


def _dialogues(folder: Path) -> Table:
    columns, places, again = dialogues(folder)
    parts = tuple(Part(path, "conversation", numbers) for path, numbers in places.items())
    notes = (f"{again} conversations that had come before: left out",) if again else ()
    return Table(columns, parts=parts, notes=notes)


def _delimited(path: Path, delimiter: str, skip: int = 0) -> Table:
    read = Delimited(path, delimiter, skip=skip, strict=not skip)
    part = Part(path, "line", read.lines)
    return Table(read.columns(), parts=(part,), notes=tuple(read.notes))


def _read_parquet(path: Path) -> Table:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    refuse_foreign(path, own=b"PAR1")
    try:
        # Not read_table, which takes columns from folders called key=value as well.
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise DataError(
                    path, "expected columns of different names", f"{twice!r} twice", "rename one"
                )
            table = file.read()
    except DataError:
        raise
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(
            path, "expected a parquet file", str(error), "is it cut off? fetch it again"
        ) from error
    # Where `datasets` wrote the file, it left the names of the classes.
    try:
        stored = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features", {})
        declared = {
            name: tuple(f["names"])
            for name, f in features.items()
            if f.get("_type") == "ClassLabel"
        }
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(
            path,
            "expected what `datasets` writes about columns in a parquet file, under 'huggingface'",
            repr(error),
            "write the file again, with or without it",
        ) from error
    return Table(
        {name: table.column(name).to_pylist() for name in names},
        declared,
        (Part(path, "row", range(1, len(table) + 1)),),
    )


def _read_saved(path: Path) -> dict[str, Table]:
    import datasets

    for file in path.rglob("*.arrow"):
        refuse_foreign(file)
    try:
        return _tables(datasets.load_from_disk(str(path)), str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            path, "expected a data set that Dataset.save_to_disk wrote", str(error), "save it again"
        ) from error


def _tables(loaded: Any, name: str) -> dict[str, Table]:
    """Take the columns out of a ``datasets.Dataset`` or ``DatasetDict``."""
    import datasets

    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    for split, dataset in splits.items():
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):  # bytes, until somebody looks at them
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        splits = {**splits, split: dataset}
    return {
        split: Table(
            {column: dataset[column] for column in dataset.column_names},
            {
                column: tuple(feature.names)
                for column, feature in dataset.features.items()
                if hasattr(feature, "names")
            },
            (Part(name, f"{split} row", range(1, len(dataset) + 1)),),
        )
        for split, dataset in splits.items()
    }
