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
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Serve the page to this machine's browser as the run goes on."
        ),
    ] = False,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Of --watch (default: a free one).", show_default=False
        ),
    ] = 0,
) -> None:
    """Write one page about a run, finished or not: scores, bytes, ranks, clients, failures.

    RUN is the run's output folder. The page holds everything it shows, without scripts or
    requests, and suits light, dark and paper. With `--watch` nothing is written: the page is
    served on localhost, made anew every few seconds, until Ctrl-C.

    Try:

        fedlora report runs/mine
        fedlora report --watch runs/mine
    """
    from fedlora_app.report.page import RunFiles, page
    from fedlora_app.report.records import RecordsError

    try:
        if watch:
            from fedlora_app.report import watch as room

            room.watch(run, port)
            return
        file = output or run / "report.html"
        file.write_text(page(RunFiles.read(run)), encoding="utf-8")
    except (OSError, RecordsError) as error:
        refuse(error)
    typer.echo(file)
