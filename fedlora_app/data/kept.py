"""Arrays that are computed from rows once and kept on this machine, for other processes and runs.

The workers of a simulation, and the arms of a study, encode the same rows and draw the same
shares. What one of them computed lies in a file named by a hash of all that it depends on, which
the others read. Only rows of simulations: a site's own rows never leave its files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.models.cache import cache_folder, save_whole

if TYPE_CHECKING:
    from fedlora_app.tasks.base import Inputs, Rows, Task

MOST_BYTES = 4 << 30
"""What is kept at most; the files that were written first go first."""

LIBRARIES = ("numpy", "tokenizers", "transformers", "flwr-datasets", "pillow")
"""Whose version decides, beside our own code, what comes out."""

Arrays = Mapping[str, NDArray[Any]]


def kept(parts: Iterable[object], make: Callable[[], Arrays]) -> Arrays:
    """Return arrays that were computed before, on this machine, or compute and keep them.

    A cache that cannot be read or written costs the time it would have saved, and no more.

    Parameters
    ----------
    parts : iterable of bytes, or what JSON can say
        All that the arrays depend on, but for the code and the libraries it calls.
    make : callable
        Computes them.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = cache_folder() / "rows"
    file = folder / f"{_digest(parts)}.safetensors"
    try:
        found: Arrays = load_file(file)
        return found
    except (OSError, SafetensorError):  # not there yet, or half of it is
        made = make()
    with suppress(OSError, SafetensorError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_whole(file, made)
        _make_room(folder)
    return made


def encoded(task: Task, rows: Rows) -> Inputs:
    """Return ``task.encode(rows)``; from the cache where the task says what it depends on."""
    content = None
    # A subclass may encode otherwise, so what its base says counts for that base alone.
    if task.config.data.cache and "fingerprint" in vars(type(task)):
        with suppress(OSError):  # a file that is gone: ``encode`` says so
            content = task.fingerprint(rows)
    if content is None:
        return task.encode(rows)
    config = task.config
    own = [dataclasses.asdict(part) for part in (config.data, config.model)]
    arrays = kept(["encoded", task.name, own, content], lambda: _pack(task.encode(rows)))
    return task.restored(_unpack(arrays))


def fingerprint(rows: Rows, encoder: str) -> bytes | None:
    """Return what tells these rows and their encoder from any others; see ``Task.fingerprint``.

    Parameters
    ----------
    rows : Rows
        Their items are what JSON can say, or know their own ``state``.
    encoder : str
        The model whose files encode them.
    """
    from fedlora_app.models.pretrained import encoder_state

    files = encoder_state(encoder)
    if files is None:
        return None
    targets = np.asarray(rows.targets).tolist()
    return json.dumps(
        [files, list(rows.items), targets], default=lambda item: item.state()
    ).encode()


def shares_of(task: Task, rows: Rows, num_clients: int) -> list[NDArray[np.int64]]:
    """Return the row numbers of each simulated client; see ``data.partition.shares``.

    Here, and kept, because what shares them out takes two seconds to import.
    """

    def drawn() -> Arrays:
        from fedlora_app.data.partition import shares

        parts = shares(task, rows, num_clients)
        return {"rows": np.concatenate(parts), "sizes": np.array([len(part) for part in parts])}

    config, strata = task.config, task.strata(rows)
    if not config.data.cache:
        found = drawn()
    else:
        groups = None if rows.groups is None else rows.groups.tolist()
        classes = b"" if strata is None else strata.tobytes()
        own = [dataclasses.asdict(config.data), config.seed, num_clients, len(rows)]
        found = kept(["shares", task.name, own, classes, groups], drawn)
    return np.split(found["rows"], np.cumsum(found["sizes"])[:-1])


def _pack(inputs: Any) -> Arrays:
    """Return the fields of a dataclass of arrays, tensors, numbers and lists of arrays."""
    packed: dict[str, NDArray[Any]] = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, list):
            packed[f"{field.name}:list"] = np.concatenate(value) if value else np.zeros(0)
            packed[f"{field.name}:sizes"] = np.array([len(row) for row in value], np.int64)
        elif isinstance(value, np.ndarray):
            packed[f"{field.name}:array"] = value
        elif isinstance(value, int | float):
            packed[f"{field.name}:{type(value).__name__}"] = np.array(value)
        elif value is not None:
            packed[f"{field.name}:tensor"] = value.numpy()
    return packed


def _unpack(arrays: Arrays) -> dict[str, Any]:
    """Return the fields that ``_pack`` took apart."""
    import torch

    values: dict[str, Any] = {}
    for key, array in arrays.items():
        name, _, form = key.partition(":")
        match form:
            case "list":
                ends = np.cumsum(arrays[f"{name}:sizes"])
                values[name] = np.split(array, ends[:-1]) if len(ends) else []
            case "array":
                values[name] = array
            case "int" | "float":
                values[name] = array.item()
            case "tensor":
                values[name] = torch.from_numpy(array)
    return values


def _digest(parts: Iterable[object]) -> str:
    found = hashlib.sha256(_code())
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()


@lru_cache(maxsize=1)
def _code() -> bytes:
    """Return a hash of the code that reads, shares out and encodes, and of what it calls."""
    app = Path(__file__).parents[1]
    found = hashlib.sha256()
    for file in sorted([*app.glob("data/*.py"), *app.glob("tasks/*.py")]):
        found.update(file.read_bytes())
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found.update(f"{library} {metadata.version(library)}".encode())
    return found.digest()


def _make_room(folder: Path) -> None:
    """Remove the oldest files until no more than ``MOST_BYTES`` are left."""
    files = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process makes room too
            about = file.stat()
            files.append((about.st_mtime, about.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)  # who has it mapped keeps it
        total -= size
