"""``FedLoRA``: federated LoRA fine-tuning with clients of different rank.

One round, top to bottom: ``configure_train`` asks the rank policy and the sampler and gives each
chosen node its own slice of the global adapter; ``aggregate_train`` folds each good reply into the
aggregation rule as it comes and turns the sum into the next global adapter; ``configure_evaluate``
and ``aggregate_evaluate`` do the same for the clients' own evaluation. What lasts from round to
round, and ends the run, is in ``run/kept.py``; the parts of a round are in ``round/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from strategies import doors
from strategies.aggregation import Aggregator, Robust
from strategies.census import Census
from strategies.clients import Client
from strategies.flower import aggregate_metricrecords
from strategies.loop import Listener
from strategies.lora import Adapter
from strategies.optimizers import ServerOptimizer
from strategies.participation import Participation
from strategies.privacy import NoPrivacy, PrivateRun
from strategies.privacy.outside import OutsideNoise, short_in_this_round
from strategies.ranks import RankPolicy
from strategies.records import Record, RoundWarning
from strategies.round.conclusion import Conclusion
from strategies.round.evaluation import ClientEvaluation
from strategies.round.intake import Accepted, Intake
from strategies.round.models import Models
from strategies.round.orders import Orders
from strategies.round.ranks import RankBook
from strategies.round.replies import MetricsAggregation, Replies
from strategies.round.virtual import make_flow
from strategies.round.waiting import Waiting
from strategies.rounds import Round, spread
from strategies.run.kept import KeptRun
from strategies.run.settings import check_settings, log_settings, noise_lacking
from strategies.sampling import Sampler
from strategies.saving import Saver, Stateful
from strategies.scores import Score
from strategies.wallclock import Clock
from strategies.wire import check_wire_dtype


class FedLoRA(KeptRun):
    """Federated LoRA: an aggregation rule, a rank policy, a sampler and a client protocol.

    Parameters
    ----------
    aggregation : Aggregator or str (default: "support")
        How adapters of different rank become one; a rule or its registered name.
    robust : Robust or str (default: "none")
        What keeps liars among the clients from the result: "median", "trimmed-mean", "norm-filter"
        or "krum". All clients then count the same, and all replies of a round are held at once.
    server_optimizer : ServerOptimizer or str (default: "none")
        Takes what a round has changed for a gradient: "momentum", "adagrad", "adam" or "yogi"; for
        rules that average entries.
    ranks : RankPolicy or str (default: "uniform")
        Which rank each client trains.
    sampling : Sampler or str (default: "fraction")
        Which clients join a round.
    clock : Clock, optional
        Says how long rounds take: a ``SimulatedClock``, or the default, a ``MeasuredClock``.
    client_api : "message" or "numpy" (default: "message")
        Whether clients are Message API apps (``@app.train()``) or ``NumPyClient``s.
    scale : float (default: 1.0)
        ``s`` in ``W0 + s·B A`` for every rank r, so ``alpha = s·r``; sent as ``lora-scale``.
    wire_dtype : str (default: "float32")
        How numbers travel: "float32", "float16", "bfloat16" or "int8". Declared to clients
        as ``wire-dtype``; ``strategies.client.receive`` and ``send`` follow it.
    seed : int (default: 42)
        Same seed, same result, in whatever order replies come in.
    min_replies : int (default: 1)
        With fewer good replies the model stays as it was.
    min_available_nodes : int (default: 1)
        Wait for so many nodes before the first round, and for ``min_replies`` before a later one.
    min_answering : float (default: 0.5)
        The run ends, with a checkpoint, after five rounds in which a smaller share of the clients
        asked sent a good reply; 0: never.
    head_only : bool (default: False)
        Whether initial arrays without LoRA modules are meant so: clients train the rest alone.
    evaluate_fraction : float (default: 1.0)
        Share of the clients that evaluate the new model on their own data; 0: none.
    evaluate_every, evaluate_overlap : int (default: 1), bool (default: False)
        Evaluate after every Nth round and the last; the server while clients train on, if it can.
    query : bool (default: True)
        Ask each node once for ``partition-id`` and ``max-rank`` when it appears. Without them no
        limit of a device is known, and seeded choices go by Flower's random node ids: the same seed
        gives other results. A Message API app answers with ``register_identity(app)``.
    query_timeout, profile_timeout : float (default: 60.0)
        Seconds to wait for those answers, and for a rank policy's profiles (default: as long); who
        does not answer takes part without.
    weighted_by_key, arrayrecord_key, configrecord_key : str, and ``…_metrics_aggr_fn`` : callable
        As in Flower's ``FedAvg``; the keys are for Message API clients.
    scores : sequence of Score (default: ())
        Of what the model is measured by, the first one first: its name in the log, and which value
        is worse (``strategies.scores``). Others are better when higher, but for ``loss``.
    stop_when : callable, optional
        Called with the server's scores after each evaluated round; true ends the run.
    saver : Saver, optional
        Saves the server's state as the run goes, and resumes a run (default: nothing is saved).
    proximal_mu : float (default: 0.0)
        FedProx's weight, sent to clients as ``proximal-mu``: ``train_loop`` and
        ``train_with_trainer`` add ``μ/2 ‖w - w_0‖²``, with what was sent as ``w_0``; 0: not sent.
    clip_norm : float (default: 0.0)
        A larger change of a client, as the norm over all it sent, is scaled down to it; 0: none.
    privacy : PrivateRun, optional
        Clients clip and noise what they send, and ε is in every round's record; settings
        that would void the guarantee are refused (default: nothing of this).
    noised_outside : bool, optional
        Whether a strategy around this one adds noise, as Flower's wrappers for privacy do: then
        every client counts the same, a round that lacks one leaves the model as it was, and what
        needs more noise than a mean is refused (default: seen by another loop's ``clipping_norm``).
    waiting : Waiting, optional
        When a round is over, what late replies count, whether clients wait for each other at all.
    listeners : Iterable[callable]
        Called with a record of ``strategies.records`` at each step, which says there of what
        ``kind`` it is. A text that one returns is why the run ends.

    Raises
    ------
    TypeError
        If an argument is of another kind or unknown; it says what those of ``FedAvg`` are here.
    ValueError
        If an argument is out of range or no such rule, policy or sampler exists.
    """

    @doors.checked
    def __init__(
        self,
        *,
        aggregation: Aggregator[Any] | str = "support",
        robust: Robust | str = "none",
        server_optimizer: ServerOptimizer | str = "none",
        ranks: RankPolicy | str = "uniform",
        sampling: Sampler | str = "fraction",
        clock: Clock | None = None,
        client_api: str = "message",
        scale: float = 1.0,
        wire_dtype: str = "float32",
        seed: int = 42,
        min_replies: int = 1,
        min_available_nodes: int = 1,
        min_answering: float = 0.5,
        head_only: bool = False,
        evaluate_fraction: float = 1.0,
        evaluate_every: int = 1,
        evaluate_overlap: bool = False,
        query: bool = True,
        query_timeout: float = 60.0,
        profile_timeout: float | None = None,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsAggregation | None = None,
        evaluate_metrics_aggr_fn: MetricsAggregation | None = None,
        scores: Sequence[Score] = (),
        stop_when: Callable[[Mapping[str, float]], bool] | None = None,
        saver: Saver | None = None,
        proximal_mu: float = 0.0,
        clip_norm: float = 0.0,
        privacy: PrivateRun | None = None,
        noised_outside: bool | None = None,
        waiting: Waiting | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self.aggregation = doors.rule(aggregation)
        self.aggregation.protect(doors.robust(robust))
        self.aggregation.run_seed = seed
        self.ranks = doors.policy(ranks)
        sampler = doors.sampler(sampling)
        participation = Participation(sampler, doors.clock(clock), self.aggregation)
        self.protocol = doors.protocol(
            client_api, arrayrecord_key, configrecord_key, weighted_by_key
        )
        self.privacy = privacy or NoPrivacy()
        self.outside = OutsideNoise(noised_outside)
        wanted = participation.independent or sampler.needs_weights or self.ranks.needs_counts
        self.census = Census(
            self.protocol, min_nodes=min_available_nodes, least=min_replies, introduce=query,
            counts=wanted and self.privacy.rows_known, told=self.privacy.settings(),
            timeout=query_timeout,
            profile_timeout=query_timeout if profile_timeout is None else profile_timeout,
        )  # fmt: skip
        orders = Orders(self.protocol, self.ranks, self.privacy, proximal_mu)
        super().__init__(
            participation, self.census.roster, evaluate_overlap=evaluate_overlap, saver=saver,
            evaluate_every=evaluate_every, listeners=doors.listeners(listeners),
            scores=doors.scores(scores), stop_when=stop_when, min_answering=min_answering,
            flow=make_flow(waiting or Waiting(), participation, orders, seed),
        )  # fmt: skip
        self.scale, self.wire_dtype, self.seed = scale, check_wire_dtype(wire_dtype), seed
        self.min_replies, self.min_available_nodes = min_replies, min_available_nodes
        self.clip_norm, self.head_only, self.weighted_by_key = clip_norm, head_only, weighted_by_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or aggregate_metricrecords
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or aggregate_metricrecords
        self.models = Models(self.aggregation, scale, wire_dtype)
        self.rank_book = RankBook(self.ranks)
        self.replies = Replies(self.protocol, self.roster, participation.guard, weighted_by_key)
        self.intake = Intake(
            self.replies, participation, self.census, self.ranks, self.privacy, self.outside,
            clip_norm, self.flow,
        )  # fmt: skip
        self.optimizer = doors.optimizer(server_optimizer)
        self.conclusion = Conclusion(
            self.aggregation, self.privacy, self.outside, min_replies, self.optimizer
        )
        self.evaluation = ClientEvaluation(evaluate_fraction, self.replies)
        self._restarted: ArrayRecord | None = None  # where this round's pilot started anew

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each chosen client, with its own slice of the adapter."""
        if not self.led:
            self.outside.look_at(config)
            self.outside.came_back(arrays)
            self.follow(server_round, arrays)
        sampler = self.participation.sampler
        start = self.progress.go(sampler.restart(server_round), arrays)
        self._restarted = None if start is arrays else start
        clients = self.privacy.seen(self._present(grid, config, server_round))
        model_round = self.progress.rounds + 1  # of this model: pilots start anew
        self.aggregation.server_round = model_round
        packing = self.models.packed(start, server_round)
        if self.ranks.counts_bytes:
            self.ranks.learn_cost(*packing.cost(self._rng(server_round, 3)))
        self.rank_book.begin()
        ranks = self.rank_book.assign(clients, server_round, self.tell)
        chosen = self.participation.choose(
            server_round, clients, [ranks[client.node_id] for client in clients],
            lambda: packing.cost(self._rng(server_round, 3), upload_only=True),
            packing.model.adapter.rank, self.privacy.rng(self._rng(server_round, 0)),
            busy=self.flow.busy, extend=self.flow.extend,
        )  # fmt: skip
        self.privacy.begin(
            clients, [client for client, _ in chosen],
            self.participation.weights, self.participation.chances,
            equal_ranks=len(set(ranks.values())) <= 1,
        )  # fmt: skip
        for record in iter(sampler.record, None):  # what it has decided
            self.tell(cast(Record, record))
        book = self.round = Round(
            server_round, len(clients), planned_seconds=sampler.planned_seconds
        )
        if packing.model.adapter.pairs:
            book.warnings = self.odd_ranks(clients, ranks)
            self.participation.watch.say(book.warnings, server_round)
        self.tell({"kind": "round-start", "round": server_round, "clients": len(chosen)})
        messages = self.flow.place(chosen, book, packing, config, model_round)
        self.outside.check(noise_lacking(self))
        self.intake.open(book, packing, self.flow.begin(book, grid, self.census.trips))
        # Our own loop sends one after the other: where each client's arrays are its own, they
        # need not be there together. Other loops, and strategies around, are used to a list.
        lazily = self.led and (self.flow.virtual or not self.aggregation.shares_downloads)
        return messages if lazily else list(messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the next global adapter; a bad one is left out, by name.

        The arrays are None where the model stays as it was, but for a pilot's that started anew.
        """
        packing, book = self.intake.packing, self.round
        if packing is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        state = self.aggregation.init(packing.model.adapter)
        state.population = self.participation.population
        for message in self.replies.in_order(replies):
            taken = self.intake.take(message, partial(self.aggregation.add, state))
            if isinstance(taken, Accepted):
                self.on_update(taken.client, taken.adapter)
        self.intake.close(self.tell)
        good = self.intake.good
        aggregated = self.replies.aggregate(good, self.train_metrics_aggr_fn, self.ranks.metrics)
        if book.empty and not self.privacy.tops_up and self.participation.independent:
            return self._restarted, None  # nobody's coin fell so: a legal round
        short = short_in_this_round([reply.weight for reply in good], len(book.assignments))
        model = self.conclusion.next_model(state, packing.model, book, short)
        if model is None:
            return self._restarted, aggregated
        arrays = self.models.record(model)
        self.outside.returned(arrays, [*noise_lacking(self), *short])
        return arrays, aggregated

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each client that evaluates the model at its own rank."""
        if not self.led:
            self.outside.came_back(arrays)
            self.following.result.arrays = arrays
        self.evaluation.forget()
        if not self.evaluation.share or not (self.led or self.evaluates(server_round)):
            return []
        clients = self.flow.idle(self._present(grid, config, server_round))
        ranks = self.rank_book.assign(clients, server_round, self.tell)
        packing = self.models.packed(arrays, server_round)
        return self.evaluation.messages(clients, ranks, packing, config, self._rng(server_round, 1))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' weighted mean metrics; mean, worst and spread go to the round."""
        good = self.evaluation.gather(server_round, replies, self.tell)
        self.round.clients_evaluation = spread(good, self.scores)
        found = self.replies.aggregate(good, self.evaluate_metrics_aggr_fn, self.ranks.metrics)
        if not self.led:
            self.following.over(self)
        return found

    def odd_ranks(self, clients: Sequence[Client], ranks: Mapping[int, int]) -> list[RoundWarning]:
        """Return what is odd about the ranks of a round, by node id."""
        watch = self.participation.watch
        return watch.ranks(clients, ranks) if self.aggregation.mean_of_holders else []

    def on_update(self, client: Client, adapter: Adapter) -> None:
        """Look at a good reply before it is dropped; for subclasses."""

    def summary(self) -> None:
        """Log the settings in effect as a small tree."""
        log_settings(self)

    def check(self, arrays: ArrayRecord) -> None:
        """Refuse initial arrays that the rule, the rank policy or privacy cannot work with."""
        check_settings(self, arrays)

    def parts(self) -> dict[str, Stateful]:
        """Return what has a state that must last."""
        own = {"optimizer": self.optimizer} if self.optimizer else {}
        return {"ranks": self.ranks, **super().parts(), **own, **self.privacy.parts()}

    def _rng(self, *purpose: int) -> np.random.Generator:
        """Return the generator of one round and purpose: nothing to store, nothing shared."""
        return np.random.default_rng([self.seed, *purpose])

    def _present(self, grid: Grid, config: ConfigRecord, server_round: int) -> list[Client]:
        """Return who can take part; from round 2 on, nobody who joins late ends the run."""
        clients = self.census.take(grid, self.ranks, config, server_round)
        self.hand_on(clients)
        return clients if server_round == 1 else self.rank_book.served(clients, server_round)
