"""``fedlora partition``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import Config, Pairs, exit_with, pairs_of


def partition(
    pairs: Pairs = None,
    config: Config = None,
    clients: Annotated[
        int | None, typer.Option(help="As in `fedlora run`.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="PNG to draw (default: none is drawn).", show_default=False)
    ] = None,
) -> None:
    """Show how simulated clients would share the rows, without training.

    A table, clients by classes, with how far each client's mix is from that of all rows; `--output`
    draws it.

    Try:

        fedlora partition data.partition=shards data.shards-per-client=2 --output shares.png
    """
    from fedlora_app.partition_report import show

    exit_with(show(pairs_of(pairs, config), clients, output))
