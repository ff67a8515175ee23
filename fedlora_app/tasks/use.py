"""What a task does with its model once it is trained: answers rows that have no answer yet.

``fedlora_app.after`` asks for all of this; the base class of tasks has it, so that a task of one's
own needs none of it to be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from fedlora_app.discretion import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fedlora_app.config.keys import RunConfig
    from fedlora_app.data.tables import Table
    from fedlora_app.tasks.base import Rows, Sample


@dataclass(frozen=True)
class Asked:
    """Rows that wait for an answer.

    Parameters
    ----------
    items : mapping
        By the number of the row, from 0.
    refused : mapping
        Why the others cannot be answered, one sentence each.
    """

    items: Mapping[int, Any]
    refused: Mapping[int, str]


@dataclass(frozen=True)
class Findings:
    """How good a model is on some rows, in full.

    Parameters
    ----------
    scores : mapping
        ``loss``, the task's scores, and whatever other number says something.
    tables : mapping, optional
        Lines of columns, by what the table is about.
    samples : sequence of Sample, optional
    pictures : mapping, optional
        What draws a PNG into a file, by the file's name without ending.
    """

    scores: Mapping[str, float]
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    pictures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict, compare=False)


class Use:
    """What a trained model is used for; a part of every task."""

    name: ClassVar[str] = ""
    pipeline: ClassVar[str | None] = None
    """What the Hugging Face Hub calls what the model does."""
    asked_column: ClassVar[str] = "text"
    """Of rows that are no mappings: what each of them is."""

    def save_encoder(self, folder: Path) -> None:
        """Write beside an adapter what makes the model's inputs of rows: tokenizer, template."""
        return None

    def read_encoder(self, folder: Path) -> None:
        """Take what ``save_encoder`` wrote, where it is there, instead of the base's."""
        return None

    def describe(self, model: nn.Module, about: Mapping[str, Any]) -> None:
        """Have the config of a model that is handed over say what its outputs are."""
        return None

    def usage(self, merged: bool, about: Mapping[str, Any]) -> str:
        """Return lines of Python that use an exported model in ``FOLDER``; for its card."""
        return ""

    def asked_table(self, path: str) -> Table:
        """Return the table of a file or folder of rows that have no answers."""
        from fedlora_app.data.rows import own_table

        return own_table(path)

    def asked(self, table: Table, columns: Mapping[str, str], about: Mapping[str, Any]) -> Asked:
        """Return the rows of a table as they are to be answered, without what is wanted.

        Parameters
        ----------
        table : Table
        columns : mapping
            The columns by role of the rows that the model was tested on; empty: not known.
        about : mapping
            What every node knows of the run's data.

        Raises
        ------
        DataError
            If the table as a whole cannot be; of single rows the reason is kept.
        """
        raise ValueError(
            f"task = {self.name!r} does not say how it answers rows without labels; give it the "
            "methods asked and answers"
        )

    def answers(
        self, model: nn.Module, items: Sequence[Any], about: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return what the model says to some of the items of ``asked``, JSON-able, in order."""
        raise NotImplementedError(f"{self.name} asks, and does not answer")

    def examine(self: Any, model: nn.Module, rows: Rows) -> Findings:
        """Return how good a model is on rows with answers, in full."""
        from fedlora_app.evaluation import evaluate

        config, strata = self.config, self.strata(rows)
        inputs = self.encode(rows)
        settings = {
            "batch_size": config.evaluate.batch_size,
            "precision": config.train.precision,
        }
        scores = evaluate(self, model, inputs, **settings)
        more, samples = self.try_out(model, rows)
        kinds = []
        for number, name in enumerate(() if strata is None else self.strata_names(rows.about)):
            if len(chosen := (strata == number).nonzero()[0]):
                found = evaluate(self, model, inputs.take(chosen), **settings)
                kinds.append({"kind": name, "rows": len(chosen), **found})
        return Findings({**scores, **more}, {"kinds of rows": kinds} if kinds else {}, samples)


class Tokenized(Use):
    """Rows become the model's inputs by its tokenizer."""

    config: RunConfig

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, with a padding token."""
        from fedlora_app.models.loading import build_tokenizer

        return build_tokenizer(self.config.model)

    def save_encoder(self, folder: Path) -> None:
        """Write the tokenizer, with its chat template if it has one."""
        self.tokenizer.save_pretrained(folder)

    def read_encoder(self, folder: Path) -> None:
        """Take the tokenizer that was written."""
        from fedlora_app.models.loading import saved_tokenizer

        if (found := saved_tokenizer(folder)) is not None:
            self.tokenizer = found


def read_asked(
    table: Table,
    columns: Mapping[str, str],
    read: Callable[[Mapping[str, Any], Callable[..., NoReturn]], Any],
    what: str,
) -> Asked:
    """Return the rows of some columns, by role, as ``read`` makes items of them.

    Parameters
    ----------
    table : Table
    columns : mapping
        Role → column.
    read : callable
        Returns the item of the values of a row, by role, or None where it lacks ``what``;
        ``fail(kind, got, remedy)``, its second argument, raises.
    what : str
        For people, such as "a text".
    """
    values = {role: table.columns[column][:] for role, column in columns.items()}
    items, refused = {}, {}

    def fail(row: int, kind: str, got: str = "", remedy: str = "") -> NoReturn:
        path, line = table.place(row)
        raise DataError(path, kind, got, remedy, line)

    for row in range(len(next(iter(values.values()), ()))):
        try:
            item = read({role: held[row] for role, held in values.items()}, partial(fail, row))
        except DataError as error:
            refused[row] = str(error)
            continue
        if item is None:
            path, line = table.place(row)
            names = " and ".join(map(repr, columns.values()))
            refused[row] = str(DataError(path, f"expected {what}", f"none in {names}", "", line))
        else:
            items[row] = item
    return Asked(items, refused)


def trained_columns(table: Table, columns: Mapping[str, str], roles: set[str]) -> dict[str, str]:
    """Return those of some roles that training had, if the table has them all; else nothing."""
    found = {role: name for role, name in columns.items() if role in roles}
    return found if all(name in table.columns for name in found.values()) else {}
