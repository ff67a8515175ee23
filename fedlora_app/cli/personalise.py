"""``fedlora personalise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import Base, Pairs, RunFolder, refuse, settings_of


def personalise(
    run: RunFolder,
    data: Annotated[Path, typer.Option(help="The site's rows, with answers.", show_default=False)],
    output: Annotated[
        Path, typer.Option(help="A folder that is not there yet.", show_default=False)
    ],
    pairs: Pairs = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps at most.")] = 100,
    every: Annotated[int, typer.Option(help="Steps between two looks at the rows that stop.")] = 10,
    base: Base = None,
) -> None:
    """Train on from a run's model on a site's own rows, and say whether that helped.

    A fifth of the rows says when to stop, a fifth compares the global model with the personal one.
    Nothing leaves the site: the personal model is a run's folder of its own, which predict,
    evaluate and export take.

    Try:

        fedlora personalise runs/demo --data clinic.csv --output clinic-model
        fedlora personalise runs/demo --data clinic.csv --output m train.learning-rate=0.0005
    """
    from rich.console import Console

    from fedlora_app.after.personalise import personalise as tune

    try:
        with Console(stderr=True).status("training"):
            found = tune(
                run, data, output, steps=steps, every=every, base=base, config=settings_of(pairs)
            )
    except (ValueError, OSError) as error:
        refuse(error)
    parts = found["rows"]
    typer.echo(f"{parts['trained']} rows trained, {parts['stopping']} said when to stop; on "
               f"{parts['compared']} others:")  # fmt: skip
    for name, before in found["global"].items():
        label = found["names"].get(name, name)
        typer.echo(f"  {label}: {before:.4f} global, {found['personal'][name]:.4f} personal")
    kept = f"{found['steps']} steps kept" if found["steps"] else "the global model stays the best"
    typer.echo(f"{kept}: {output}")
