"""How good a run's model is on rows with answers: scores, tables, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.after.run import LoadedRun, load_run
from fedlora_app.config.keys import Scalar
from fedlora_app.data.tables import TEST_SPLITS
from fedlora_app.discretion import DataError
from fedlora_app.report.records import write_json
from fedlora_app.tasks import LOSS, Rows

if TYPE_CHECKING:
    from rich.console import Console


def evaluate_run(
    run: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    output: str | Path | None = None,
    base: str | None = None,
    config: Mapping[str, Scalar] | None = None,
) -> dict[str, Any]:
    """Evaluate a run's model; write ``evaluation.json`` and pictures, and return what is in it.

    Parameters
    ----------
    run : str or Path
        The run's folder.
    data : str or Path, optional
        Rows with answers: what ``data.name`` takes (default: the run's own test rows).
    split : str, optional
        Which of several (default: test or the like, else all there is).
    output : str or Path, optional
        A folder for the files (default: ``evaluation`` in the run's folder, or
        ``evaluation-NAME`` of other data).
    base, config
        As of ``load_run``. With ``evaluate.generate`` and ``evaluate.scorer`` a language model
        answers so many rows itself, and is scored.

    Returns
    -------
    dict
        ``run``, ``data``, ``split``, ``rows``, ``scores``, ``names`` (of scores, for people),
        ``tables``, ``samples``, ``files``.

    Raises
    ------
    FileNotFoundError or ValueError
        As of ``load_run``; if there are no such rows, or they have labels that the run has not.
    """
    loaded = load_run(run, base=base, config=config)
    rows, taken = rows_to_test(loaded, None if data is None else str(data), split)
    name = loaded.config.data.name if data is None else str(data)
    default = "evaluation" if data is None else f"evaluation-{Path(name.rstrip('/')).stem}"
    folder = (loaded.folder / default if output is None else Path(output)).expanduser().absolute()
    found = loaded.task.examine(loaded.model, rows)
    folder.mkdir(parents=True, exist_ok=True)
    for picture, draw in found.pictures.items():
        draw(folder / f"{picture}.png")
    result: dict[str, Any] = {
        "run": str(loaded.folder),
        "data": name,
        "split": taken,
        "rows": len(rows),
        "scores": dict(found.scores),
        "names": {score.name: score.label for score in (LOSS, *loaded.task.scores)},
        "tables": {title: list(lines) for title, lines in found.tables.items()},
        "samples": [asdict(sample) for sample in found.samples],
        "files": [str(folder / f"{picture}.png") for picture in found.pictures],
    }
    write_json(folder / "evaluation.json", result)
    return {**result, "files": [str(folder / "evaluation.json"), *result["files"]]}


def rows_to_test(loaded: LoadedRun, data: str | None, split: str | None) -> tuple[Rows, str]:
    """Return rows with answers, as the run's task reads them, and which split they are.

    Raises
    ------
    DataError
        If there is no such split.
    """
    task, about = loaded.task, loaded.about
    if data is None:
        if split is not None:
            raise ValueError(
                "split: expected data beside it; the run's own test rows are one split"
            )
        return task.test_rows(about), "test"
    splits = task.splits(data)
    taken = split or next((name for name in TEST_SPLITS if name in splits), next(iter(splits)))
    if taken not in splits:
        raise DataError(data, f"expected a split {taken!r}", ", ".join(splits), "name another")
    return task.rows(splits[taken], about, data), taken


def print_findings(found: Mapping[str, Any], to: Console) -> None:
    """Print what ``evaluate_run`` returned."""
    from rich.table import Table

    to.print(f"{found['rows']} rows ({found['split']}) of {found['data']}")
    for key, value in found["scores"].items():
        to.print(f"  {found['names'].get(key, key.replace('_', ' '))}: [bold]{value:.4f}[/bold]")
    for title, lines in found["tables"].items():
        table = Table(title=title)
        for column in lines[0] if lines else ():
            table.add_column(
                column, justify="left" if isinstance(lines[0][column], str) else "right"
            )
        for line in lines:
            table.add_row(*[_cell(value) for value in line.values()])
        to.print(table)
    for sample in found["samples"]:
        to.print(f"  asked: {sample['asked']}\n  wanted: {sample['wanted']}\n"
                 f"  given: {sample['given']} ({sample['score']:g})", markup=False)  # fmt: skip
    for file in found["files"]:
        to.print(file, markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
