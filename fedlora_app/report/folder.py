"""What a run leaves behind: one folder with config, metrics, summary, adapter and plots.

``fedlora report RUN`` writes ``RUN/report.html``, also while the run goes on.
"""

from __future__ import annotations

import io
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from logging import INFO, WARNING
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from flwr.common import log
from safetensors import SafetensorError

from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.launch.folders import refuse_used
from fedlora_app.report.plots import plot_run
from fedlora_app.report.records import (
    Fields,
    RecordsError,
    line_of,
    numbers,
    read_records,
    write_json,
    write_lines,
)
from fedlora_app.report.scores import first_of
from fedlora_app.tasks import LOSS, Sample, Score, Task, make_task
from strategies.records import EndRecord, Record, RoundRecord

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import

MODEL_FORMAT = 1  #: of ``model.json``; goes up when a field changes its meaning
PACKAGES = ("flwr", "peft", "torch", "transformers")  # whose versions may matter later


class RunFolder:
    """The folder of one run; a listener of the strategy that writes as things happen.

    Parameters
    ----------
    path : Path
        Created by ``begin``, and nothing before. Holds afterwards ``config.json``,
        ``metrics.jsonl``, ``summary.json``, ``adapter/``, ``model.json`` and the plots.
    config : RunConfig
        Written by ``begin``, as it is in effect.
    about : mapping
        What the task says of its data; for ``summary.json`` and the adapter.
    columns : mapping, optional
        The columns by role of the test rows; kept for who asks the model later.
    resume_round : int, optional
        Go on with the run in this folder after this round: its records are kept, later ones
        are dropped. (default: begin a new run)

    Attributes
    ----------
    rounds : list of RoundRecord
        The ``round`` records so far, kept ones included.

    Raises
    ------
    ConfigError
        If the folder already holds a run and ``resume_round`` is not given; nothing is
        overwritten.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        about: Mapping[str, Any] = MappingProxyType({}),
        *,
        columns: Mapping[str, str] = MappingProxyType({}),
        resume_round: int | None = None,
    ) -> None:
        self.path = path.expanduser().absolute()
        if resume_round is None:
            refuse_used(self.path)
        self.config = config
        self.about = dict(about)
        self.columns = dict(columns)
        self.rounds: list[RoundRecord] = []
        self.last_reason = "nobody was asked"
        self._end: EndRecord | None = None
        self._resume_round = resume_round
        self._before = 0.0  # seconds of the run until it was interrupted
        self._began = time.perf_counter()
        self._metrics: io.FileIO | None = None
        self._written = 0
        self._waiting: list[str] = []  # lines that are not in the file yet
        self._kept: list[Record] = []
        if resume_round is not None:
            self._read(resume_round)

    def begin(self) -> None:
        """Make the folder, or cut what it holds to the round that is resumed from."""
        metrics = self.path / "metrics.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        if self._resume_round is not None:
            write_lines(metrics, self._kept)
            (self.path / "summary.json").unlink(missing_ok=True)
        write_json(self.path / "config.json", self.config.to_flat())
        # Without a buffer, so that it is known what is in the file.
        self._metrics = metrics.open("ab", buffering=0)
        self._written = metrics.stat().st_size
        self._write()

    def __call__(self, record: Record) -> None:
        """Append one record to ``metrics.jsonl``; a full disk does not end the run."""
        since = round(self._before + time.perf_counter() - self._began, 3)
        self._waiting.append(line_of({**cast(Fields, record), "at": since}))
        self._write()
        self._note(record)

    def keep(self, samples: Sequence[Sample], server_round: int) -> None:
        """Append what the model of a round made of some rows; nothing without samples."""
        if samples:
            kept = [asdict(sample) for sample in samples]
            self({"kind": "samples", "round": server_round, "samples": kept})

    def _write(self) -> None:
        """Append all lines that wait, or none of them."""
        if self._metrics is None:
            return
        lines = "".join(self._waiting).encode()
        try:
            done = 0
            while done < len(lines):
                done += self._metrics.write(lines[done:])
        except OSError as error:  # they go out with a later one
            log(WARNING, "cannot write %s yet: %s", self.path / "metrics.jsonl", error)
            with suppress(OSError):
                self._metrics.truncate(self._written)
        else:
            self._written += len(lines)
            self._waiting = []

    def finish(self, scores: Mapping[str, float], model: PeftModel, *, seconds: float) -> None:
        """Write adapter, plots and summary, and log the table.

        Parameters
        ----------
        scores : Mapping[str, float]
            Final scores on the whole test set.
        model : PeftModel
            Holds the final global adapter.
        seconds : float
            Duration of the run, since it was resumed if it was.

        Raises
        ------
        RuntimeError
            If it cannot be written, mostly since the disk is full; nothing of before is lost.
        """
        try:
            self._finish(scores, model, seconds)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"the rounds are done, but the results cannot be written to {self.path}: {error}; "
                f"{how_to_go_on(self.path)}"
            ) from error

    def _finish(self, scores: Mapping[str, float], model: PeftModel, seconds: float) -> None:
        self._write()
        if self._metrics is not None:
            self._metrics.close()
        adapter = self.path / "adapter"
        task = make_task(self.config)
        save_model(self.path, model, task, self.about, self.columns)
        end: Fields = self._end or {}
        summary = {
            "method": self.config.method,
            "task": self.config.task,
            "aggregation": self.config.aggregation,
            "seed": self.config.seed,
            "rounds": max((r["round"] for r in self.rounds), default=0),
            **scores,
            "seconds": round(self._before + seconds, 2),
            **clock_total(self.rounds),
            "bytes_up": sum(r["bytes_up"] for r in self.rounds),
            "bytes_down": sum(r["bytes_down"] for r in self.rounds),
            "rejected": sum(r["rejected"] for r in self.rounds),
            "ended": end.get("reason", ""),
            "never_took_part": end.get("never_took_part", []),
            **self.about,
            "adapter": str(adapter),
        }
        plots = plot_run(self.rounds, self.path, task.scores)
        write_json(self.path / "summary.json", summary)  # last: it says all is there
        for line in table(self.rounds, summary, task.scores):
            log(INFO, "%s", line)
        log(INFO, "outputs in %s", self.path)
        names = ["summary.json", "metrics.jsonl", "config.json", "adapter/", *plots]
        log(INFO, "  %s", "  ".join(names))

    def _note(self, record: Record) -> None:
        if record["kind"] == "round":
            self.rounds.append(record)
        elif record["kind"] == "end":
            self._end = record
        elif record["kind"] == "client" and record["status"] == "rejected":
            self.last_reason = record.get("reason", "")

    def _read(self, resume_round: int) -> None:
        """Read what ``metrics.jsonl`` has until the end of a round, as if it had ended there."""
        metrics = self.path / "metrics.jsonl"
        try:
            self._kept = until(read_records(metrics), resume_round) if metrics.exists() else []
        except RecordsError as error:
            raise ConfigError([f"resume-from: {error}"]) from error
        for record in self._kept:
            self._note(record)
        self._before = self._kept[-1].get("at", 0.0) if self._kept else 0.0
        known = {r["round"] for r in self.rounds}
        if lost := sorted(set(range(1, resume_round + 1)) - known):
            log(WARNING, "%s has no record of round %s, which the resumed run does not repeat",
                metrics, ", ".join(map(str, lost)))  # fmt: skip


def save_model(
    run: Path,
    model: PeftModel,
    task: Task,
    about: Mapping[str, Any],
    columns: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write ``adapter/`` and ``model.json``: with ``config.json`` all that ``load_run`` needs.

    Parameters
    ----------
    run : Path
        The run's folder.
    model : PeftModel
    task : Task
    about : mapping
        What the task says of its data.
    columns : mapping, optional
        The columns by role of the test rows.
    """
    from fedlora_app.models.identity import base_identity  # torch comes with it

    name = task.config.model.name
    save_adapter(model, run / "adapter", name, about, task.peft_type, encoder=task.save_encoder)
    versions = {package: version(package) for package in PACKAGES}
    kept = {
        "format": MODEL_FORMAT,
        "task": task.name,
        "base": base_identity(name),
        "about": dict(about),
        "columns": dict(columns),
        "versions": {"python": platform.python_version(), **versions},
    }
    write_json(run / "model.json", kept)


def save_adapter(
    model: PeftModel,
    folder: Path,
    model_name: str,
    about: Mapping[str, Any],
    peft_type: str | None = None,
    *,
    encoder: Callable[[Path], None] | None = None,
) -> None:
    """Write the adapter so that PEFT finds its base, and beside it what the task says of its data.

    Parameters
    ----------
    model : PeftModel
    folder : Path
    model_name : str
        The base model as the run config names it.
    about : mapping
        As of ``write_about``: PEFT's own files have no place for it.
    peft_type : str, optional
        PEFT's name of the task, set where the base is a model of transformers' own.
    encoder : callable, optional
        Writes into the folder what makes the model's inputs of rows.
    """
    config = model.peft_config["default"]
    path = Path(model_name).expanduser()
    config.base_model_name_or_path = str(path.absolute()) if path.is_dir() else model_name
    if peft_type and hasattr(model.get_base_model(), "base_model_prefix"):  # transformers' own
        config.task_type = peft_type
    new = folder.with_name(folder.name + ".new")  # the disk may be full: the old one stays
    try:
        model.save_pretrained(str(new), save_embedding_layers=False)
        write_about(new, about)
        if encoder is not None:
            encoder(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write each entry of what a task says of its data to a JSON file of its name."""
    for name, value in about.items():
        text = json.dumps(value, ensure_ascii=False, indent=2)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def how_to_go_on(run: Path) -> str:
    """Return what to do about a run whose results could not be written."""
    from strategies.checkpoint.format import rounds_in  # imports torch, which a page does not need

    folder = run / "checkpoints"
    if not (rounds := rounds_in(folder) if folder.is_dir() else {}):
        return "there is no checkpoint: free space and start it again, in another folder"
    return (
        f"the checkpoint of round {max(rounds)} stays in {folder}: free space, then run the same "
        'with --resume, or resume-from="latest" in a run config'
    )


def until(records: Iterable[Record], last_round: int) -> list[Record]:
    """Return the records up to the end of a round, in order.

    A record that names no round belongs to the time it was written in.
    """
    kept: list[Record] = []
    now = 0
    for record in records:
        now = record.get("round", now) if record["kind"] != "clock" else now
        if now <= last_round:
            kept.append(record)
    return kept


def clock_total(rounds: Iterable[RoundRecord]) -> dict[str, float]:
    """Return ``clock_seconds``, the time of all rounds by their clock; nothing without one."""
    totals = numbers(rounds, "clock_total")
    return {"clock_seconds": round(max(totals), 3)} if totals else {}


def table(
    rounds: Iterable[RoundRecord], summary: Mapping[str, Any], scores: Sequence[Score]
) -> list[str]:
    """Return the rounds and the final scores as lines of text."""
    rounds = list(rounds)
    first = first_of(scores)
    columns = [
        ("round", "round", "{:d}"),
        ("clients", "accepted", "{:d}"),
        ("train loss", "train_loss", "{:.3f}"),
        *((s.label, f"server_{s.name}", f"{{:.{s.digits}f}}") for s in scores or (first,)),
        ("own data", f"clients_{first.name}", f"{{:.{first.digits}f}}"),
        ("worst", f"clients_{first.name}_worst", f"{{:.{first.digits}f}}"),
        ("MB down", "bytes_down", "{:.2f}"),
        ("MB up", "bytes_up", "{:.2f}"),
        ("seconds", "seconds", "{:.1f}"),
    ]
    if any(r.get("clock_seconds") is not None for r in rounds):
        columns.append(("clock s", "clock_seconds", "{:.2f}"))
    wide = [max(10, len(title)) for title, _, _ in columns]
    lines = ["  ".join(f"{title:>{n}}" for n, (title, _, _) in zip(wide, columns, strict=True))]
    for record in rounds:
        cells = []
        for n, (_, key, pattern) in zip(wide, columns, strict=True):
            value = record.get(key)
            if isinstance(value, int | float) and key.startswith("bytes"):
                value /= 1e6
            cells.append(f"{'-' if value is None else pattern.format(value):>{n}}")
        lines.append("  ".join(cells))
    megabytes = (summary["bytes_down"] + summary["bytes_up"]) / 1e6
    whose = "mean of the clients alone: " if summary["method"] == "local" else ""
    clock: Any = summary.get("clock_seconds")
    final = ", ".join(f"{s.label} {s.text(summary.get(s.name))}" for s in (*scores, LOSS))
    lines.append(
        f"final: {whose}{final} on the whole test set; "
        f"{megabytes:.1f} MB moved, {summary['seconds']:.0f} s"
        + ("" if clock is None else f", {clock:.1f} s by the clock")
    )
    return lines
