"""The baseline without a federation: every client trains alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import INFO
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.common import log

from fedlora_app.held_out import HeldOut
from fedlora_app.tasks import LOSS
from strategies import FedLoRA
from strategies.client import load_adapter
from strategies.clients import Client
from strategies.lora import Adapter
from strategies.records import RoundWarning

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
