"""A finished run as one object: its task, its model, and what that says to new rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.config.keys import ConfigError, RunConfig, Scalar
from fedlora_app.config.plugins import load
from fedlora_app.data.tables import Part, Table
from fedlora_app.discretion import DataError, NoDataError
from fedlora_app.report.folder import MODEL_FORMAT
from fedlora_app.report.records import read_json
from fedlora_app.tasks import Task, make_task

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import

#: Groups of the run config that may differ from the run's own: what does not make the model.
FREE = ("data", "evaluate", "train")
BATCHES = 16  # that are read, answered and written together

Input = str | Path | Table | Sequence[Any]


@dataclass(frozen=True)
class LoadedRun:
    """A run's model, ready to be used.

    Parameters
    ----------
    folder : Path
    config : RunConfig
        The run's own, but for the keys that ``load_run`` was given.
    task : Task
    about : mapping
        What the task says of the run's data.
    columns : mapping
        The columns by role of its test rows; empty: not known.
    model : PeftModel
        The base with the final global adapter, in evaluation mode.
    """

    folder: Path
    config: RunConfig
    task: Task
    about: Mapping[str, Any]
    columns: Mapping[str, str]
    model: PeftModel = field(repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the model's outputs; empty: it has none."""
        return tuple(self.task.strata_names(self.about))

    def predict(self, rows: Input) -> list[dict[str, Any]]:
        """Return what the model says to each row, in order.

        Parameters
        ----------
        rows : str, Path or sequence
            A file or folder, as a site's own data; or rows in memory: mappings of columns, texts,
            paths or bytes of images.

        Returns
        -------
        list of dict
            ``row``, from 1, and what the task says: for classifiers ``label``, ``probability`` and
            ``probabilities``; for language models ``answer``; for pairs of answers ``preferred``,
            ``probability`` and ``margin``. Of a row that cannot be answered, ``error``.

        Raises
        ------
        DataError
            If the rows as a whole cannot be read.
        """
        return list(self.answered(self.table(rows)))

    def table(self, rows: Input) -> Table:
        """Return rows as a table, from wherever they are."""
        if isinstance(rows, Table):
            return rows
        if isinstance(rows, str | Path):
            if not Path(rows).expanduser().exists():
                raise NoDataError(
                    Path(rows).expanduser().absolute(),
                    "expected rows here: not there", remedy="correct the path",
                )  # fmt: skip
            return self.task.asked_table(str(rows))
        each = [r if isinstance(r, Mapping) else {self.task.asked_column: r} for r in rows]
        names = dict.fromkeys(name for row in each for name in row)
        columns = {name: [row.get(name) for row in each] for name in names}
        return Table(columns, parts=(Part("the rows", "row", range(1, len(each) + 1)),))

    def answered(self, table: Table) -> Iterator[dict[str, Any]]:
        """Yield what ``predict`` returns, batch by batch."""
        asked = self.task.asked(table, self.columns, self.about)
        count = max(map(len, table.columns.values()), default=0)
        numbers = iter(range(count))
        while chunk := list(islice(numbers, BATCHES * self.config.evaluate.batch_size)):
            found = self._answers({row: asked.items[row] for row in chunk if row in asked.items})
            for row in chunk:
                told = found.get(row) or {"error": asked.refused.get(row, "")}
                yield {"row": row + 1, **told}

    def _answers(self, items: Mapping[int, Any]) -> dict[int, dict[str, Any]]:
        """Return the answers by row; items that cannot be read after all have an error."""
        if not items:
            return {}
        try:
            given = self.task.answers(self.model, list(items.values()), self.about)
        except DataError as error:
            if len(items) == 1:
                return {row: {"error": str(error)} for row in items}
            return {
                row: one for key in items for row, one in self._answers({key: items[key]}).items()
            }
        return dict(zip(items, given, strict=True))


def load_run(
    run: str | Path, *, base: str | None = None, config: Mapping[str, Scalar] | None = None
) -> LoadedRun:
    """Return the model that a run has made, from its folder.

    Parameters
    ----------
    run : str or Path
        The run's folder; a copy will do: ``config.json``, ``model.json`` and ``adapter/``.
    base : str, optional
        Where the base model is on this machine, or on the hub (default: where it was).
    config : mapping, optional
        Run-config keys to differ from the run's, such as ``data.text-column``,
        ``evaluate.batch-size`` or ``train.precision``.

    Raises
    ------
    FileNotFoundError
        If there is no finished run, or its base is not there.
    ValueError
        If the folder is of a newer release, a key may not differ, or the base has other weights
        than the one the run was trained on.
    """
    folder = Path(run).expanduser().absolute()
    weights = folder / "adapter" / "adapter_model.safetensors"
    missing = [file for file in (folder / "config.json", weights) if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: expected the folder of a finished run, but there is no "
            f"{missing[0].relative_to(folder)}; name the folder that holds config.json and "
            "adapter/, or let the run end"
        )
    known = read_json(folder / "model.json")
    if known.get("format", MODEL_FORMAT) > MODEL_FORMAT:
        raise ValueError(
            f"{folder / 'model.json'}: expected format {MODEL_FORMAT}, got {known['format']}; "
            "use the release of fedlora that wrote it, or a newer one"
        )
    settings = _settings(read_json(folder / "config.json"), base, config or {})
    if problems := load(settings.plugins):
        raise ConfigError(problems)
    from fedlora_app.config.precision import with_precision  # torch comes with it

    settings = with_precision(settings)
    task = make_task(settings)
    about = known.get("about")
    if about is None:  # of before there was a model.json
        about = _about_of(folder / "adapter") or task.train_rows().about
    if known.get("base"):
        from fedlora_app.models.identity import refuse_another

        refuse_another(known["base"], settings.model.name)
    task.read_encoder(folder / "adapter")
    columns = known.get("columns", {})
    return LoadedRun(folder, settings, task, about, columns, _model(task, about, folder))


def _settings(flat: dict[str, Any], base: str | None, changed: Mapping[str, Scalar]) -> RunConfig:
    fixed = [key for key in changed if key.partition(".")[0] not in FREE or "." not in key]
    if fixed:
        raise ConfigError(
            [f"{key}: it made the model, and cannot differ from the run's" for key in fixed]
        )
    renamed = {} if base is None else {"model.name": base}
    return RunConfig.from_flat({**flat, **changed, **renamed})


def _about_of(adapter: Path) -> dict[str, Any]:
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in adapter.glob("*.json")
        if file.stem != "adapter_config"
    }


def _model(task: Task, about: Mapping[str, Any], folder: Path) -> PeftModel:
    """Return the base with the adapter in a run's folder."""
    import peft
    from safetensors.torch import load_file

    from fedlora_app.models.lora import add_lora
    from fedlora_app.training import default_device
    from strategies.client import load_adapter
    from strategies.lora import Adapter

    config, adapter = task.config, folder / "adapter"
    base = task.model(about, seed=config.seed, precision=config.train.precision)
    model = add_lora(base, config.lora, rank=1, seed=config.seed)
    settings = peft.LoraConfig.from_pretrained(str(adapter))
    state = load_file(adapter / "adapter_model.safetensors")
    load_adapter(model, Adapter.from_state_dict(state, config=settings))
    model.to(default_device())
    model.eval()
    return model
