"""The rounds of a run that another strategy's loop drives, as Flower's wrappers do."""

from __future__ import annotations

import math
from logging import INFO

from flwr.app import ArrayRecord
from flwr.common import log
from flwr.serverapp.strategy import Result

from strategies.loop import StreamingStrategy


class Following:
    """Begins and ends the rounds that a loop calls for which knows of neither."""

    def __init__(self) -> None:
        self.result = Result(arrays=ArrayRecord())
        # The round that loop is at; 0: that is over, None: there was none yet.
        self._round: int | None = None

    def begin(self, run: StreamingStrategy, server_round: int, arrays: ArrayRecord) -> None:
        """Begin a round, and before the first one the run."""
        if self._round is None:
            run.check(arrays)
            self.result = Result(arrays=arrays)
            run.begin(run.resume(self.result))
            run.round_over(0, self.result)
        else:
            self.over(run)  # a loop that never evaluates
        self._round = server_round
        self.result.arrays = arrays

    def over(self, run: StreamingStrategy) -> None:
        """Look back at a round, once.

        Raises
        ------
        RuntimeError
            If the run ends: another loop offers no other way.
        """
        if not self._round:
            return
        number, self._round = self._round, 0
        run.tell(run.round.record())
        log(INFO, "%s", run.round_line(0, math.nan))
        run.ended = run.reached(number)
        run.round_over(number, self.result)
        if run.ended:
            run.finish(number)
            raise RuntimeError(f"the run ended after round {number}: {run.ended}")
