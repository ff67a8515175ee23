"""``SelfPruningRank``: a client whose last rank entries fade gives them up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from strategies.clients import Client
from strategies.lora import Adapter
from strategies.ranks.base import Explanation, RankPolicy, Settings, UniformRank
from strategies.trained import Trained

#: In a config: the tail begins at entry ``γ · r``, and its weight λ in the loss.
GAMMA_KEY = "prune-gamma"
PENALTY_KEY = "prune-penalty"


class SelfPruningRank(RankPolicy):
    """HetLoRA's rank self-pruning: shrink the rank of who does not use it.

    HetLoRA, https://arxiv.org/abs/2401.06432. The client adds ``λ Σ ‖B[:, γr:]‖·‖A[γr:, :]‖``
    to its loss; if that tail is smaller after the round than before, ``r ← ⌈γ r⌉``, with
    γ = 0.99 and λ = 1e-3 [R]. Decided here [D]: the tail begins at ``⌊γ r⌋`` and has at least
    one entry; the products are summed over the modules, because a client has one rank; the
    server compares what it sent with what came back, so a client reports nothing more; who
    holds which rank at first comes from another policy.

    With the published γ nothing shrinks below rank 100: ``⌈0.99 · 32⌉ = 32``. That is what
    the rule says; for smaller ranks choose γ ≤ 1 − 1/r, e.g. 0.9. In round 1, B is zero, so
    the tail cannot fall; neither can it with rules whose clients restart every round
    (``flora``).

    Parameters
    ----------
    start : RankPolicy or int (default: 32)
        The ranks clients start with.
    gamma : float (default: 0.99)
        Share of its rank that a client keeps.
    penalty : float (default: 1e-3)
        λ; sent to the clients as ``prune-penalty``, with γ as ``prune-gamma``.
        ``strategies.client.tail_penalty`` computes the term.
    min_rank : int (default: 1)
        Nobody shrinks below this.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "self-pruning"

    def __init__(
        self,
        start: RankPolicy | int = 32,
        *,
        gamma: float = 0.99,
        penalty: float = 1e-3,
        min_rank: int = 1,
    ) -> None:
        self.start = UniformRank(start) if isinstance(start, int) else start
        if self.start.profiles or self.start.metrics or self.start.judges:
            raise ValueError(
                "start: expected a policy that asks nothing of clients and judges none, got "
                f"{self.start.name!r}"
            )
        if not 0 < gamma < 1:
            raise ValueError(f"gamma: expected a number between 0 and 1, got {gamma!r}")
        if not (math.isfinite(penalty) and penalty >= 0):
            raise ValueError(f"penalty: expected 0 or more, got {penalty!r}")
        if not 1 <= min_rank <= self.start.max_rank:
            raise ValueError(
                f"min_rank: expected 1 to {self.start.max_rank} (the largest start), got {min_rank}"
            )
        self.gamma = gamma
        self.penalty = penalty
        self.min_rank = min_rank
        self._ranks: dict[int, int] = {}  # by client index; who never shrank has none
        self._held: dict[int, int] = {}  # in this round; a rule may send a part of it
        self._tails: dict[int, tuple[float, float]] = {}

    @property
    def max_rank(self) -> int:
        """The largest rank at the start."""
        return self.start.max_rank

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the start or what is left of it."""
        starts = self.start.choose(clients, server_round)
        held = [
            min(start, self._ranks.get(client.index, start))
            for client, start in zip(clients, starts, strict=True)
        ]
        for client, rank in zip(clients, held, strict=True):
            self._held[client.index] = min(rank, client.max_rank or rank)
        return held

    def serves(self, client: Client) -> bool:
        """Return whether the start has a rank for it."""
        return self.start.serves(client)

    @property
    def judges(self) -> bool:
        """Whether it looks at tails: always."""
        return True

    def train_settings(self, client: Client, server_round: int) -> Settings:
        """Return γ and λ."""
        return {GAMMA_KEY: self.gamma, PENALTY_KEY: self.penalty}

    def observe(self, trained: Trained) -> None:
        """Shrink a client whose tail fell."""
        index = trained.client.index
        rank = self._held.get(index, trained.sent.rank)
        before, after = (tail_norm(a, self.gamma) for a in (trained.sent, trained.adapter))
        self._tails[index] = before, after
        if after < before:
            # 0.55 · 20 is 11.000000000000002 in floating point
            self._ranks[index] = max(
                math.ceil(round(self.gamma * rank, 9)), min(self.min_rank, rank)
            )

    def forget(self, index: int) -> None:
        """Forget what another pruned: whoever has the place begins at the start."""
        self.start.forget(index)
        for known in (self._ranks, self._held, self._tails):
            known.pop(index, None)  # type: ignore[attr-defined]

    def explain(self) -> Explanation:
        """Return the tails before and after each client's last round."""
        return Explanation(
            {i: {"tail-before": b, "tail-after": a} for i, (b, a) in sorted(self._tails.items())}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the ranks that shrank, by client index."""
        return {"ranks": {str(i): r for i, r in sorted(self._ranks.items())}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._ranks = {int(i): int(r) for i, r in state["ranks"].items()}

    def summary(self) -> str:
        """Return the settings in one line."""
        start = self.start.summary()
        return f"{self.name} from {start}, gamma {self.gamma:g}, at least {self.min_rank}"


def tail_start(rank: int, gamma: float) -> int:
    """Return where the tail of a rank axis begins; it has at least one entry."""
    return min(math.floor(round(gamma * rank, 9)), rank - 1)


def tail_norm(adapter: Adapter, gamma: float) -> float:
    """Return ``Σ ‖B[:, γr:]‖·‖A[γr:, :]‖`` over the modules of an adapter."""
    total = 0.0
    for pair in adapter.pairs.values():
        k = tail_start(pair.rank, gamma)
        total += float(pair.B[:, k:].float().norm()) * float(pair.A[k:].float().norm())
    return total
