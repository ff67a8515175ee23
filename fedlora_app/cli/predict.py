"""``fedlora predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import Base, Pairs, RunFolder, refuse, settings_of


def predict(
    run: RunFolder,
    input: Annotated[
        Path,
        typer.Option(
            help="Rows: csv, tsv, jsonl, parquet, a folder of images, …", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="The .jsonl file to write, whole or not at all.", show_default=False),
    ],
    pairs: Pairs = None,
    keep: Annotated[
        str, typer.Option(metavar="COLUMN,…", help="Columns of the input to copy, such as an id.")
    ] = "",
    base: Base = None,
) -> None:
    """Answer the rows of a file by a run's model.

    Labels with their probabilities, answers of a language model, which of two answers is preferred:
    one line a row, in order. A row that cannot be answered has an `error` that says why, and the
    exit code is 1. On a GPU where there is one (`CUDA_VISIBLE_DEVICES= fedlora predict …`: not).

    Keys of the run config that did not make the model may differ from the run's, such as
    `data.text-column`, `evaluate.batch-size` or `evaluate.generate-tokens`.

    Try:

        fedlora predict runs/demo --input tickets.csv --output scored.jsonl --keep id
        fedlora predict runs/chat --input q.jsonl --output a.jsonl evaluate.generate-tokens=256
    """
    from fedlora_app.after.predict import predict as answer

    kept = [name.strip() for name in keep.split(",") if name.strip()]
    try:
        told = answer(run, input, output, keep=kept, base=base, config=settings_of(pairs))
    except (ValueError, OSError) as error:
        refuse(error)
    typer.echo(f"{told['rows'] - told['refused']} of {told['rows']} rows answered: {output}")
    raise typer.Exit(int(told["refused"] > 0))
