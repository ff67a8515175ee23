"""The format of one checkpoint: a folder that appears whole or not at all.

::

    round-000012/
        model.safetensors   every array
        state.json          format, round, score, fingerprint, and everything else
        SHA256SUMS          of both; `sha256sum -c SHA256SUMS` checks them as well

JSON has no NaN and no infinity; they are written as ``{"$float": "nan"}``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from strategies.files import sync_folder

FORMAT = 1
MODEL, STATE, SUMS = "model.safetensors", "state.json", "SHA256SUMS"
TEMPORARY = ".tmp"  # end of the name of what is being written or removed
FLOAT = "$float"
ROUND = re.compile(r"round-(\d{6,})")
_SUMS = re.compile(r"([0-9a-f]{64}  [A-Za-z0-9_][\w.-]*\n)+")

#: How names of arrays begin that are not of the model: of one put aside, of the server optimiser,
#: and of earlier models from which clients are still training.
ASIDE, MOMENTS, EARLIER = "aside.", "moments.", "earlier."

Scalar = str | int | float | bool | None


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified.

    Parameters
    ----------
    round : int
        The last round that is in it.
    arrays : dict of str to Tensor
        In the order they were saved.
    state : dict
        Everything else; tuples have become lists.
    fingerprint : dict of str to scalar
        The settings of the run that wrote it.
    path : Path
    metric : str (default: "")
        What ``score`` is, as in ``Checkpoints(best=…)``.
    score : float, optional
    saved : str (default: "")
        UTC time, ISO 8601.
    """

    round: int
    arrays: dict[str, Tensor]
    state: dict[str, Any]
    fingerprint: dict[str, Scalar]
    path: Path
    metric: str = ""
    score: float | None = None
    saved: str = ""

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays whose names begin so, by the rest of their names."""
        found = self.arrays.items()
        return {key.removeprefix(prefix): t for key, t in found if key.startswith(prefix)}

    @property
    def model(self) -> dict[str, Tensor]:
        """The arrays of the model alone."""
        return {k: t for k, t in self.arrays.items() if not k.startswith((ASIDE, MOMENTS, EARLIER))}


def folder_name(server_round: int) -> str:
    """Return what the checkpoint of a round is called."""
    return f"round-{server_round:06d}"


def rounds_in(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in ``folder`` by round, ascending, good or not."""
    if not folder.is_dir():
        return {}
    folders = [path for path in folder.iterdir() if path.is_dir()]
    found = {int(m[1]): path for path in folders if (m := ROUND.fullmatch(path.name))}
    return dict(sorted(found.items()))


def content(
    server_round: int,
    arrays: Mapping[str, Tensor],
    state: Mapping[str, Any],
    fingerprint: Mapping[str, Scalar],
    *,
    metric: str = "",
    score: float | None = None,
) -> dict[str, bytes]:
    """Return the files of a checkpoint by name, in the order to write them.

    Raises
    ------
    TypeError
        If something in it would not come back as it is.
    """
    header = {
        "format": FORMAT,
        "round": server_round,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "metric": metric,
        "score": _plain(score, "score"),
        "tensors": list(arrays),  # safetensors keeps no order
        "fingerprint": _plain(fingerprint, "fingerprint"),
        "state": _plain(state, "state"),
    }
    # Copies, as safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in arrays.items()}
    try:
        model = pack(copies)
    except (SafetensorError, KeyError, ValueError) as error:
        types = sorted({str(tensor.dtype) for tensor in arrays.values()})
        raise TypeError(f"safetensors cannot hold these arrays ({', '.join(types)})") from error
    files = {MODEL: model, STATE: json.dumps(header, allow_nan=False).encode()}
    sums = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    return {**files, SUMS: "".join(sums).encode()}


def write(target: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder ``target``, on disk and whole, or not at all.

    Raises
    ------
    OSError
        If the disk is full, or fails; nothing is left behind then.
    """
    temporary = target.with_name(target.name + TEMPORARY)
    try:
        temporary.mkdir()
        for name, data in files.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(temporary)
        os.rename(temporary, target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint so that half of it is never taken for one."""
    gone = path.with_name(path.name + TEMPORARY)
    os.rename(path, gone)
    shutil.rmtree(gone)


def read(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every byte of it.

    Raises
    ------
    DamagedError
        If something is missing or differs from its checksum.
    CheckpointError
        If it is of a newer format.
    """
    try:
        sums = (path / SUMS).read_bytes().decode("ascii", errors="replace")
        if not _SUMS.fullmatch(sums):
            raise DamagedError(f"{SUMS} cannot be read")
        files = {}
        for line in sums.splitlines():
            digest, name = line.split("  ")
            files[name] = (path / name).read_bytes()
            if hashlib.sha256(files[name]).hexdigest() != digest:
                size = len(files[name])
                raise DamagedError(f"{name} ({size} bytes) does not match its checksum")
    except OSError as error:
        raise DamagedError(str(error)) from error
    if STATE not in files:
        raise DamagedError(f"{SUMS} does not name {STATE}")
    header = json.loads(files[STATE], object_hook=_restore)
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']}, this version reads up to {FORMAT}; resume "
            "with the version of this project that wrote it, or a later one"
        )
    if MODEL not in files:
        raise DamagedError(f"{SUMS} does not name {MODEL}")
    named = ROUND.fullmatch(path.name)
    if named and int(named[1]) != header["round"]:
        raise DamagedError(f"it holds round {header['round']}, which its name does not say")
    arrays = unpack(files[MODEL])
    return Checkpoint(
        round=header["round"],
        arrays={name: arrays[name] for name in header["tensors"]},
        state=header["state"],
        fingerprint=header["fingerprint"],
        path=path,
        metric=header["metric"],
        score=header["score"],
        saved=header["saved"],
    )


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` as strict JSON can hold it; ``_restore`` is the inverse."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else {FLOAT: str(number)}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"{where} has the key {key!r} ({type(key).__name__}); JSON would give it back "
                    "as a string: write str(key), and read it back"
                )
            if key == FLOAT:
                raise TypeError(f"{where} has the key {FLOAT!r}, which stands for NaN and infinity")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    hint = "put it in the arrays" if isinstance(value, Tensor) else "write it as numbers and lists"
    if isinstance(value, np.ndarray):
        hint = "write .tolist()"
    raise TypeError(
        f"{where} is {type(value).__name__}; a checkpoint holds None, bool, int, float, str, lists "
        f"and mappings of them: {hint}"
    )


def _restore(mapping: dict[str, Any]) -> Any:
    return float(mapping[FLOAT]) if FLOAT in mapping else mapping
