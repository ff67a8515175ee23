"""``QualityRank``: who trains the best model in its first round gets the high rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from strategies.clients import Client
from strategies.lora import Adapter
from strategies.ranks.base import Explanation, RankPolicy, Settings, at_least_one
from strategies.trained import Trained

#: In a config: the client is to evaluate what it trained on its validation rows.
VALIDATE_KEY = "validate"
#: In a reply: the loss of that evaluation.
VALIDATION_LOSS = "validation-loss"

ScoreFn = Callable[[Adapter], float]


class QualityRank(RankPolicy):
    """Everyone starts low; the best of the locally trained models earn the high rank.

    Byun and Lee, https://arxiv.org/abs/2406.17477: all start at ``low``; after the first
    local round every client's own model is evaluated on a validation set, and the best
    10 % get ``high`` = 20, the others keep ``low`` = 5 [R].

    With partial participation a client's first round is the first in which it trains. Then
    [D]: clients are compared with those whose first round is the same, for later ones start
    from a better model; as many of them become high as it takes for ``fraction`` of all
    clients scored so far to be high, at least one in all; nobody becomes low again. A loss
    that is not finite never earns the high rank; ties go to the lower client index.

    Parameters
    ----------
    low, high : int (default: 5, 20)
    fraction : float (default: 0.1)
        Share of the clients that become high.
    score_fn : callable, optional
        ``score_fn(adapter) -> validation loss`` of a client's trained adapter, on the
        server's validation set. Without it, clients are asked (``validate`` in their
        training config) for ``validation-loss`` on rows of their own; their validation sets
        differ, so that comparison is rougher [D].

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "quality"

    def __init__(
        self,
        low: int = 5,
        high: int = 20,
        fraction: float = 0.1,
        *,
        score_fn: ScoreFn | None = None,
    ) -> None:
        self.low = at_least_one("low", low)
        self.high = high
        if low > high:
            raise ValueError(f"low ({low}) must not exceed high ({high})")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        self.fraction = fraction
        self.score_fn = score_fn
        self.metrics = () if score_fn else (VALIDATION_LOSS,)  # what clients are asked for
        self._losses: dict[int, float] = {}  # by client index
        self._rounds: dict[int, int] = {}  # the round each was scored in
        self._best: set[int] = set()
        self._judged = 0  # rounds up to this one are decided

    @property
    def max_rank(self) -> int:
        """The high rank."""
        return self.high

    @property
    def judges(self) -> bool:
        """Whether the server judges, by ``score_fn``."""
        return self.score_fn is not None

    def train_settings(self, client: Client, server_round: int) -> Settings:
        """Ask a client that was not scored yet for its validation loss."""
        asked = self.score_fn is None and client.index not in self._losses
        return {VALIDATE_KEY: True} if asked else {}

    def observe(self, trained: Trained) -> None:
        """Score a client's first adapter."""
        index = trained.client.index
        if index in self._losses:
            return
        if self.score_fn is not None:
            loss = float(self.score_fn(trained.effective()))
        elif VALIDATION_LOSS in trained.metrics:
            loss = float(trained.metrics[VALIDATION_LOSS])
        else:
            raise ValueError(
                f"{VALIDATION_LOSS} is missing in the reply, so the client stays at rank "
                f"{self.low}; report it when the config says {VALIDATE_KEY!r}, or give score_fn"
            )
        self._losses[index] = loss if math.isfinite(loss) else math.inf
        self._rounds[index] = trained.server_round

    def forget(self, index: int) -> None:
        """Forget a score, so that whoever has the place begins low, and is judged."""
        self._losses.pop(index, None)
        self._rounds.pop(index, None)
        self._best.discard(index)

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the high rank for the best of earlier rounds, the low one for the others."""
        open_rounds = {n for n in self._rounds.values() if self._judged < n < server_round}
        for number in sorted(open_rounds):
            self._judge(number)
            self._judged = number
        return [self.high if client.index in self._best else self.low for client in clients]

    def _judge(self, number: int) -> None:
        scored = sum(n <= number for n in self._rounds.values())
        places = max(1, math.floor(self.fraction * scored + 0.5)) - len(self._best)
        cohort = [i for i, n in self._rounds.items() if n == number]
        cohort = [i for i in cohort if math.isfinite(self._losses[i])]
        cohort.sort(key=lambda index: (self._losses[index], index))
        self._best.update(cohort[: max(0, places)])

    def explain(self) -> Explanation:
        """Return the validation losses."""
        finite = {i: loss for i, loss in self._losses.items() if math.isfinite(loss)}
        losses = {i: {VALIDATION_LOSS: finite.get(i)} for i in sorted(self._losses)}
        return Explanation(losses)

    def state_dict(self) -> dict[str, Any]:
        """Return losses and who is high, by client index."""
        # JSON has no infinity.
        losses = {str(i): x if math.isfinite(x) else None for i, x in self._losses.items()}
        return {
            "losses": losses,
            "rounds": {str(i): n for i, n in self._rounds.items()},
            "best": sorted(self._best),
            "judged": self._judged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._losses = {int(i): math.inf if x is None else x for i, x in state["losses"].items()}
        self._rounds = {int(i): int(n) for i, n in state["rounds"].items()}
        self._best = {int(i) for i in state["best"]}
        self._judged = int(state["judged"])

    def summary(self) -> str:
        """Return the settings in one line."""
        judge = "the clients' own rows" if self.score_fn is None else "the server's rows"
        return f"{self.name} ({self.low}, best {self.fraction:.0%} {self.high}, by {judge})"
