"""Whether a run may write to a folder; nothing is created to find out."""

from __future__ import annotations

import os
from pathlib import Path

from fedlora_app.config.keys import ConfigError


def refuse_used(folder: Path, *, resumed: bool = False) -> None:
    """Refuse a folder that already holds a run, or that cannot be written to.

    Raises
    ------
    ConfigError
    """
    if problems := output_problems(folder, resumed=resumed):
        raise ConfigError(problems)


def output_problems(folder: Path, *, resumed: bool) -> list[str]:
    """Return why a run cannot write to ``folder``; nothing is created."""
    if not resumed and used(folder):
        return [f"output: {folder} already holds a run; name another folder or remove it"]
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return [f"output: {there} is a file, and no folder can be made of it; name another folder"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"output: {there} cannot be written to; name another folder"]
    return []


def used(folder: Path) -> bool:
    """Return whether a folder holds a run or its checkpoints."""
    return (folder / "metrics.jsonl").exists() or any(folder.glob("checkpoints/round-*"))
