"""What several commands share: keys of the run config on the command line, and their completion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fedlora_app.config.fields import pair

if TYPE_CHECKING:
    from fedlora_app.config.fields import Scalar

BARE = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of a command that passes on what it does not know."""


def keys(incomplete: str) -> list[str]:
    """Return the run-config keys that begin so, each ready for its value."""
    from fedlora_app.config.keys import RunConfig

    return [f"{key}=" for key in RunConfig().to_flat() if key.startswith(incomplete)]


Pairs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys of the run config and their values; `fedlora config` lists them.",
        autocompletion=keys,
        show_default=False,
    ),
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        metavar="KEY=VALUE...",
        help="The same, for those who like to see it named.",
        autocompletion=keys,
        show_default=False,
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Output folder of a run.", show_default=False),
]

Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Where the base model is here, or its id on the hub (default: where it was).",
        show_default=False,
    ),
]


def settings_of(*given: Iterable[str] | None) -> dict[str, Scalar]:
    """Return keys of the run config and their values, each of its key's type.

    Raises
    ------
    ValueError
        If a value is of another.
    """
    from fedlora_app.config.fields import typed_value
    from fedlora_app.config.keys import RunConfig

    kinds = RunConfig().to_flat()
    return {key: typed_value(value, kinds.get(key)) for key, value in pairs_of(*given)}


def pairs_of(*given: Iterable[str] | None) -> list[tuple[str, str]]:
    """Return keys and values, all as text.

    Raises
    ------
    typer.BadParameter
        If a word has no ``=``.
    """
    try:
        return [pair(word) for words in given for word in words or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def exit_with(code: int) -> NoReturn:
    """End the command with an exit code."""
    raise typer.Exit(code)


def refuse(error: object) -> NoReturn:
    """Say what is wrong and end with 2."""
    typer.echo(error, err=True)
    raise typer.Exit(2)
