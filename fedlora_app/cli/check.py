"""``fedlora check``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora_app.cli.run import Clients, Cpus, Gpus, Output, Ray, Resume, Rounds
from fedlora_app.cli.shared import Config, Pairs, exit_with, pairs_of, refuse


def check(
    pairs: Pairs = None,
    config: Config = None,
    clients: Clients = None,
    rounds: Rounds = None,
    output: Output = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
    ray_address: Ray = "",
    resume: Resume = False,
    node_config: Annotated[
        str | None,
        typer.Option(
            metavar="'KEY=VALUE ...'",
            help="Look at this node config instead, as a SuperNode does before it starts.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check all that `fedlora run` would with the same arguments, and start nothing.

    Keys and what goes together, the rows and their shares, the model, the folder of the results,
    CPUs and GPUs, the checkpoint that is resumed from, the nodes of a Ray cluster. It takes
    seconds, and nothing is written.

    Try:

        fedlora check --clients 20 data.name=/data/tickets data.partition=natural
        fedlora check --node-config 'data-path="/data/rows.csv" max-rank=8'
    """
    given = pairs_of(pairs, config)
    if node_config is not None:
        _check_node(node_config, given)
        return
    from fedlora_app.launch.simulation import Asked, start

    asked = Asked(clients, rounds, output, given, cpus, gpus, ray_address, resume)
    exit_with(start(asked, only_check=True))


def _check_node(node_config: str, given: list[tuple[str, str]]) -> None:
    from fedlora_app.config.fields import typed_value
    from fedlora_app.config.keys import RunConfig
    from fedlora_app.flower import parse_config_args
    from fedlora_app.launch.inspection import check_own_data

    kinds = RunConfig().to_flat()
    try:
        config = RunConfig.from_flat({k: typed_value(v, kinds.get(k)) for k, v in given})
        typer.echo(check_own_data(parse_config_args([node_config]), config))
    except (ValueError, OSError) as error:
        refuse(error)
