"""What a run leaves behind: one folder with config, metrics, summary, adapter and plots."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.common import log

from fedlora_app.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import

Record = Mapping[str, Any]


class RunFolder:
    """The folder of one run; a listener of the strategy that writes as things happen.

    Parameters
    ----------
    path : Path
        Created if needed. Holds afterwards ``config.json``, ``metrics.jsonl``,
        ``summary.json``, ``adapter/`` and the plots.
    config : RunConfig
        Written at once, as it is in effect.

    Raises
    ------
    ConfigError
        If the folder already holds a run; nothing is overwritten.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path.expanduser().absolute()
        refuse_used(self.path)
        self.config = config
        self.rounds: list[Record] = []
        self.last_reason = "nobody was asked"
        self._began = time.perf_counter()
        metrics = self.path / "metrics.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        _write_json(self.path / "config.json", config.to_flat())
        self._metrics = metrics.open("a", encoding="utf-8", buffering=1)  # a line at a time

    def __call__(self, record: Record) -> None:
        """Append one record to ``metrics.jsonl``."""
        since = round(time.perf_counter() - self._began, 3)
        self._metrics.write(json.dumps({**_plain(record), "at": since}) + "\n")
        if record["kind"] == "round":
            self.rounds.append(record)
        elif record.get("status") == "rejected":
            self.last_reason = record["reason"]

    def finish(self, scores: Mapping[str, float], model: PeftModel, *, seconds: float) -> None:
        """Write adapter, plots and summary, and log the table.

        Parameters
        ----------
        scores : Mapping[str, float]
            Final scores on the whole test set.
        model : PeftModel
            Holds the final global adapter.
        seconds : float
            Duration of the run.
        """
        self._metrics.close()
        adapter = self.path / "adapter"
        model.save_pretrained(str(adapter), save_embedding_layers=False)
        summary = {
            "method": self.config.method,
            "aggregation": self.config.aggregation,
            "seed": self.config.seed,
            "rounds": max((r["round"] for r in self.rounds), default=0),
            **scores,
            "seconds": round(seconds, 2),
            "bytes_up": sum(r["bytes_up"] for r in self.rounds),
            "bytes_down": sum(r["bytes_down"] for r in self.rounds),
            "rejected": sum(r["rejected"] for r in self.rounds),
            "adapter": str(adapter),
        }
        plots = plot(self.rounds, self.path)
        _write_json(self.path / "summary.json", _plain(summary))  # last: it says all is there
        for line in table(self.rounds, summary):
            log(INFO, "%s", line)
        log(INFO, "outputs in %s", self.path)
        names = ["summary.json", "metrics.jsonl", "config.json", "adapter/", *plots]
        log(INFO, "  %s", "  ".join(names))


def refuse_used(folder: Path) -> None:
    """Refuse a folder that already holds a run.

    Raises
    ------
    ConfigError
    """
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(
            [f"output: {folder} already holds a run; name another folder or remove it"]
        )


def table(rounds: Iterable[Record], summary: Record) -> list[str]:
    """Return the rounds and the final scores as lines of text."""
    columns = (
        ("round", "round", "{:d}"),
        ("clients", "accepted", "{:d}"),
        ("train loss", "train_loss", "{:.3f}"),
        ("accuracy", "server_accuracy", "{:.3f}"),
        ("macro-F1", "server_macro_f1", "{:.3f}"),
        ("own data", "clients_accuracy", "{:.3f}"),
        ("worst", "clients_accuracy_worst", "{:.3f}"),
        ("MB down", "bytes_down", "{:.2f}"),
        ("MB up", "bytes_up", "{:.2f}"),
        ("seconds", "seconds", "{:.1f}"),
    )
    lines = ["  ".join(f"{title:>10}" for title, _, _ in columns)]
    for record in rounds:
        cells = []
        for _, key, pattern in columns:
            value = record.get(key)
            if value is not None and key.startswith("bytes"):
                value /= 1e6
            cells.append(f"{'-' if value is None else pattern.format(value):>10}")
        lines.append("  ".join(cells))
    megabytes = (summary["bytes_down"] + summary["bytes_up"]) / 1e6
    whose = "mean of the clients alone: " if summary["method"] == "local" else ""
    lines.append(
        f"final: {whose}accuracy {summary['accuracy']:.3f}, macro-F1 {summary['macro_f1']:.3f}, "
        f"loss {summary['loss']:.3f} on the whole test set; "
        f"{megabytes:.1f} MB moved, {summary['seconds']:.0f} s"
    )
    return lines


def plot(rounds: list[Record], folder: Path) -> list[str]:
    """Draw accuracy, loss and bytes over rounds; return the names of the PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    megabytes = []
    total = 0.0
    for record in rounds:
        total += (record["bytes_down"] + record["bytes_up"]) / 1e6
        megabytes.append({**record, "megabytes": total})
    figures = {
        "accuracy": {
            "server_accuracy": "accuracy, server's test set",
            "server_macro_f1": "macro-F1, server's test set",
            "clients_accuracy": "accuracy, clients' own rows (mean)",
            "clients_accuracy_worst": "accuracy, clients' own rows (worst)",
        },
        "loss": {
            "train_loss": "training loss, clients",
            "server_loss": "loss, server's test set",
            "clients_loss": "loss, clients' own rows (mean)",
        },
        "bytes": {"megabytes": "MB moved since the start, both ways"},
    }
    names = []
    for name, curves in figures.items():
        figure, axes = pyplot.subplots(figsize=(6.4, 4))
        for key, label in curves.items():
            points = [(r["round"], r[key]) for r in megabytes if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name == "accuracy":
            axes.set_ylim(0, 1)
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=120)
        pyplot.close(figure)
        names.append(f"{name}.png")
    return names


def _plain(record: Record) -> dict[str, Any]:
    """Return the record with NaN and Inf, which JSON does not have, as null."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
