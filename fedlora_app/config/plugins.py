"""Rules, policies, samplers and tasks of the user's own, made known before they are needed."""

from __future__ import annotations

from importlib import import_module


def load(modules: str) -> list[str]:
    """Import comma-separated modules, which register what they hold.

    Parameters
    ----------
    modules : str
        As in ``plugins = "my_methods, my_package.samplers"``.

    Returns
    -------
    list of str
        What could not be imported, and why.
    """
    problems = []
    for name in filter(None, (part.strip() for part in modules.split(","))):
        try:
            import_module(name)
        except Exception as error:  # it is somebody else's code, and may raise anything
            problems.append(
                f"plugins: cannot import {name!r}: {type(error).__name__}: {error}; expected a "
                "module next to pyproject.toml, or one that is installed where the server runs"
            )
    return problems
