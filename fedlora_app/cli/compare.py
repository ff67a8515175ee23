"""``fedlora compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.run import Gpus
from fedlora_app.cli.shared import exit_with


def compare(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="The study file (TOML).", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder of the study's folder.")] = Path("runs"),
    jobs: Annotated[
        int,
        typer.Option(
            help="Runs side by side (default: one a core where memory allows, with a GPU one).",
            show_default=False,
        ),
    ] = 0,
    gpus: Gpus = 0.0,
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Run nothing, print the tables.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Run nothing, say what is to do.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ARM", help="The baseline (default: the study's).", show_default=False
        ),
    ] = None,
) -> None:
    """Compare settings: the same seeded partitions, several arms, several seeds, one table.

    Runs every arm of STUDY, a TOML file, that has not run yet, and prints one table per setting. A
    study that was interrupted goes on where it stopped.

    The file holds `clients`, `seeds`, `target` (of the task's first score), `baseline` (the arm
    that others are compared with; default: the first), and keys of the run config: `[config]` for
    all runs, `[settings.NAME]` for each setting, `[arms.NAME]` for each arm. `clients` may stand
    in a setting instead; in one of a natural partition its column says how many there are.

    Try:

        fedlora compare studies/autorank.toml --list
        fedlora compare studies/autorank.toml --jobs 2
    """
    from fedlora_app.compare import runs

    exit_with(
        runs.compare(
            study,
            output,
            jobs=jobs,
            gpus=gpus,
            only_table=only_table,
            listed=listed,
            against=against,
        )
    )
