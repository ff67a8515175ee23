"""``fedlora run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import Config, Pairs, exit_with, pairs_of

Clients = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Simulated clients (default: 10; with data.partition=natural as many as its column "
        "names).",
        show_default=False,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(min=1, help="Federated rounds (the key `rounds`).", show_default=False),
]
Output = Annotated[
    str | None,
    typer.Option(
        help="Folder of the results (default: `runs/<time>-<aggregation>`).", show_default=False
    ),
]
Cpus = Annotated[int, typer.Option("--cpus-per-client", min=1, help="CPUs of a client.")]
Gpus = Annotated[float, typer.Option("--gpus-per-client", help="GPU share of a client.")]
Ray = Annotated[
    str,
    typer.Option(
        "--ray-address",
        envvar="RAY_ADDRESS",
        metavar="HOST:PORT",
        help="Simulate on this Ray cluster; auto: on this machine's (default: a Ray of its own).",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run in --output from its latest checkpoint."),
]


def run(
    pairs: Pairs = None,
    config: Config = None,
    clients: Clients = None,
    rounds: Rounds = None,
    output: Output = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
    ray_address: Ray = "",
    resume: Resume = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show Flower's and Ray's own lines too.")
    ] = False,
    app: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Run another Flower app instead, such as one of `fedlora new`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    r"""Simulate one federated run: clients of different rank, on this machine.

    It checks everything first, starts a SuperLink of its own, shows what happens, and leaves no
    process behind. What comes out is one folder: config, metrics, scores, plots and the adapter.
    KEY=VALUE are keys of the run config; `fedlora config` lists them.

    Try:

        fedlora run
        fedlora run --clients 20 --rounds 5 aggregation=rbla ranks.list=2,8
        fedlora run --output runs/mine task=causal-lm model.name=packaged:smollm2-135m \
            data.name=packaged:gsm8k data.partition=iid data.max-length=192
        fedlora run --output runs/mine --resume
        fedlora run --app ./myapp rounds=5
    """
    from fedlora_app.launch.simulation import Asked, start

    asked = Asked(
        clients=clients,
        rounds=rounds,
        output=output,
        pairs=pairs_of(pairs, config),
        cpus_per_client=cpus,
        gpus_per_client=gpus,
        ray_address=ray_address,
        resume=resume,
        verbose=verbose,
    )
    exit_with(start(asked, app))
