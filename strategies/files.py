"""Files that are on disk and whole, or as they were before."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a text file, so that afterwards there is the new one or the old one, whole.

    Raises
    ------
    OSError
        If it cannot be written; the file is then as it was.
    """
    new = file.with_name(file.name + ".new")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk, too."""
    if sys.platform == "win32":  # which cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)
