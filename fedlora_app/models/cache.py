"""What is made once and kept on this machine: where, and how models are."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cache_folder() -> Path:
    """Return ``$FEDLORA_CACHE``, by default ``~/.cache/fedlora``; it may not be there yet."""
    return Path(os.environ.get("FEDLORA_CACHE") or "~/.cache/fedlora").expanduser()


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder of a model in ``$FEDLORA_CACHE``, made if it is not there yet.

    Several processes may ask at once: one makes it, the others wait. The folder appears by one
    rename, when it is complete.

    Parameters
    ----------
    name : str
        Of the folder, with the version of what is in it.
    make : callable
        Fills the folder it is given, which it makes.

    Raises
    ------
    OSError
        If the cache (by default ``~/.cache/fedlora``) cannot be written.
    """
    cache = cache_folder()
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            new = cache / f"{name}.new"
            shutil.rmtree(new, ignore_errors=True)
            make(new)
            new.rename(folder)
    return folder


def save_whole(
    file: Path, arrays: Mapping[str, NDArray[Any]], about: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, for this user's eyes alone, that appears when it is complete.

    Parameters
    ----------
    file : Path
        In a folder that is there.
    arrays : Mapping[str, ndarray]
        At least one.
    about : dict of str, optional
        Its metadata.

    Raises
    ------
    OSError or safetensors.SafetensorError
        If it cannot be written; then nothing is left.
    """
    from safetensors.numpy import save_file

    number, new = tempfile.mkstemp(dir=file.parent)
    os.close(number)
    try:
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, new, about)
        os.replace(new, file)
    finally:
        Path(new).unlink(missing_ok=True)
