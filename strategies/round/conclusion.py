"""The end of a round: the sum of the replies becomes the next global model, or nothing does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from logging import WARNING
from typing import Any

import torch
from flwr.common import log

from strategies.aggregation import Aggregator
from strategies.listing import listed
from strategies.model import GlobalModel
from strategies.optimizers import ServerOptimizer
from strategies.privacy import NoPrivacy, PrivateRun
from strategies.privacy.outside import OutsideNoise
from strategies.rounds import Round


class Conclusion:
    """Says whether a round changes the model, and to what.

    Parameters
    ----------
    rule : Aggregator
    privacy : PrivateRun or NoPrivacy
        May add the server's own noise.
    outside : OutsideNoise
    min_replies : int
        With fewer good ones the model stays as it was.
    optimizer : ServerOptimizer, optional
        Takes the change for a gradient.
    """

    def __init__(
        self,
        rule: Aggregator[Any],
        privacy: PrivateRun | NoPrivacy,
        outside: OutsideNoise,
        min_replies: int,
        optimizer: ServerOptimizer | None = None,
    ) -> None:
        self.rule = rule
        self.privacy = privacy
        self.outside = outside
        self.min_replies = min_replies
        self.optimizer = optimizer

    def next_model(
        self, state: Any, model: GlobalModel, book: Round, short: Sequence[str]
    ) -> GlobalModel | None:
        """Return the next model; None, with a warning, where it stays as it was.

        Parameters
        ----------
        state : State
            The rule's own, with all good replies in it.
        model : GlobalModel
            The model of this round.
        book : Round
            Is told what was spent, and how long it took.
        short : sequence of str
            Why noise of a strategy around this one would be too little in this round.
        """
        if book.accepted < self.min_replies and not self.privacy.tops_up:
            log(WARNING, "round %s: %s good replies, fewer than min_replies = %s; the model "
                "stays as it was", book.number, book.accepted, self.min_replies)  # fmt: skip
            return None
        if short and self.outside.expected:
            log(WARNING, "round %s: %s; the model stays as it was, for the noise of the strategy "
                "around this one would be too little", book.number, "; ".join(short))  # fmt: skip
            return None
        clock = time.perf_counter()
        try:
            result = self.rule.finish(state)
            if result.left_out:
                names = listed([book.taken[i] for i in result.left_out])
                log(WARNING, "round %s: left out, as unlike the others: %s", book.number, names)
            answered = [assignment.client.index for assignment in book.answered()]
            adapter = self.privacy.finish(result.adapter, answered, self.rule.uploaded())
            book.privacy = self.privacy.spent()
            moments = None
            if self.optimizer is not None:
                reach, keys = state.reach, set(state.dense_mass)
                if self.privacy.tops_up:  # who took part must not be seen
                    reach = {m: torch.ones(r, dtype=torch.bool) for m, r in adapter.ranks.items()}
                    keys = set(adapter.dense)
                factors = self.rule.uploaded()
                adapter, moments = self.optimizer.step(model.adapter, adapter, reach, keys, factors)
            problems = adapter.non_finite()
        except (RuntimeError, ArithmeticError) as error:  # no decomposition, or an overflow
            problems = [str(error)]
        book.aggregate_seconds += time.perf_counter() - clock
        if problems:
            log(WARNING, "round %s: the aggregate is unusable (%s); the model stays as it was",
                book.number, "; ".join(problems[:3]))  # fmt: skip
            return None
        if self.optimizer is not None and moments is not None:
            self.optimizer.moments = moments
        return replace(model.merging(result.base_delta), adapter=adapter)
