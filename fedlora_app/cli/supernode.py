"""``fedlora supernode``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora_app.cli.shared import refuse


def supernode(
    context: typer.Context,
    preload: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE,…",
            help="What to import once (default: what a client of this app imports).",
            show_default=False,
        ),
    ] = None,
    poll: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Pause between two looks at the SuperLink for a message."
        ),
    ] = 1.0,
    patience: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long a message may be here without a live client or a reply before this "
            "SuperNode ends with 1.",
        ),
    ] = 180.0,
    keep: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long a client stays for the next message of its app, with model and rows; "
            "0: every message has a process of its own.",
        ),
    ] = 600.0,
    unchecked: Annotated[
        bool,
        typer.Option(
            "--unchecked",
            help="Do not look at the node config before starting: it is that of another app.",
        ),
    ] = False,
) -> None:
    r"""Be `flower-supernode`, with clients that import, and read model and rows, once.

    All other arguments are those of flower-supernode, and are passed on. It looks at the node's
    own data and limits first and ends with 2 if it cannot work with them; when the SuperLink
    refuses it, or a message stays without a client, it ends with 1 and the reason.

    Try:

        fedlora supernode --superlink superlink.example.org:8443 --root-certificates ca.crt \
            --node-config 'data-path="/data/rows.csv" max-rank=8'
    """
    from fedlora_app import supernode as node

    modules = node.PRELOAD if preload is None else preload.split(",")
    try:
        node.become(context.args, modules, poll, patience, keep, unchecked=unchecked)
    except ValueError as error:
        refuse(f"{context.command_path}: {error}")
