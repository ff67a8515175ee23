"""``fedlora export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import Base, Pairs, RunFolder, refuse, settings_of


def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="A folder that is not there yet.", show_default=False)],
    pairs: Pairs = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="A plain model instead of an adapter for PEFT.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Cut the adapter to this rank first, by singular values.", show_default=False
        ),
    ] = None,
    dequantise: Annotated[
        bool,
        typer.Option(
            "--dequantise",
            help="With --merge: write the numbers that a base of few bits stands for.",
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="With --merge: float32, bfloat16 or float16.")
    ] = "float32",
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Push to this repository on the Hub.", show_default=False
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: one that is made is open to everybody.")
    ] = False,
    base: Base = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What others know the base by (default: as the run names it).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a run's model as other libraries read it, with tokenizer, label names and a card.

    An adapter that plain PEFT reads, or with `--merge` a model that plain transformers reads. The
    card, README.md, is written from the run: data, clients, ranks, rule, rounds, scores with their
    spread over clients, bytes, privacy. `--push` logs in as huggingface_hub does (`hf auth login`).

    Try:

        fedlora export runs/demo --to demo-adapter --rank 8
        fedlora export runs/chat --to chat-model --merge --dtype bfloat16
        fedlora export runs/chat --to chat --push me/chat --base-name HuggingFaceTB/SmolLM2-135M
    """
    from fedlora_app.after.export import export_run

    try:
        found = export_run(
            run, to, merge=merge, rank=rank, dequantise=dequantise, dtype=dtype, push=push,
            public=public, base=base, base_name=base_name, config=settings_of(pairs),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        refuse(error)
    what = f"a model of {found.dtype} weights" if found.merged else "an adapter"
    cut = "" if found.energy is None else f", cut: {found.energy:.2%} of its energy kept"
    typer.echo(f"{what}, rank {found.rank}{cut}, on {found.base}: {found.folder}")
    if found.url:
        typer.echo(found.url)
