"""Give things a name, find them by it, and say which names there are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, Protocol, TypeVar


class Named(Protocol):
    """A class that says by which name it is found."""

    name: ClassVar[str]


T = TypeVar("T")


def add_named(registry: MutableMapping[str, Any], cls: type[Named]) -> None:
    """Register a class by its ``name``.

    A class defined anew, as when its module is loaded again, takes the place of the old one.

    Raises
    ------
    ValueError
        If it has no name, or another class has it.
    """
    if not cls.name:
        raise ValueError(f"{cls.__qualname__}: expected a name to register it by, got none")
    taken = registry.get(cls.name)
    if taken is not None and _full_name(taken) != _full_name(cls):
        raise ValueError(
            f"{_full_name(cls)}: the name {cls.name!r} belongs to {_full_name(taken)}; "
            "choose another"
        )
    registry[cls.name] = cls


def _full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


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
