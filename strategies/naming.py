"""Give things a name, find them by it, and say which names there are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar, cast


class Named(Protocol):
    """A class that says by which name it is found."""

    name: ClassVar[str]


T = TypeVar("T")
MakerT = TypeVar("MakerT", bound=Callable[..., Any])
ClassT = TypeVar("ClassT", bound=Named)


class Registry(dict[str, MakerT]):
    """Classes of one kind, or what else makes such an object, by name; a dict like any other."""

    def register(self, cls: type[ClassT]) -> type[ClassT]:
        """Register a class by its ``name``, and return it.

        A class defined anew, as when its module is loaded again, takes the place of the old one.

        Raises
        ------
        ValueError
            If it has no name, or another class has it.
        """
        if not cls.name:
            raise ValueError(f"{cls.__qualname__}: expected a name to register it by, got none")
        taken = self.get(cls.name)
        if taken is not None and _full_name(taken) != _full_name(cls):
            raise ValueError(
                f"{_full_name(cls)}: the name {cls.name!r} belongs to {_full_name(taken)}; "
                "choose another"
            )
        self[cls.name] = cast(MakerT, cls)
        return cls

    def find(self, name: str) -> MakerT:
        """Return what is registered as ``name``.

        Raises
        ------
        ValueError
            If nothing is; the message lists the names and suggests the nearest.
        """
        return _find(self, name)

    def make(self: Mapping[str, Callable[..., T]], name: str, /, *args: Any, **options: Any) -> T:
        """Return an object of what is registered as ``name``; errors as of ``find``."""
        return _find(self, name)(*args, **options)


def _find(registry: Mapping[str, T], name: str) -> T:
    """Return what a registry has as ``name``, seen as a mapping for its type alone."""
    if name not in registry:
        close = difflib.get_close_matches(name, list(registry), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"expected one of {', '.join(registry)}; got {name!r}{hint}")
    return registry[name]


def _full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
