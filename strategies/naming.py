"""Find things by their registered name, and say which names there are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def named(registry: Mapping[str, T], name: str) -> T:
    """Return what is registered as ``name``.

    Raises
    ------
    ValueError
        If nothing is; the message lists the names and suggests the nearest.
    """
    if name not in registry:
        close = difflib.get_close_matches(name, list(registry), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"expected one of {', '.join(registry)}; got {name!r}{hint}")
    return registry[name]
