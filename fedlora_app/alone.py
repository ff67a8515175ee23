"""Clients that train for themselves: alone from the start, or on from the federation's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import INFO
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from flwr.common import log
from flwr.serverapp import Grid

from fedlora_app.baselines import AFTER, BEFORE
from fedlora_app.held_out import HeldOut
from fedlora_app.tasks import LOSS
from strategies import FedLoRA
from strategies.arrivals import prompt
from strategies.client import load_adapter
from strategies.clients import Client
from strategies.lora import Adapter
from strategies.records import PersonalRecord, Record, RoundWarning
from strategies.sampling import FractionSampling
from strategies.scores import Score
from strategies.transport import exchange

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import


class Alone(FedLoRA):
    """Every client trains alone, and each result is tested by itself."""

    def __init__(self, test: HeldOut, model: PeftModel, **settings: Any) -> None:
        super().__init__(**settings)
        self.test = test
        self.model = model
        self.results: dict[Client, dict[str, float]] = {}

    def on_update(self, client: Client, adapter: Adapter) -> None:
        """Test one client's own adapter on the server's test set."""
        load_adapter(self.model, adapter)
        found = self.results[client] = self.test.evaluate(self.model, everything=True)
        shown = [f"{s.label} {s.text(found[s.name])}" for s in self.test.task.scores]
        log(INFO, "%s alone: %s", client.name, " ".join(shown))

    def odd_ranks(self, clients: Sequence[Client], ranks: Mapping[int, int]) -> list[RoundWarning]:
        """Return nothing: who trains alone shares no entry with anybody."""
        return []

    def final(self) -> dict[str, float]:
        """Return the mean of every score over the clients, and its best and worst."""
        out: dict[str, float] = {}
        for score in (*self.test.task.scores, LOSS):
            values = [found[score.name] for found in self.results.values()]
            out[score.name] = float(np.mean(values))
            out[f"{score.name}_best"] = score.best(values)
            out[f"{score.name}_worst"] = score.worst(values)
        return out


class OwnScores:
    """Listens to what clients that train for themselves score on rows they hold out.

    Parameters
    ----------
    scores : sequence of Score
        Of the task; the loss is known without.
    """

    def __init__(self, scores: Sequence[Score]) -> None:
        self.scores = (*scores, LOSS)
        self.clients: list[dict[str, Any]] = []

    def __call__(self, record: Record) -> None:
        """Keep what one client says."""
        if record["kind"] == "client" and record["status"] in ("ok", "late"):
            own = {k: v for k, v in record.items() if k.startswith((BEFORE, AFTER))}
            if own:
                rows = record.get("num-examples", 1)
                self.clients.append(
                    {"client": record["client"], "node": record["node"], "rows": rows, **own}
                )

    def record(self, server_round: int) -> PersonalRecord:
        """Return all of it as a record of the run."""
        return {"kind": "personal", "round": server_round, "clients": self.clients}

    def summary(self) -> dict[str, float]:
        """Return each score's mean over the clients by their rows, and that of the worst.

        ``own_NAME`` and ``own_NAME_worst`` are of the clients' models, ``own_NAME_global`` and
        ``own_NAME_global_worst`` of the model they began with, where they have told it.
        """
        out: dict[str, float] = {}
        for score in self.scores:
            for prefix, name in ((AFTER, score.name), (BEFORE, f"{score.name}_global")):
                known = [c for c in self.clients if f"{prefix}{score.name}" in c]
                if known:
                    values = [float(c[f"{prefix}{score.name}"]) for c in known]
                    weights = [c["rows"] for c in known]
                    out[f"own_{name}"] = float(np.average(values, weights=weights))
                    out[f"own_{name}_worst"] = score.worst(values)
        return out


def tune(
    strategy: FedLoRA,
    grid: Grid,
    arrays: ArrayRecord,
    config: ConfigRecord,
    own: OwnScores,
    *,
    timeout: float,
) -> None:
    """Have every client train on from the global model for itself, which stays as it is.

    Parameters
    ----------
    strategy : FedLoRA
        Its rounds are over: each client is sent what it would be in the next one.
    grid : Grid
    arrays : ArrayRecord
        The global model.
    config : ConfigRecord
        What clients are told, with ``baselines.TUNE_KEY`` and ``OWN_KEY``.
    own : OwnScores
        Is told what they score before and after. No other listener hears of this: it is no round.
    timeout : float
        Seconds.
    """
    grid = prompt(grid)
    listeners, strategy.listeners = strategy.listeners, [own]
    strategy.participation.sampler = FractionSampling()
    try:
        number = strategy.round.number + 1
        messages = strategy.configure_train(number, arrays, config, grid)
        replies = exchange(grid, messages, timeout, name=strategy.name_of)
        strategy.aggregate_train(number, replies)
    finally:
        strategy.listeners = listeners
    found = own.summary()
    for score in own.scores:
        if f"own_{score.name}" in found:
            before, after = found[f"own_{score.name}_global"], found[f"own_{score.name}"]
            log(INFO, "own rows of %s clients, %s: %s of the global model, %s tuned",
                len(own.clients), score.label, score.text(before), score.text(after))  # fmt: skip
