"""One good reply, for policies that learn from what clients train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

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

    def unmoved(self, factors: str) -> str:
        """Return which of the factors that were to be trained came back exactly as they were sent.

        Not a factor whose partner was 0 everywhere, as B is at first: its gradient is 0 then.
        """
        return "".join(factor for factor in factors if self._stayed(factor))

    def _stayed(self, factor: str) -> bool:
        other = "B" if factor == "A" else "A"
        pairs = [(pair, self.sent.pairs[m]) for m, pair in self.adapter.pairs.items()]
        return (
            bool(pairs)
            and all(torch.equal(getattr(new, factor), getattr(old, factor)) for new, old in pairs)
            and any(bool(getattr(old, other).any()) for _, old in pairs)
        )

    def unmoved_dense(self) -> bool:
        """Return whether all that is no LoRA factor came back exactly as it was sent."""
        return all(
            torch.equal(new, self.sent.dense[key])
            for key, new in self.adapter.dense.items()
            if key in self.sent.dense
        )

    def effective(self) -> Adapter:
        """Return the client's whole model as one adapter on the base."""
        return GlobalModel(self.adapter, self.merged).combined()
