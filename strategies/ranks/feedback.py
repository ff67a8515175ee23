"""``FeedbackRank``: ranks that follow what the run shows, at the bytes of one rank for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from strategies.clients import Client
from strategies.lora import Adapter
from strategies.messages import training_loss
from strategies.ranks.base import Explanation, RankPolicy, at_least_one, mean_between
from strategies.ranks.holders import caps_of, divided, number_of_holders, whole_budget
from strategies.trained import Trained

MEASURES = ("energy", "loss")
#: No score counts more than so many times the median: clients may report and train anything.
MOST = 4.0


class FeedbackRank(RankPolicy):
    """Start with one rank for all; then move rank to where the run shows that it is used.

    Published nowhere; all of it is this project's decision [D]. After each good reply a client is
    scored by

    - ``energy``: how many directions its update has, ``(Σσ²)²/Σσ⁴`` with σ the singular values of
      ``B'A' − BA`` (``effective_rank``). A client whose update lies in a few directions loses
      nothing by a smaller rank; one whose last directions carry as much as its first would use
      more. The server computes it, nothing more leaves a client;
    - ``loss``: its training loss, what is left for it to learn. A client that sees one class has
      none left after a few steps.

    A score is taken in units of the median of its round, for losses fall as the run goes, and who
    was not asked for a while must not count by an old one. Then scores are smoothed and bounded by
    ``MOST`` medians. Before rounds N + 1, 2N + 1, … the sum of ranks is divided in proportion to
    them; whoever was not heard of counts as the mean.
    **Every entry is held by at least ``holders`` of the clients**, so that the last ones are not
    left to one or two (``strategies.ranks.holders``). Ranks settle where each is the same multiple
    of the client's score at that rank: an effective rank grows more slowly than the rank.

    Parameters
    ----------
    mean : float (default: 8)
        Mean rank of the connected clients, so the bytes of one rank for all.
    min_rank, max_rank : int (default: 2, 32)
    measure : "energy" or "loss" (default: "energy")
    every : int (default: 1)
        Assign anew every so many rounds.
    holders : float (default: 0.3)
        Share of the clients that hold every entry at least.
    smoothing : float (default: 0.5)
        Weight of the newest score, in (0, 1].

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name = "feedback"
    divides_budget = True

    def __init__(
        self,
        mean: float = 8,
        min_rank: int = 2,
        max_rank: int = 32,
        *,
        measure: str = "energy",
        every: int = 1,
        holders: float = 0.3,
        smoothing: float = 0.5,
    ) -> None:
        self.min_rank, self._max_rank = at_least_one("min_rank", min_rank), max_rank
        if measure not in MEASURES:
            raise ValueError(f"measure: expected one of {', '.join(MEASURES)}; got {measure!r}")
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every!r}")
        for what, value in (("holders", holders), ("smoothing", smoothing)):
            if not 0 < value <= 1:
                raise ValueError(f"{what}: expected a number in (0, 1], got {value!r}")
        self.mean = mean_between(mean, min_rank, max_rank)
        self.measure, self.every = measure, every
        self.holders, self.smoothing = holders, smoothing
        self.reads_loss = measure == "loss"
        self._fresh: dict[int, float] = {}  # of the round in progress, by client index
        self._scores: dict[int, float] = {}
        self._used: dict[int, float] = {}  # those of the assignment in effect
        self._present: tuple[int, ...] = ()
        self._notes: list[str] = []

    @property
    def max_rank(self) -> int:
        """The largest rank a client can get."""
        return self._max_rank

    @property
    def judges(self) -> bool:
        """Whether it looks at whole adapters: by their energy."""
        return self.measure == "energy"

    def observe(self, trained: Trained) -> None:
        """Score a good reply.

        Raises
        ------
        ValueError
            If there is nothing to score it by.
        """
        if self.measure == "energy":
            score = effective_rank(trained.sent, trained.adapter)
        else:
            loss = training_loss(trained.metrics)
            if loss is None:
                raise ValueError("the reply has no loss, so the client counts as the mean")
            score = float(loss)
        if not (math.isfinite(score) and score >= 0):
            raise ValueError(f"its {self.measure} is {score!r}, so the client counts as before")
        self._fresh[trained.client.index] = score

    def _settle(self) -> None:
        """Take the scores of a round that is over, in units of their median."""
        fresh, self._fresh = self._fresh, {}
        unit = float(np.median(list(fresh.values()))) if fresh else 0.0
        for index, score in fresh.items():
            relative = score / unit if unit > 0 else 1.0
            before = self._scores.get(index, relative)
            self._scores[index] = before + self.smoothing * (relative - before)

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the ranks in effect, divided anew where that is due."""
        self._settle()
        present = tuple(sorted(client.index for client in clients))
        due = (server_round - 1) % self.every == 0
        if due or present != self._present:
            if due:
                self._used = dict(self._scores)
            self._present = present
        scores = bounded([self._used.get(client.index) for client in clients])
        total, rest = whole_budget(self.mean, len(clients))
        ranks, note = divided(
            scores, total, self.min_rank, self.max_rank, caps_of(clients, self.max_rank),
            number_of_holders(self.holders, len(clients)),
        )  # fmt: skip
        self._notes = [text for text in (rest, note) if text]
        return [int(rank) for rank in ranks]

    def forget(self, index: int) -> None:
        """Forget a score: whoever has the place counts as the mean."""
        self._fresh.pop(index, None)
        self._scores.pop(index, None)
        self._used.pop(index, None)

    def explain(self) -> Explanation:
        """Return the scores that the ranks are divided by."""
        scores = {i: {self.measure: score} for i, score in sorted(self._used.items())}
        return Explanation(scores, notes=self._notes)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, by client index."""
        self._settle()
        return {
            "scores": {str(i): x for i, x in sorted(self._scores.items())},
            "used": {str(i): x for i, x in sorted(self._used.items())},
            "present": list(self._present),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._scores = {int(i): float(x) for i, x in state["scores"].items()}
        self._used = {int(i): float(x) for i, x in state["used"].items()}
        self._present = tuple(int(i) for i in state["present"])

    def summary(self) -> str:
        """Return the settings in one line."""
        return (
            f"{self.name} by {self.measure} ({self.min_rank} to {self.max_rank}, mean "
            f"{self.mean:g}, every entry of {self.holders:.0%} of the clients)"
        )


def bounded(scores: Sequence[float | None]) -> list[float]:
    """Return scores of at most ``MOST`` times their median; those not known are the mean.

    Where nothing is known, or all is 0, everybody has 1.
    """
    known = np.array([score for score in scores if score is not None])
    if not known.any():
        return [1.0] * len(scores)
    most = MOST * float(np.median(known))
    if most > 0:
        known = known.clip(max=most)
    mean = float(known.mean())
    return [mean if score is None else min(score, most) if most > 0 else score for score in scores]


def effective_rank(sent: Adapter, trained: Adapter) -> float:
    """Return how many directions an update has, from 1; 0 if it is zero.

    ``(Σσ²)²/Σσ⁴`` with σ the singular values of ``D = B'A' − BA``: so many equal ones would have
    the same two sums. Mean over the modules, weighed by ``Σσ²``. No decomposition is needed: with
    ``D = X Y``, ``X = [B' − B, B]``, ``Y = [A'; A' − A]``, the sums are the traces of ``K`` and
    ``K²``, ``K = XᵀX YYᵀ``.

    Parameters
    ----------
    sent, trained : Adapter
        Of one rank and scale.
    """
    total = energy = 0.0
    for module, new in trained.pairs.items():
        old = sent.pairs[module]
        newA, newB = new.A.float(), new.B.float()
        Y = torch.cat([newA, newA - old.A.float()])
        X = torch.cat([newB - old.B.float(), old.B.float()], dim=1)
        K = (X.T @ X).double() @ (Y @ Y.T).double()
        size, squares = float(K.trace()), float((K * K.T).sum())
        if size > 0 and squares > 0:
            total += size * size**2 / squares
            energy += size
    return total / energy if energy else 0.0
