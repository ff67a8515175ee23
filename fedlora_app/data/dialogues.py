"""Conversations as the package chatterbot-corpus keeps them: YAML files, one for each topic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROLES = ("user", "assistant")  # who speaks in turn


def dialogues(folder: Path) -> tuple[dict[str, list[Any]], dict[Path, list[int]], int]:
    """Return the conversations of a folder once each, as ``messages`` and ``category``.

    Returns
    -------
    columns : dict
        ``messages``, and ``category``: the name of the file.
    places : dict
        By file, the numbers in it of the conversations, from 1.
    again : int
        How many were left out, since they had come before.
    """
    columns: dict[str, list[Any]] = {"messages": [], "category": []}
    places: dict[Path, list[int]] = {}
    seen: set[tuple[str, ...]] = set()
    count = 0
    for file, number, turns in _read(folder):
        count += 1
        if turns in seen:
            continue
        seen.add(turns)
        columns["messages"].append(
            [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(turns)]
        )
        columns["category"].append(file.stem)
        places.setdefault(file, []).append(number)
    return columns, places, count - len(seen)


def _read(folder: Path) -> Iterator[tuple[Path, int, tuple[str, ...]]]:
    import yaml  # type: ignore[import-untyped]  # of transformers

    for file in sorted(folder.glob("*.yml")):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        for number, turns in enumerate(found, start=1):
            yield file, number, tuple(str(text).strip() for text in turns)
