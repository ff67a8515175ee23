"""``fedlora evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import Base, Pairs, RunFolder, refuse, settings_of


def evaluate(
    run: RunFolder,
    pairs: Pairs = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows with answers, as data.name takes them (default: the run's test rows).",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which of several (default: test).", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the files (default: evaluation in the run's folder).",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
) -> None:
    """Say how good a run's model is on rows with answers, in full.

    Of classifiers: scores, a table of the classes, what is taken for what, and how far
    probabilities can be trusted, with pictures. Of language models: loss and perplexity, by kinds
    of rows if they have some, and with `evaluate.generate=N` the scores of so many answers that the
    model writes itself.

    Try:

        fedlora evaluate runs/demo
        fedlora evaluate runs/demo --data other-site.csv
        fedlora evaluate runs/chat evaluate.generate=100 evaluate.scorer=number
    """
    from rich.console import Console

    from fedlora_app.after.evaluate import evaluate_run, print_findings

    try:
        with Console(stderr=True).status("evaluating"):
            found = evaluate_run(
                run, data, split=split, output=output, base=base, config=settings_of(pairs)
            )
    except (ValueError, OSError) as error:
        refuse(error)
    print_findings(found, Console())
