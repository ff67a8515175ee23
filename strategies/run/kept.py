"""What lasts from round to round: what was learned, what is saved, and what ends the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import WARNING

from flwr.app import ArrayRecord, Message
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from strategies.clients import Client, Roster
from strategies.listing import listed
from strategies.loop import Listener, StreamingStrategy
from strategies.participation import Participation
from strategies.progress import Progress
from strategies.round.flow import Flow
from strategies.round.models import Models
from strategies.round.patience import Reasonable
from strategies.rounds import Degradation, Round
from strategies.run.following import Following
from strategies.sampling import Sampler
from strategies.saving import Saver, Stateful
from strategies.scores import Score
from strategies.transport import Meanwhile, exchange
from strategies.wallclock import SimulatedClock

StopWhen = Callable[[Mapping[str, float]], bool]


class KeptRun(StreamingStrategy):
    """A run that learns of its rounds, is saved and resumed, and ends when it is told to.

    After every round those are asked that may end it: listeners (by what they return),
    ``stop_when``, ``min_answering``. The saver comes last: it saves what all have learned.

    Parameters
    ----------
    participation : Participation
    roster : Roster
    evaluate_every, evaluate_overlap, listeners, scores, stop_when, min_answering, saver
        As in ``FedLoRA``.
    flow : Flow
    """

    models: Models

    def __init__(
        self,
        participation: Participation,
        roster: Roster,
        *,
        evaluate_every: int,
        evaluate_overlap: bool,
        listeners: Iterable[Listener],
        scores: Iterable[Score],
        stop_when: StopWhen | None,
        min_answering: float,
        saver: Saver | None,
        flow: Flow,
    ) -> None:
        super().__init__(
            evaluate_every=evaluate_every, evaluate_overlap=evaluate_overlap, listeners=listeners
        )
        self.scores = tuple(scores)
        self.participation = participation
        self.flow = flow
        self.roster = roster
        self.progress = Progress()
        self.stop_when = stop_when
        self.degradation = Degradation(min_answering)
        self.saver = saver
        self.following = Following()

    def parts(self) -> dict[str, Stateful]:
        """Return what has a state that must last, by its name in a checkpoint."""
        lasting = {"participation": self.participation, "roster": self.roster}
        return {**lasting, **self.flow.parts()}

    def collect(
        self, grid: Grid, messages: Iterable[Message], timeout: float, meanwhile: Meanwhile | None
    ) -> Iterable[Message]:
        """Send the messages of a round; return replies as they come, for as long as it waits."""
        return self.flow.collect(
            grid, messages, timeout,
            on_arrival=self._arrived, name=self.name_of, meanwhile=meanwhile,
        )  # fmt: skip

    def collect_evaluations(
        self, grid: Grid, messages: Iterable[Message], timeout: float
    ) -> Iterable[Message]:
        """Send messages of an evaluation; return the replies of those that are not dead."""
        if not self.flow.real:
            return super().collect_evaluations(grid, messages, timeout)
        until = Reasonable()
        return exchange(
            grid, messages, timeout, name=self.name_of, until=until, on_arrival=until.arrived
        )

    def note_arrival(self, message: Message, seconds: float | None) -> None:
        """Note how long the order of a reply took, if that is known."""
        order = self.flow.outstanding.of(message)
        if order is not None and seconds is not None:
            order.elapsed_seconds = seconds

    def evaluates(self, server_round: int) -> bool:
        """Return whether the model is evaluated after a round; after each while pilots run."""
        return self.participation.sampler.wants_loss or super().evaluates(server_round)

    @property
    def evaluations_can_wait(self) -> bool:
        """Whether nobody needs the scores of a round before the next one begins."""
        unheard = type(self.participation.sampler).learn_loss is Sampler.learn_loss
        return super().evaluations_can_wait and unheard and self.stop_when is None

    @property
    def evaluation_can_wait(self) -> bool:
        """Whether the first round may begin before the initial model is evaluated."""
        return not self.participation.sampler.wants_loss

    def round_line(self, num_rounds: int, seconds_left: float, book: Round | None = None) -> str:
        """Return the line of the log for the round that is over."""
        simulated, book = isinstance(self.participation.clock, SimulatedClock), book or self.round
        return book.line(num_rounds, seconds_left, simulated=simulated, scores=self.scores)

    def round_over(self, server_round: int, result: Result) -> None:
        """Let the sampler learn the loss of the model that is there now, and save the run."""
        if server_round:
            self.progress.rounds += 1
        if not self.participation.sampler.wants_loss:
            self.progress.aside = None  # the pilots are over, and nobody goes back
        loss = self.round.evaluation.get("loss")
        tested = any("loss" in scores for scores in result.evaluate_metrics_serverapp.values())
        if loss is None and not tested:  # always of one kind
            loss = self.round.loss
        if loss is not None:
            self.participation.sampler.learn_loss(server_round, loss)
        if server_round and self.saver is not None:
            self.saver.save(
                server_round, server_round if self.ended else 0, self.parts(), self.progress,
                result, self.round.evaluation,
            )  # fmt: skip

    def round_over_but_for_scores(
        self, server_round: int, result: Result
    ) -> Callable[[Mapping[str, float]], None]:
        """Note the state of the run; return what saves it with the scores of the round."""
        self.progress.rounds += 1
        self.progress.aside = None  # there are no pilots that go back
        if self.saver is None:
            return lambda evaluation: None
        return self.saver.hold(server_round, 0, self.parts(), self.progress, result)

    def reached(self, server_round: int) -> str:
        """Return why the run ends now: somebody says so, or too few clients are left."""
        scores = self.round.evaluation
        if said := super().reached(server_round):
            return said
        if scores and self.stop_when is not None and self.stop_when(scores):
            return "stop_when said so"
        return self.degradation.see(self.round)

    def follow(self, server_round: int, arrays: ArrayRecord) -> None:
        """Begin the run, or a round of it, that another strategy's loop drives."""
        self.flow.refuse_other_loops()
        if self.saver is not None and self.saver.resumed is not None:
            raise ValueError(
                "a run can be resumed by the start of FedLoRA itself alone; call it, instead "
                "of the one of a strategy around it"
            )
        self.following.begin(self, server_round, arrays)

    def resume(self, result: Result) -> int:
        """Put back a saved state; return the round it was saved after, 0 without one."""
        self.progress = Progress(initial=result.arrays)
        if self.saver is None:
            return 0
        rule = self.participation.rule
        kept = set(rule.trained()) - set(rule.uploaded())
        if self.saver.round is not None and kept:
            log(WARNING, "resume: clients of %s keep %s themselves; who has lost it starts anew",
                rule.name, ", ".join(sorted(kept)))  # fmt: skip
        return self.saver.resume(self.parts(), self.progress, result)

    def finish(self, server_round: int) -> None:
        """Tell that the run is over, and give back the band that was shared out for it."""
        super().finish(server_round)
        self.participation.clock.close()

    def look_back(self) -> list[str]:
        """Say who was asked and never took part; return their names."""
        silent = self.participation.never_answered()
        known = {client.index: client.name for client in self.roster.clients.values()}
        names = [known.get(i, f"client {i}") for i in silent]
        if names:
            log(WARNING, "asked, but never took part: %s", listed(names))
        if not self.participation.anyone_answered and self.progress.rounds:
            log(WARNING, "no reply was ever accepted: the model is the initial one")
        return names

    def hand_on(self, clients: Sequence[Client]) -> None:
        """Forget what was learned of those whose place is another's now, and go on with orders."""
        self.flow.revive(clients, self.models)
        while self.roster.handed_on:
            index = self.roster.handed_on.pop()
            self.participation.guard.forget(index)
            self.participation.watch.forget(index)
            self.flow.forget(index)

    def name_of(self, node_id: int) -> str:
        """Return how the log calls a node."""
        client = self.roster.clients.get(node_id)
        return client.name if client else super().name_of(node_id)
