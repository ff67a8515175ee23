"""One good reply, for policies that learn from what clients train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from strategies.clients import Client
from strategies.lora import Adapter
from strategies.model import GlobalModel


@dataclass(frozen=True)
class Trained:
    """One good reply, for rank policies and samplers that learn from what clients train.

    Parameters
    ----------
    client : Client
    adapter, sent : Adapter
        What came back, and what the client had started from.
    metrics : Mapping[str, float]
        Every number of the reply.
    server_round : int
    merged : Adapter
        What was merged into the base before, for rules that do.
    """

    client: Client
    adapter: Adapter
    sent: Adapter
    metrics: Mapping[str, float]
    server_round: int
    merged: Adapter = field(default_factory=lambda: Adapter({}))

    def effective(self) -> Adapter:
        """Return the client's whole model as one adapter on the base."""
        return GlobalModel(self.adapter, self.merged).combined()
