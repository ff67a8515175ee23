"""What all classifiers share, whatever they classify: labels, strata, accuracy and macro-F1."""

from __future__ import annotations

import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data.columns import LABEL_COLUMNS, groups_of, has_column, label_column
from fedlora_app.data.labels import HOLES, NUMBER, Fail, encode, hidden, label_name
from fedlora_app.data.tables import Table
from fedlora_app.discretion import DataError
from fedlora_app.tasks.base import About, Origin, Rows, Score, Sums, Task
from fedlora_app.tasks.use import Asked, Findings, read_asked, trained_columns

if TYPE_CHECKING:
    from torch import Tensor, nn


class Classification(Task):
    """One of several labels for each row; ``about["labels"]`` names them, in the order of ids.

    A subclass says what a row is: ``item_columns`` and ``item``, ``encode`` and ``model``.
    """

    scores = (
        Score("accuracy", "accuracy", short="acc"),
        Score("macro_f1", "macro-F1", short="F1"),
    )
    key: ClassVar[str] = ""  #: of the run config, that names the columns of an item

    @abstractmethod
    def item_columns(self, table: Table, label: str) -> dict[str, str]:
        """Return the columns that make an item, by role; never that of the labels."""

    @abstractmethod
    def item(self, values: Mapping[str, Any], fail: Fail) -> Any:
        """Return what ``encode`` takes of one row, by column; ``fail(kind, got, remedy)``."""

    def knows_items(self, table: Table) -> bool:
        """Tell whether the columns of items can be told."""
        return True

    def rows(self, table: Table, about: About | None, place: str) -> Rows:
        """Pick the columns, skip rows without an item, number the labels."""
        label = label_column(table, self.config.data)
        columns = self.item_columns(table, label)
        parts = [table.columns[column][:] for column in columns.values()]
        whole: list[tuple[Any, ...]] = list(zip(*parts, strict=True))
        kept = [i for i, values in enumerate(whole) if not any(map(_blank, values))]

        def fail(row: int | None, kind: str, got: str = "", remedy: str = "") -> NoReturn:
            path, line = table.place(None if row is None else kept[row])
            raise DataError(path if table.parts else place, kind, got, remedy, line)

        if not kept:
            names = " and ".join(map(repr, columns.values()))
            what = next(iter(columns))
            fail(None, f"expected {what}s", f"none in column {names}",
                 f"set {self.key}")  # fmt: skip
        items = []
        for row, i in enumerate(kept):
            values = dict(zip(columns.values(), whole[i], strict=True))
            items.append(self.item(values, partial(fail, row)))
        labels = table.columns[label][:]
        raw = [labels[i] for i in kept]
        declared = table.class_names.get(label)
        known = about["labels"] if about else None
        ids, found = encode(raw, declared, known, fail)
        groups = groups_of(table, self.config.data, kept)
        roles = {**columns, "label": label}
        if groups is not None:
            roles["client"] = self.config.data.partition_column
        used = set(roles.values())
        origin = Origin(
            tuple(str(part.path) for part in table.parts),
            roles,
            tuple(column for column in table.columns if column not in used),
            len(whole) - len(kept),
            (*table.notes, *_doubts(raw, found, declared)),
        )
        return Rows(items, ids, {"labels": list(found)}, groups, origin)

    def train_rows(self, about: About | None = None) -> Rows:
        """Return the training rows; refuse those of one class."""
        rows = super().train_rows(about)
        names = rows.about["labels"]
        if len(names) < 2:
            raise DataError(
                self.config.data.name,
                "expected at least two labels",
                f"{', '.join(names)} alone in column {rows.origin.columns['label']!r}",
                "add rows of another (of images, a folder), or set data.label-column",
            )
        return rows

    def passed_over(self, table: Table, rows: Rows) -> str:
        """Return why a split cannot test: it has no labels, or hides them."""
        if not has_column(table, self.config.data.label_column, LABEL_COLUMNS):
            return "no column of labels"
        values = table.columns[label_column(table, self.config.data)][:]
        return "labels hidden" if hidden(values, rows.about["labels"]) else ""  # as -1

    def knows(self, table: Table) -> bool:
        """Tell whether items and labels are in columns of usual or named names."""
        labelled = has_column(table, self.config.data.label_column, LABEL_COLUMNS)
        return labelled and self.knows_items(table)

    def strata(self, rows: Rows) -> NDArray[np.int64]:
        """Return the label ids."""
        found: NDArray[np.int64] = rows.targets
        return found

    def strata_names(self, about: About) -> Sequence[str]:
        """Return the labels."""
        return tuple(about["labels"])

    def losses(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of each row.

        Raises
        ------
        ValueError
            If a label is none of those the model knows.
        """
        from torch.nn import functional

        labels, known = batch["labels"], logits.shape[-1]
        if not 0 <= int(labels.min()) <= int(labels.max()) < known:
            raise ValueError(
                f"expected labels 0 to {known - 1}, got {int(labels.min())} to "
                f"{int(labels.max())}; load these rows with the label names of training"
            )
        return functional.cross_entropy(logits, labels, reduction="none")

    def judge(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
        """Return, by label, how many rows have it, were given it, and both."""
        labels = batch["labels"].cpu().numpy()
        given = logits.argmax(-1).cpu().numpy()

        def counts(which: NDArray[np.int64]) -> NDArray[np.float64]:
            return np.bincount(which, minlength=logits.shape[-1]).astype(np.float64)

        hits = counts(labels[labels == given])
        return {"true": counts(labels), "given": counts(given), "hits": hits}

    def summary(self, sums: Sums) -> dict[str, float]:
        """Return accuracy, and the mean F1 over the labels that occur or were given."""
        both = sums["true"] + sums["given"]
        f1 = 2 * sums["hits"][both > 0] / both[both > 0]
        accuracy = sums["hits"].sum() / sums["true"].sum()
        return {"accuracy": float(accuracy), "macro_f1": float(f1.mean())}

    # ----- put to use

    def describe(self, model: nn.Module, about: About) -> None:
        """Write the names of the labels into the model's config."""
        settings: Any = model.config
        settings.id2label = dict(enumerate(about["labels"]))
        settings.label2id = {name: i for i, name in enumerate(about["labels"])}

    def asked(self, table: Table, columns: Mapping[str, str], about: About) -> Asked:
        """Return the items of a table, whether or not it has labels."""
        if getattr(self.config.data, self.key.rpartition(".")[2].replace("-", "_")) != "auto":
            columns = {}
        roles = {*columns} - {"label", "client"}
        found = trained_columns(table, columns, roles) or self.item_columns(
            table, _label_of(table, self.config.data.label_column)
        )

        def read(values: Mapping[str, Any], fail: Fail) -> Any:
            if any(map(_blank, values.values())):
                return None
            return self.item({found[role]: value for role, value in values.items()}, fail)

        return read_asked(table, found, read, f"{'two' if len(found) > 1 else 'a'} "
                          f"{next(iter(found))}{'s' if len(found) > 1 else ''}")  # fmt: skip

    def answers(self, model: nn.Module, items: Sequence[Any], about: About) -> list[dict[str, Any]]:
        """Return the likeliest label of each item, and the probabilities of all."""
        names = list(about["labels"])
        chances = self.chances(model, Rows(items, np.zeros(len(items), np.int64), about))
        return [
            {
                "label": names[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": dict(zip(names, map(float, row), strict=True)),
            }
            for row in chances
        ]

    def chances(self, model: nn.Module, rows: Rows) -> NDArray[np.float64]:
        """Return the probability of each label of each row, shape (n, labels)."""
        from fedlora_app.evaluation import row_logits

        return row_logits(self, model, self.encode(rows)).double().softmax(-1).numpy()

    def examine(self, model: nn.Module, rows: Rows) -> Findings:
        """Return the scores, what each label is taken for, and how far to trust probabilities."""
        import torch

        from fedlora_app.tasks import confusion

        chances = self.chances(model, rows)
        names, labels = list(rows.about["labels"]), rows.targets
        # Their logarithms are logits too.
        logits = torch.from_numpy(np.log(np.maximum(chances, np.finfo(float).tiny)))
        batch = {"labels": torch.from_numpy(labels)}
        counts = confusion.matrix(labels, chances.argmax(1), len(names))
        bins = confusion.reliability(labels, chances)
        scores = {
            "loss": float(self.losses(logits, batch).mean()),
            **self.summary(self.judge(logits, batch)),
            "calibration_error": confusion.calibration_error(bins),
            "brier": confusion.brier(labels, chances),
        }
        return Findings(
            scores,
            {"classes": confusion.by_class(counts, names), "reliability": bins},
            pictures={
                "confusion": partial(confusion.draw_matrix, counts, names),
                "reliability": partial(confusion.draw_reliability, bins),
            },
        )


def _label_of(table: Table, wanted: str) -> str:
    """Return the column of labels of a table that may have none; "": it has none."""
    if wanted != "auto":
        return wanted if wanted in table.columns else ""
    return next((name for name in table.columns if name.lower() in LABEL_COLUMNS), "")


def _blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and value != value)


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _doubts(
    values: Sequence[Any], names: Sequence[str], declared: Sequence[str] | None
) -> list[str]:
    """Return what about the labels is worth a look."""
    notes = []
    blanks = sum(isinstance(value, str) and value != value.strip() for value in values)
    if blanks:
        notes.append(f"{blanks} labels had blanks around them: stripped")
    folded = Counter(map(_folded, names))
    alike = [name for name in names if folded[_folded(name)] > 1]
    if alike:
        notes.append(f"labels that differ in case, blanks or width alone: {', '.join(alike[:6])}")
    holes = [name for name in names if name.lower() in HOLES]
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if holes:
        notes.append(f"a label that looks like a missing one: {', '.join(holes)}")
    elif numbers and len(numbers) < len(names):
        words = [name for name in names if name not in numbers]
        notes.append(f"labels that are words beside numbers: {', '.join(words[:6])}")
    if declared is None and label_name(values[0]) not in map(label_name, names):
        notes.append(f"labels that are numbers: taken as positions, 0 for {names[0]}")
    return notes
