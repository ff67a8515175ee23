"""``fedlora report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import RunFolder, refuse


def report(
    run: RunFolder,
    output: Annotated[
        Path | None,
        typer.Option(help="The page (default: RUN/report.html).", show_default=False),
    ] = None,
) -> None:
    """Write one page about a run, finished or not: scores, bytes, ranks, clients, failures.

    The page holds everything it shows, without scripts or requests, and suits light, dark and
    paper.

    Try:

        fedlora report runs/mine
    """
    from fedlora_app.report.page import RunFiles, page
    from fedlora_app.report.records import RecordsError

    file = output or run / "report.html"
    try:
        file.write_text(page(RunFiles.read(run)), encoding="utf-8")
    except (OSError, RecordsError) as error:
        refuse(error)
    typer.echo(file)
