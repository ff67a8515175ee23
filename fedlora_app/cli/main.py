"""The front door, ``fedlora COMMAND``: its commands, in the order of ``fedlora --help``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

import typer
import typer.main
from typer.models import ArgumentInfo

from fedlora_app.cli import (
    check,
    compare,
    config,
    evaluate,
    export,
    new,
    partition,
    personalise,
    predict,
    report,
    run,
    supernode,
)
from fedlora_app.cli.shared import BARE

EXTRA = "pip install 'fedlora[app]'"
EXITS = """Exit codes: 0 done · 1 a run failed · 2 asked for what cannot be · 130 Ctrl-C"""

TRAIN, USE, LOOK = "Train", "Use what was trained", "Look"
SITES, OWN = "At a site", "In a project of your own"
COMMANDS: tuple[tuple[Callable[..., None], str, str, dict[str, Any]], ...] = (
    (run.run, "run", TRAIN, {}),
    (check.check, "check", TRAIN, {}),
    (compare.compare, "compare", TRAIN, {}),
    (predict.predict, "predict", USE, {}),
    (evaluate.evaluate, "evaluate", USE, {}),
    (export.export, "export", USE, {}),
    (personalise.personalise, "personalise", USE, {}),
    (report.report, "report", LOOK, {}),
    (config.config, "config", LOOK, {}),
    (partition.partition, "partition", LOOK, {}),
    (supernode.supernode, "supernode", SITES, BARE),
    (new.new, "new", OWN, {}),
)
"""Every command: its function, its name, where ``--help`` shows it, and how it is parsed."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(
    help="Federated LoRA fine-tuning when clients differ: in data, in device, in network.",
    epilog=EXITS,
    no_args_is_help=True,
    context_settings=SETTINGS,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for function, name, panel, settings in COMMANDS:
    app.command(name, rich_help_panel=panel, context_settings={**SETTINGS, **settings})(function)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fedlora {version('fedlora')}")
        raise typer.Exit


@app.callback()
def door(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Federated LoRA fine-tuning when clients differ: in data, in device, in network."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fedlora`` with ``argv`` (default: the program's) and return the exit code."""
    group: Any = typer.main.get_command(app)
    for function, name, _, _ in COMMANDS:
        _explain(group.commands[name], function)
    return _code(group, argv, "fedlora")


def run_as(command: str, argv: Sequence[str] | None, program: str) -> int:
    """Run one command as a program of its own and return the exit code.

    Parameters
    ----------
    command : str
        Its name, as in ``COMMANDS``.
    argv : sequence of str, optional
        What follows the program's name (default: the program's own).
    program : str
        What the user has called.
    """
    function, _, _, settings = next(entry for entry in COMMANDS if entry[1] == command)
    alone = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )
    alone.command(context_settings={**SETTINGS, **settings})(function)
    return _code(_explain(typer.main.get_command(alone), function), argv, program)


def _explain(command: Any, function: Callable[..., None]) -> Any:
    """Give a command's arguments their help again, which click from 8.5 on takes from typer's."""
    hints = get_type_hints(function, include_extras=True)
    for param in command.params:
        for told in getattr(hints.get(param.name), "__metadata__", ()):
            if isinstance(told, ArgumentInfo) and getattr(param, "help", None) is None:
                param.help = told.help
    return command


def _code(program: Any, argv: Sequence[str] | None, name: str) -> int:
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    try:
        program(args=words, prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("fedlora_app", "strategies"):
            raise
        print(f"this needs {error.name}, which is not installed: {EXTRA}", file=sys.stderr)
        return 2
    return 0
