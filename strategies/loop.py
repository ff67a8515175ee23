"""The run as a loop over rounds, with replies folded in as they come."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategies.arrivals import prompt
from strategies.durations import duration
from strategies.messages import record_bytes
from strategies.records import RECORDS_VERSION, EndRecord, Record
from strategies.rounds import Round
from strategies.scores import Score
from strategies.transport import Meanwhile, exchange

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
StopFn = Callable[[int, Result], bool]
#: Is told every record, and may return why the run is to end after this round.
Listener = Callable[[Record], str | None]


class StreamingStrategy(Strategy):
    """Flower's run loop, but streaming: a reply is aggregated and dropped when it arrives.

    Parameters
    ----------
    evaluate_every : int (default: 1)
        Evaluate after every Nth round and after the last.
    evaluate_overlap : bool (default: False)
        Evaluate on the server while clients train in the next round, where nothing waits for the
        scores; results are the same. A listener that ends the run then does so a round later.
    listeners : Iterable[callable]
        Called with a record of ``strategies.records`` at each step; what one returns, if it is
        a text, is why the run ends after the round.
    """

    def __init__(
        self,
        *,
        evaluate_every: int = 1,
        evaluate_overlap: bool = False,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self.evaluate_every = evaluate_every
        self.evaluate_overlap = evaluate_overlap
        self.listeners = list(listeners)
        self.round = Round(0)
        self.num_rounds = 0  # 0: not known
        self.scores: tuple[Score, ...] = ()
        #: Why the run ended; empty while it goes on.
        self.ended = ""
        self._asked_to_end = ""
        self._held: list[Record] | None = None  # not told yet
        #: Whether somebody calls ``round_over`` after every round, as ``start`` does. Flower's own
        #: loop, which drives a strategy inside another, does not.
        self.led = False

    @abstractmethod
    def check(self, arrays: ArrayRecord) -> None:
        """Refuse initial arrays that cannot work, before anything is sent."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        should_stop: StopFn | None = None,
    ) -> Result:
        """Run ``num_rounds`` rounds; arguments and result as Flower's ``Strategy.start``.

        Unlike there, replies are folded in as they come instead of collected first, and
        the log has one line a round. ``should_stop(server_round, result)`` is asked after every
        round, as in Flower from 1.43 on, whichever is installed.
        """
        self.num_rounds = num_rounds
        self.led = True
        grid = prompt(grid)
        self.summary()
        self.check(initial_arrays)
        result = Result(arrays=initial_arrays)
        done = self.resume(result)
        self.begin(done)
        began = time.perf_counter()
        meanwhile: Meanwhile | None = None
        if not done:
            if evaluate_fn is not None:
                book = self.round
                evaluate = partial(
                    self._evaluate_on_server, 0, initial_arrays, evaluate_fn, result, book
                )
                if num_rounds and self.evaluation_can_wait:
                    meanwhile = Meanwhile(evaluate, partial(self._begun, book))
                else:
                    evaluate()
                    self._begun(book)
            self.round_over(0, result)
        self.ended = "" if done < num_rounds else f"all {num_rounds} rounds were done before"
        server_round = done
        while not self.ended:
            server_round += 1
            arrays = result.arrays
            try:
                messages = self.configure_train(
                    server_round, arrays, train_config or ConfigRecord(), grid
                )
                replies = self.collect(grid, messages, timeout, meanwhile)
                new_arrays, metrics = self.aggregate_train(server_round, replies)
            except Exception:
                if meanwhile is not None and server_round > 1:  # the round before did not fail
                    meanwhile.finish()
                raise
            meanwhile = None
            if new_arrays is not None:
                arrays = result.arrays = new_arrays
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            due = self.evaluates(server_round) or server_round == num_rounds
            if due:
                messages = self.configure_evaluate(
                    server_round, arrays, evaluate_config or ConfigRecord(), grid
                )
                replies = self.collect_evaluations(grid, messages, timeout)
                metrics = self.aggregate_evaluate(server_round, replies)
                if metrics is not None:
                    result.evaluate_metrics_clientapp[server_round] = metrics
            elapsed = time.perf_counter() - began
            left = elapsed / (server_round - done) * (num_rounds - server_round)
            later = False
            if due and evaluate_fn is not None:
                evaluate = partial(
                    self._evaluate_on_server, server_round, arrays, evaluate_fn, result, self.round
                )
                later = self.evaluations_can_wait and should_stop is None
                later = later and server_round < num_rounds
                if later:
                    self.ended = self.reached(server_round)
                    if not self.ended:
                        meanwhile = self._later(evaluate, server_round, result, left)
                        continue
                evaluate()
            self.tell(self.round.record())
            log(INFO, "%s", self.round_line(num_rounds, left))
            if not later:
                self.ended = self.reached(server_round)
            if not self.ended and should_stop is not None and should_stop(server_round, result):
                self.ended = "should_stop said so"
            if not self.ended and server_round == num_rounds:
                self.ended = f"all {num_rounds} rounds are done"
            self.round_over(server_round, result)
        took = duration(time.perf_counter() - began)
        log(INFO, "%s rounds in %s: %s", server_round - done, took, self.ended)
        self.finish(server_round)
        return result

    def begin(self, server_round: int) -> None:
        """Tell listeners that the run begins, or goes on after a round."""
        self.tell(
            {
                "kind": "start",
                "round": server_round,
                "version": RECORDS_VERSION,
                "scores": [asdict(score) for score in self.scores],
            }
        )

    def _later(
        self, evaluate: Callable[[], None], server_round: int, result: Result, left: float
    ) -> Meanwhile:
        """Return the evaluation of a round, and what is told and saved then, for the next one.

        Records of the next round are held back, so that listeners get all in the usual order.
        """
        book, held = self.round, list[Record]()
        book.over()
        save = self.round_over_but_for_scores(server_round, result)
        self._held = held

        def then() -> None:
            self._held = None
            for record in (book.record(), *held):
                self.tell(record)
            log(INFO, "%s", self.round_line(self.num_rounds, left, book))
            save(book.evaluation)

        return Meanwhile(evaluate, then)

    def collect(
        self, grid: Grid, messages: Iterable[Message], timeout: float, meanwhile: Meanwhile | None
    ) -> Iterable[Message]:
        """Send the messages of a round; return its replies as they come, while it waits."""
        return exchange(
            grid, messages, timeout,
            on_arrival=self._arrived, name=self.name_of, meanwhile=meanwhile,
        )  # fmt: skip

    def collect_evaluations(
        self, grid: Grid, messages: Iterable[Message], timeout: float
    ) -> Iterable[Message]:
        """Send messages of an evaluation; return the replies."""
        return exchange(grid, messages, timeout, name=self.name_of)

    def finish(self, server_round: int) -> None:
        """Tell listeners why the run is over, and look back at it."""
        silent = self.look_back()
        end: EndRecord = {
            "kind": "end",
            "round": server_round,
            "reason": self.ended,
            "never_took_part": silent,
        }
        self.tell(end)

    def resume(self, result: Result) -> int:
        """Put back a saved state; return the round it was saved after, 0 without one."""
        return 0

    def evaluates(self, server_round: int) -> bool:
        """Return whether the model is evaluated after a round."""
        return server_round % self.evaluate_every == 0

    def round_line(self, num_rounds: int, seconds_left: float, book: Round | None = None) -> str:
        """Return the line of the log for the round that is over."""
        return (book or self.round).line(num_rounds, seconds_left)

    def round_over_but_for_scores(
        self, server_round: int, result: Result
    ) -> Callable[[Mapping[str, float]], None]:
        """Look back at a round before it is evaluated; return what is to be done with its scores.

        In place of ``round_over``, where ``evaluations_can_wait``.
        """
        return lambda evaluation: None

    def round_over(self, server_round: int, result: Result) -> None:
        """Look back at a round that is over, the last one if ``ended``; 0 is before the first."""

    def reached(self, server_round: int) -> str:
        """Return why the run ends before its last round; empty if it goes on."""
        return self._asked_to_end

    def look_back(self) -> list[str]:
        """Say what is to be said of a run that is over; return who never took part."""
        return []

    def name_of(self, node_id: int) -> str:
        """Return how the log calls a node."""
        return f"node {node_id}"

    def _arrived(self, message: Message, seconds: float | None) -> None:
        """Tell listeners that a reply is in, before its turn to be aggregated."""
        self.note_arrival(message, seconds)
        sent = message.content.array_records.values() if message.has_content() else ()
        self.tell({
            "kind": "arrived", "round": self.round.number,
            "node": str(message.metadata.src_node_id), "bytes": sum(map(record_bytes, sent)),
        })  # fmt: skip

    def note_arrival(self, message: Message, seconds: float | None) -> None:
        """Note when a reply came in, if that is known."""

    def tell(self, record: Record) -> None:
        """Hand a record to every listener, and note the first that wants the run to end."""
        if self._held is not None:
            self._held.append(record)
            return
        for listener in self.listeners:
            said = listener(record)
            if isinstance(said, str) and not self._asked_to_end:
                self._asked_to_end = said

    @property
    def evaluations_can_wait(self) -> bool:
        """Whether the server may evaluate a round while clients train in the next one."""
        return self.evaluate_overlap and self.evaluation_can_wait

    @property
    def evaluation_can_wait(self) -> bool:
        """Whether the first round may begin before the initial model is evaluated."""
        return True

    def _begun(self, book: Round) -> None:
        if book.evaluation:
            log(INFO, "start: %s", " ".join(f"{k} {v:.3f}" for k, v in book.evaluation.items()))
        self.tell(book.record())

    def _evaluate_on_server(
        self,
        server_round: int,
        arrays: ArrayRecord,
        evaluate_fn: EvaluateFn,
        result: Result,
        book: Round,
    ) -> None:
        metrics = evaluate_fn(server_round, arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
            book.evaluation = {
                k: float(v) for k, v in metrics.items() if isinstance(v, int | float)
            }
