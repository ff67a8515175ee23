"""Answer the rows of a file by a run's model, into a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from fedlora_app.after.run import load_run
from fedlora_app.config.keys import Scalar
from fedlora_app.report.records import plain
from strategies.files import sync_folder

T = TypeVar("T")


def predict(
    run: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    keep: Sequence[str] = (),
    base: str | None = None,
    config: Mapping[str, Scalar] | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write what a run's model says to each row of a file, as JSON lines in the same order.

    Parameters
    ----------
    run : str or Path
        The run's folder.
    input : str or Path
        A csv, tsv, jsonl or parquet file, a folder of images, … with or without answers.
    output : str or Path
        A ``.jsonl`` file, whole at the end or not there; one that is there is replaced.
    keep : sequence of str (default: none)
        Columns of the input to be copied into the lines, such as an id.
    base, config
        As of ``load_run``.
    progress : bool (default: True)
        Whether a bar is shown on a terminal.

    Returns
    -------
    dict
        ``rows``, and how many of them have an ``error`` in the place of an answer: ``refused``.

    Raises
    ------
    FileNotFoundError or ValueError
        As of ``load_run``, and if the input as a whole cannot be read; nothing is written then.
    """
    target = Path(output).expanduser().absolute()
    if target.suffix != ".jsonl" or not target.parent.is_dir():
        raise ValueError(
            f"output: expected a file that ends in .jsonl, in a folder that is there; got {output}"
        )
    loaded = load_run(run, base=base, config=config)
    table = loaded.table(input)
    if unknown := [name for name in keep if name not in table.columns]:
        raise ValueError(
            f"keep: expected columns of {input} ({', '.join(table.columns)}), got "
            f"{', '.join(unknown)}"
        )
    rows = max(map(len, table.columns.values()), default=0)
    refused = 0
    with whole_file(target) as file:
        for found in shown(loaded.answered(table), rows, "predict", progress):
            refused += "error" in found
            copied = {name: table.columns[name][found["row"] - 1] for name in keep}
            line = json.dumps(plain({**copied, **found}), ensure_ascii=False, default=str)
            file.write(line + "\n")
    return {"rows": rows, "refused": refused}


@contextmanager
def whole_file(target: Path) -> Iterator[IO[str]]:
    """Open a text file that takes its name when all is written, and leaves nothing otherwise."""
    new = target.with_name(target.name + ".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            yield file
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    new.replace(target)
    sync_folder(target.parent)


def shown(items: Iterable[T], total: int, what: str, progress: bool = True) -> Iterator[T]:
    """Yield the items, with a bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    yield from track(items, what, total=total, console=console, disable=hidden, transient=True)
