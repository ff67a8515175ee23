"""``fedlora config``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora_app.cli.shared import refuse


def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORD]...",
            help="Show the keys that have all these words in their name or text.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the keys of the run config: defaults and what they do.

    With words, the keys that have all of them in their name or text.

    Try:

        fedlora config
        fedlora config learning rate
        fedlora config ranks.
    """
    from fedlora_app.config.fields import help_of, options, unknown_key
    from fedlora_app.config.keys import RunConfig

    wanted = [word.lower() for word in words or ()]
    found = [
        (key, f)
        for key, f in options(RunConfig)
        if all(word in f"{key} {f.metadata['help']}".lower() for word in wanted)
    ]
    if not found:
        known = [key for key, _ in options(RunConfig)]
        refuse(f"no key has {' and '.join(wanted)}; {unknown_key(wanted[0], known)}")
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("key", no_wrap=True, style="cyan")
    table.add_column("default", max_width=24, overflow="fold")
    table.add_column("what it does", ratio=1)
    for key, f in found:
        default = f'"{f.default}"' if isinstance(f.default, str) else str(f.default).lower()
        table.add_row(key, default, help_of(f))
    Console(markup=False, highlight=False).print(table)
