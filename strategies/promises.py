"""What a rule or a sampler promises, and why a promise is not inherited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def declares(thing: object, promise: str) -> bool:
    """Return whether a class makes a promise itself.

    A subclass may change what its base rests a promise on. So what a base declares counts for
    that base alone, and a subclass that keeps it says so again: ``linear = True``.

    Parameters
    ----------
    thing : object
        An object or its class.
    promise : str
        Name of a class attribute, ``True`` in the body of a class that makes the promise.
        An object for which it does not hold, as it is set, has ``False`` of its own.
    """
    cls = thing if isinstance(thing, type) else type(thing)
    return vars(cls).get(promise) is True and getattr(thing, promise) is True


def those_that_declare(registry: Mapping[str, Any], promise: str) -> str:
    """Return the names in a registry whose classes make a promise, for a sentence."""
    return ", ".join(sorted(name for name, cls in registry.items() if declares(cls, promise)))
