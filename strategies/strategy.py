"""``FedLoRA``: federated LoRA fine-tuning with clients of different rank.

One round, top to bottom: ``configure_train`` asks the rank policy and the sampler and
gives each chosen node its own slice of the global adapter; ``aggregate_train`` folds
each good reply into the aggregation rule as it comes and turns the sum into the next
global adapter; ``configure_evaluate`` and ``aggregate_evaluate`` do the same for the
clients' own evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from strategies.aggregation import Aggregator, Update, make_aggregator
from strategies.census import Census
from strategies.claims import REASON_LENGTH, ReplyError, clean
from strategies.clients import Client
from strategies.doors import made, refuse_unknown
from strategies.flower import aggregate_metricrecords
from strategies.listing import listed
from strategies.loop import Listener, StreamingStrategy
from strategies.lora import Adapter
from strategies.messages import (
    MODEL_ROUND_KEY,
    STEPS_KEY,
    MessageProtocol,
    NumPyProtocol,
    Protocol,
    Reply,
    check_size,
    content_bytes,
    from_record,
    reply_error,
    to_record,
)
from strategies.model import GlobalModel
from strategies.packing import Packing, Parcel
from strategies.participation import Participation
from strategies.privacy import PrivateRun, clip_update
from strategies.privacy.outside import OutsideNoise, short_in_this_round, short_of_noise
from strategies.progress import Progress
from strategies.ranks import RankPolicy, make_rank_policy
from strategies.ranks.report import rank_record, rank_table
from strategies.records import ClientEvaluationRecord, Record
from strategies.rounds import Assignment, Degradation, Round, spread
from strategies.sampling import FractionSampling, Sampler, make_sampler
from strategies.saving import Saver, Stateful
from strategies.scores import Score
from strategies.trained import Trained
from strategies.wallclock import Clock, MeasuredClock, SimulatedClock
from strategies.wire import check_wire_dtype

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]


class FedLoRA(StreamingStrategy):
    """Federated LoRA: an aggregation rule, a rank policy, a sampler and a client protocol.

    Parameters
    ----------
    aggregation : Aggregator or str (default: "replication")
        How adapters of different rank become one; a rule or its registered name.
    ranks : RankPolicy or str (default: "uniform")
        Which rank each client trains.
    sampling : Sampler or str (default: "fraction")
        Which clients join a round.
    clock : Clock, optional
        Says how long rounds take: a ``SimulatedClock``, or the default, a ``MeasuredClock``.
    client_api : "message" or "numpy" (default: "message")
        Whether clients are Message API apps (``@app.train()``) or ``NumPyClient``s.
    scale : float (default: 1.0)
        ``s`` in ``W0 + s·B A``, the same for every rank: a client of rank r uses
        ``alpha = s·r``. Sent to clients as ``lora-scale``.
    wire_dtype : str (default: "float32")
        How numbers travel: "float32", "float16", "bfloat16" or "int8". Declared to clients
        as ``wire-dtype``; ``strategies.client.receive`` and ``send`` follow it.
    seed : int (default: 42)
        Same seed, same result, in whatever order replies come in.
    min_replies : int (default: 1)
        With fewer good replies the model stays as it was.
    min_available_nodes : int (default: 1)
        Wait for this many nodes before the first round, and for ``min_replies`` of them
        before a later one.
    min_answering : float (default: 0.5)
        If in five rounds, one after the other, a smaller share of the clients that were asked sent
        a good reply, the run ends, with a checkpoint where there is a saver; 0: never.
    head_only : bool (default: False)
        Whether initial arrays without any LoRA module are meant so: clients train what is saved in
        full, and nothing else.
    evaluate_fraction : float (default: 1.0)
        Share of the clients that evaluate the new model on their own data; 0: none.
    evaluate_every : int (default: 1)
        Evaluate after every Nth round and after the last.
    query : bool (default: True)
        Ask each node once for ``partition-id`` and ``max-rank`` when it appears. Without them
        no limit of a device is known, and seeded choices go by Flower's random node ids, so
        that the same seed does not give the same result. A Message API app answers with
        ``strategies.client.register_identity(app)``; one that does not takes part all the same.
    query_timeout : float (default: 60.0)
        Seconds to wait for those answers; who does not answer takes part without.
    profile_timeout : float, optional
        The same for a rank policy's profiling query (default: ``query_timeout``).
    weighted_by_key, arrayrecord_key, configrecord_key : str
        As in Flower's ``FedAvg``; for Message API clients.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : callable, optional
        As in Flower's ``FedAvg``.
    scores : sequence of Score (default: ())
        ``strategies.scores.Score`` of what the model is measured by, the first one first: how they
        are called in the log, and which of two values is the worse. Not declared is better when
        higher, but for ``loss``.
    stop_when : callable, optional
        Called with the server's scores after each round that was evaluated; the run ends when
        it returns true.
    saver : Saver, optional
        Saves the server's state as the run goes, and resumes a run (default: nothing is saved).
    clip_norm : float (default: 0.0)
        A client's change of more than this norm, over everything it sent, is scaled down to
        it; 0: none is.
    privacy : PrivateRun, optional
        Clients clip and noise what they send, and ε is in every round's record; settings
        that would void the guarantee are refused (default: nothing of this).
    noised_outside : bool, optional
        Whether a strategy around this one adds noise for privacy, as Flower's wrappers do. True:
        every client counts the same, a round in which one is missing leaves the model as it was,
        and what would need more noise than that of a mean is refused. False: what it changes is no
        such noise. (default: seen by ``clipping_norm`` in the config of another's loop, or by a
        model that comes back changed; too little noise is refused)
    listeners : Iterable[callable]
        Called with a record of ``strategies.records`` at each step: ``kind`` is ``start``,
        ``ranks``, ``pilots``, ``plan``, ``round-start``, ``arrived``, ``client``,
        ``client-evaluation``, ``round`` or ``end``.

    Raises
    ------
    TypeError
        If an argument is of another kind or unknown; for those of Flower's ``FedAvg`` it says what
        they are here.
    ValueError
        If an argument is out of range or no such rule, policy or sampler exists.
    """

    def __init__(
        self,
        *,
        aggregation: Aggregator[Any] | str = "replication",
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
        clip_norm: float = 0.0,
        privacy: PrivateRun | None = None,
        noised_outside: bool | None = None,
        listeners: Iterable[Listener] = (),
        **unknown: Any,
    ) -> None:
        refuse_unknown(unknown, FedLoRA.__init__)
        if client_api not in ("message", "numpy"):
            raise ValueError(f"client_api: expected 'message' or 'numpy', got {client_api!r}")
        if not scale > 0:
            raise ValueError(f"scale: expected a number above 0, got {scale!r}")
        if not clip_norm >= 0:
            raise ValueError(f"clip_norm: expected 0 (none) or more, got {clip_norm!r}")
        for name, share in (
            ("evaluate_fraction", evaluate_fraction),
            ("min_answering", min_answering),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {share!r}")
        for name, value in (
            ("min_replies", min_replies),
            ("min_available_nodes", min_available_nodes),
            ("evaluate_every", evaluate_every),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value!r}")
        super().__init__(evaluate_every=evaluate_every, listeners=listeners)
        self.aggregation: Aggregator[Any] = made(
            "aggregation", aggregation, Aggregator, make_aggregator,
            "aggregation='flexlora' or FlexLoRA() of strategies.aggregation",
        )  # fmt: skip
        self.aggregation.run_seed = seed
        self.ranks = made(
            "ranks", ranks, RankPolicy, make_rank_policy,
            "UniformRank(8) or ListRank([2, 4, 8]) of strategies.ranks",
        )  # fmt: skip
        if clock is not None and not isinstance(clock, Clock):
            raise TypeError(
                f"clock: expected a Clock, got {clock!r}; write for example "
                "SimulatedClock('lab', …) of strategies.wallclock"
            )
        self.participation = Participation(
            made(
                "sampling", sampling, Sampler, make_sampler,
                "FractionSampling(0.5) of strategies.sampling",
            ),
            clock or MeasuredClock(),
            self.aggregation,
        )  # fmt: skip
        self.protocol: Protocol = (
            NumPyProtocol()
            if client_api == "numpy"
            else MessageProtocol(arrayrecord_key, configrecord_key, weighted_by_key)
        )
        self.scores = tuple(scores)
        self.scale = scale
        self.wire_dtype = check_wire_dtype(wire_dtype)
        self.seed = seed
        self.min_replies = min_replies
        self.min_available_nodes = min_available_nodes
        self.evaluate_sampling = (
            FractionSampling(evaluate_fraction) if evaluate_fraction > 0 else None
        )
        counts = self.participation.independent or self.participation.sampler.needs_weights
        counts = counts and privacy is None  # numbers of rows stay with private clients
        self.census = Census(
            self.protocol,
            min_nodes=min_available_nodes,
            least=min_replies,
            introduce=query,
            counts=counts,
            told=privacy.privacy.settings() if privacy else None,
            timeout=query_timeout,
            profile_timeout=query_timeout if profile_timeout is None else profile_timeout,
        )
        self.roster = self.census.roster
        self.progress = Progress()
        self.stop_when = stop_when
        self.saver = saver
        self.clip_norm = clip_norm
        self.head_only = head_only
        self.privacy = privacy
        self.outside = OutsideNoise(noised_outside)
        self.degradation = Degradation(min_answering)
        self.weighted_by_key = weighted_by_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or aggregate_metricrecords
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or aggregate_metricrecords
        self._ranks: dict[int, int] = {}  # of the round in progress, by node id
        self._ranks_told: list[Any] = []
        self._door: tuple[ArrayRecord, GlobalModel] | None = None
        self._packing: Packing | None = None
        self._late: frozenset[int] = frozenset()  # indices of who will miss the deadline
        self._unmoved: set[int] = set()  # indices of those who were told
        self._evaluating: dict[int, Client] = {}
        self._restarted: ArrayRecord | None = None  # where this round's pilot started anew
        # The round that another strategy's loop is at; 0: that is over, None: there was none yet.
        self._following: int | None = None
        self._followed = Result(arrays=ArrayRecord())

    # ----- one round -----------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each chosen client, with its own slice of the adapter."""
        if not self.led:
            self.outside.look_at(config)
            self._follow(server_round, arrays)
        self._restarted = None
        start = self.progress.go(self.participation.sampler.restart(server_round), arrays)
        if start is not arrays:
            arrays = self._restarted = start
        clients = self._present(grid, config, server_round)
        if self.privacy:  # weights must not come from the data, whatever a node says of itself
            clients = [replace(client, num_examples=None) for client in clients]
        self.aggregation.server_round = self.progress.rounds + 1  # of this model: pilots start anew
        packing = self._packing = self._pack(server_round, arrays)
        if self.ranks.counts_bytes:
            self.ranks.learn_cost(*packing.cost(self._rng(server_round, 3)))
        self._ranks = {}
        ranks = self._assign_ranks(clients, server_round)
        chosen = self.participation.choose(
            server_round,
            clients,
            [ranks[client.node_id] for client in clients],
            lambda: packing.cost(self._rng(server_round, 3), upload_only=True),
            packing.model.adapter.rank,
            self.privacy.rng() if self.privacy else self._rng(server_round, 0),
        )
        if self.privacy:
            self.privacy.begin(
                clients, [client for client, _ in chosen],
                self.participation.weights, self.participation.chances,
                equal_ranks=len(set(ranks.values())) <= 1,
            )  # fmt: skip
        self._tell_plan()
        self.round = Round(
            server_round,
            total_clients=len(clients),
            planned_seconds=self.participation.sampler.planned_seconds,
        )
        self._emit({"kind": "round-start", "round": server_round, "clients": len(chosen)})
        orders: list[tuple[Client, Parcel, ConfigRecord]] = []
        for client, rank in chosen:
            parcel = packing.train(rank, partial(self._rng, server_round, 2, client.index))
            self.round.assignments[client.node_id] = Assignment(client, parcel)
            settings = packing.config(config, client, parcel, rank)
            settings[MODEL_ROUND_KEY] = self.progress.rounds + 1
            settings.update(self.ranks.train_settings(client, server_round))
            if self.privacy:
                settings.update(self.privacy.privacy.settings())
            orders.append((client, parcel, settings))
        self.outside.check(self._short_of_noise())
        works = [a.work() for a in self.round.assignments.values()]
        self._late = self.participation.clock.forecast(works, server_round).late
        messages = (
            Message(self.protocol.train(parcel.sent().record, settings), client.node_id, "train")
            for client, parcel, settings in orders
        )
        # Our own loop sends one after the other: where each client's arrays are its own, they
        # need not be there together. Other loops, and strategies around, are used to a list.
        lazily = self.led and not self.aggregation.shares_downloads
        return messages if lazily else list(messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the next global adapter; a bad one is left out, by name.

        Returns
        -------
        (ArrayRecord or None, MetricRecord or None)
            None for the arrays when there were fewer than ``min_replies`` good replies, or, where a
            sampler's pilot started from another model, that one.
        """
        if not isinstance(replies, Iterator):  # a stream comes in order, a collection may not
            replies = sorted(replies, key=self._place)
        if self._packing is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        packing = self._packing
        state = self.aggregation.init(packing.model.adapter)
        state.population = self.participation.population
        silent = dict(self.round.assignments)
        good: list[Reply] = []
        guard, counted = self.participation.guard, self.weighted_by_key == "num-examples"
        for message in guard.look_ahead(replies, self._count_of, lasting=counted):
            assignment = silent.pop(message.metadata.src_node_id, None)
            if assignment is None:
                log(WARNING, "ignored a reply of node %s: it was not asked in this round or "
                    "answered before", message.metadata.src_node_id)  # fmt: skip
                continue
            clock = time.perf_counter()
            client, parcel = assignment.client, assignment.parcel
            received = 0
            try:
                if reason := reply_error(message):
                    raise ReplyError(reason)
                received = content_bytes(message.content)
                check_size(message.content, parcel.expected, parcel.upload_bytes)
                reply = self.protocol.read_train(message.content, parcel.expected)
                sent = parcel.sent().download
                adapter = packing.read(reply, sent, any_rank=self.ranks.accepts_other_ranks)
                if client.index in self._late:
                    self.round.miss(assignment, reply)
                    continue
                adapter, norm = self._clip(assignment, sent.adapter, adapter)
                quality = reply.metrics.get("quality")
                if self.privacy:  # numbers of rows stay with the clients
                    reply = replace(reply, weight=1.0)
                else:
                    if counted:
                        guard.check_count(client.index, reply.weight)
                    guard.check_share(client.index, reply.weight, self.weighted_by_key)
                count = reply.weight
                if self.outside.expected:  # such noise is for a plain mean
                    reply = replace(reply, weight=1.0)
                weight = self.participation.weight(client, reply.weight)
                self.aggregation.add(state, Update(adapter, weight, quality, sent))
            except (ValueError, KeyError, TypeError, ArithmeticError) as error:
                self._reject(assignment, clean(str(error), 2 * REASON_LENGTH), received)
                continue
            guard.accept(client.index, norm, count)
            if reply.notes:
                log(WARNING, "round %s: %s: left out of its reply: %s", server_round, client.name,
                    "; ".join(reply.notes))  # fmt: skip
            self.round.aggregate_seconds += time.perf_counter() - clock
            self.round.accept(assignment, reply)
            self.participation.answered(client)
            if counted and not self.privacy:
                self.roster.observe(client.node_id, max(1, round(count)))
            good.append(replace(reply, arrays={}))  # its numbers, without its arrays
            self._observe(client, sent.adapter, adapter, reply)
            self.on_update(client, adapter)
        for assignment in silent.values():
            assignment.elapsed_seconds = time.perf_counter() - self.round.started
            self._reject(assignment, "no answer")
        self.round.train_seconds = (
            time.perf_counter() - self.round.started - self.round.aggregate_seconds
        )
        self._stop_clock()
        aggregated = None
        if good:
            aggregated = self.train_metrics_aggr_fn(self._metrics(good), self.weighted_by_key)
        hides = self.privacy is not None and self.privacy.tops_up  # also that nobody joined
        if not (self.round.assignments or hides) and self.participation.independent:
            return self._restarted, None  # nobody's coin fell so: a legal round
        if self.round.accepted < self.min_replies and not hides:
            log(WARNING, "round %s: %s good replies, fewer than min_replies = %s; the model "
                "stays as it was", server_round, self.round.accepted, self.min_replies)  # fmt: skip
            return self._restarted, aggregated
        weights = [reply.weight for reply in good]
        short = short_in_this_round(weights, len(self.round.assignments))
        if short and self.outside.expected:
            log(WARNING, "round %s: %s; the model stays as it was, for the noise of the strategy "
                "around this one would be too little", server_round, "; ".join(short))  # fmt: skip
            return self._restarted, aggregated
        clock = time.perf_counter()
        try:
            result = self.aggregation.finish(state)
            if self.privacy:
                answered = [a.client.index for a in self.round.answered()]
                noised = self.privacy.finish(result.adapter, answered, self.aggregation.uploaded())
                result = replace(result, adapter=noised)
                self.round.privacy = self.privacy.spent()
            problems = result.adapter.non_finite()
        except (RuntimeError, ArithmeticError) as error:  # no decomposition, or an overflow
            problems = [str(error)]
        self.round.aggregate_seconds += time.perf_counter() - clock
        if problems:
            log(WARNING, "round %s: the aggregate is unusable (%s); the model stays as it was",
                server_round, "; ".join(problems[:3]))  # fmt: skip
            return self._restarted, aggregated
        model = replace(packing.model.merging(result.base_delta), adapter=result.adapter)
        arrays = to_record(model.to_tensors())
        self._door = (arrays, model)
        self.outside.returned(arrays, [*self._short_of_noise(), *short])
        return arrays, aggregated

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each client that evaluates the model at its own rank."""
        if not self.led:
            self.outside.came_back(arrays)
        self._evaluating = {}
        self._followed.arrays = arrays
        if self.evaluate_sampling is None or not (self.led or self.evaluates(server_round)):
            return []
        clients = self._present(grid, config, server_round)
        ranks = self._assign_ranks(clients, server_round)
        packing = self._pack(server_round, arrays)
        rng = self._rng(server_round, 1)
        messages = []
        for client in self.evaluate_sampling.sample(clients, server_round, rng):
            rank = ranks[client.node_id]
            parcel = packing.evaluate(rank)
            self._evaluating[client.node_id] = client
            settings = packing.config(config, client, parcel, rank)
            content = self.protocol.evaluate(parcel.sent().record, settings)
            messages.append(Message(content, client.node_id, "evaluate"))
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' weighted mean metrics; mean, worst and spread go to the round."""
        if not isinstance(replies, Iterator):
            replies = sorted(replies, key=self._place)
        found: list[tuple[Client, Reply]] = []
        guard, counted = self.participation.guard, self.weighted_by_key == "num-examples"
        for message in guard.look_ahead(replies, self._count_of, lasting=counted):
            client = self._evaluating.pop(message.metadata.src_node_id, None)
            if client is None:  # not asked, or answered before
                continue
            try:
                if reason := reply_error(message):
                    raise ReplyError(reason)
                reply = self.protocol.read_evaluate(message.content)
                if counted:
                    guard.check_evaluation(client.index, reply.weight)
                else:
                    guard.check_share(client.index, reply.weight, self.weighted_by_key)
            except (ValueError, KeyError, TypeError) as error:
                log(WARNING, "evaluation of %s left out: %s", client.name, clean(str(error)))
                continue
            found.append((client, reply))
            own: ClientEvaluationRecord = {
                "kind": "client-evaluation",
                "round": server_round,
                "client": client.index,
                "node": str(client.node_id),
            }
            self._emit(cast(ClientEvaluationRecord, {**reply.metrics, **own}))
        for client in self._evaluating.values():
            log(WARNING, "evaluation of %s left out: no answer", client.name)
        self.round.clients_evaluation = spread([reply for _, reply in found], self.scores)
        aggregated = None
        if found:
            records = self._metrics([reply for _, reply in found])
            aggregated = self.evaluate_metrics_aggr_fn(records, self.weighted_by_key)
        if not self.led:
            self._followed_over()
        return aggregated

    def summary(self) -> None:
        """Log the settings in effect as a small tree."""
        log(INFO, "%s", type(self).__name__)
        log(INFO, "├── aggregation: %s", self.aggregation.name)
        log(INFO, "├── ranks:       %s", self.ranks.summary())
        log(INFO, "├── sampling:    %s", self.participation.sampler.summary())
        log(INFO, "├── clock:       %s", self.participation.clock.summary())
        log(INFO, "├── clients:     %s, at least %s replies of %s nodes",
            type(self.protocol).__name__, self.min_replies, self.min_available_nodes)  # fmt: skip
        log(INFO, "└── scale %g, %s on the wire, seed %s", self.scale, self.wire_dtype, self.seed)

    def check(self, arrays: ArrayRecord) -> None:
        """Refuse initial arrays that the rule or the rank policy cannot work with.

        Raises
        ------
        ValueError
            If they are no adapter, have too little rank, or the rule refuses them.
        """
        adapter = self._model_of(arrays).adapter
        self.aggregation.check(adapter)
        self.participation.check()
        if self.privacy:
            self.privacy.check(self)
        self.outside.check(self._short_of_noise(may=self.ranks.may_differ))
        if self.aggregation.equal_ranks and self.ranks.may_differ and adapter.pairs:
            raise ValueError(
                f"{self.aggregation.name} averages equal ranks only, but the rank policy "
                f"{self.ranks.name!r} lets clients differ; use ranks = UniformRank(r) "
                "or another rule"
            )
        kept = set(self.aggregation.trained()) - set(self.aggregation.uploaded())
        if kept and self.ranks.judges:
            raise ValueError(
                f"the rank policy {self.ranks.name!r} judges whole adapters on the server, but "
                f"{self.aggregation.name} keeps {', '.join(sorted(kept))} on the clients; use "
                "another rule, or let the clients judge"
            )
        if not adapter.pairs and adapter.dense and not self.head_only:
            raise ValueError(
                "the initial arrays hold no LoRA module, so that there is no rank to give: "
                "expected what peft.get_peft_model_state_dict returns for a model of the largest "
                "rank; to train a head alone, say head_only=True"
            )
        if self.aggregation.equal_ranks and adapter.rank > self.ranks.max_rank:
            raise ValueError(
                f"{self.aggregation.name} averages whole adapters, but the initial one has rank "
                f"{adapter.rank} and the rank policy {self.ranks.name!r} gives "
                f"{self.ranks.max_rank}; make the initial model with r = {self.ranks.max_rank}"
            )
        if adapter.pairs and adapter.rank < self.ranks.max_rank:
            raise ValueError(
                f"the initial adapter has rank {adapter.rank}, but the rank policy "
                f"{self.ranks.name!r} gives up to {self.ranks.max_rank}; make the initial "
                f"model with r = {self.ranks.max_rank}"
            )

    def on_update(self, client: Client, adapter: Adapter) -> None:
        """Look at a good reply before it is dropped; for subclasses, does nothing here."""

    # ----- between rounds ------------------------------------------------------------

    def evaluates(self, server_round: int) -> bool:
        """Return whether the model is evaluated after a round; after each while pilots run."""
        return self.participation.sampler.wants_loss or super().evaluates(server_round)

    @property
    def evaluation_can_wait(self) -> bool:
        """Whether the first round may begin before the initial model is evaluated."""
        return not self.participation.sampler.wants_loss

    def round_line(self, num_rounds: int, seconds_left: float) -> str:
        """Return the line of the log for the round that is over."""
        simulated = isinstance(self.participation.clock, SimulatedClock)
        return self.round.line(num_rounds, seconds_left, simulated=simulated, scores=self.scores)

    def round_over(self, server_round: int, result: Result) -> None:
        """Let the sampler learn the loss of the model that is there now."""
        if server_round:
            self.progress.rounds += 1
        if not self.participation.sampler.wants_loss:
            self.progress.aside = None  # the pilots are over, and nobody goes back
        loss = self.round.evaluation.get("loss", self.round.loss)
        if loss is not None:
            self.participation.sampler.learn_loss(server_round, loss)
        if server_round and self.saver is not None:
            self.saver.save(
                server_round, server_round if self.ended else 0, self._parts(), self.progress,
                result, self.round.evaluation,
            )  # fmt: skip

    def reached(self, server_round: int) -> str:
        """Return why the run ends now: ``stop_when`` says so, or too few clients are left."""
        scores = self.round.evaluation
        if scores and self.stop_when is not None and self.stop_when(scores):
            return "stop_when said so"
        return self.degradation.see(self.round)

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

    def name_of(self, node_id: int) -> str:
        """Return how the log calls a node."""
        client = self.roster.clients.get(node_id)
        return client.name if client else super().name_of(node_id)

    # ----- in another strategy's loop --------------------------------------------------

    def _follow(self, server_round: int, arrays: ArrayRecord) -> None:
        """Begin the run, or a round of it, that another strategy's loop drives."""
        if self._following is None:
            if self.saver is not None and self.saver.resumed is not None:
                raise ValueError(
                    "a run can be resumed by the start of FedLoRA itself alone; call it, instead "
                    "of the one of a strategy around it"
                )
            self.check(arrays)
            self._followed = Result(arrays=arrays)
            self.begin(self.resume(self._followed))
            self.round_over(0, self._followed)
        else:
            self.outside.came_back(arrays)
            self._followed_over()  # a loop that never evaluates
        self._following = server_round
        self._followed.arrays = arrays

    def _followed_over(self) -> None:
        """Look back at the round that another strategy's loop has driven, once."""
        if not self._following:
            return
        number, self._following = self._following, 0
        self._emit(self.round.record())
        log(INFO, "%s", self.round_line(0, math.nan))
        self.ended = self.reached(number)
        self.round_over(number, self._followed)
        if self.ended:  # too few clients are left, and another loop offers no other way to end
            self.finish(number)
            raise RuntimeError(f"the run ended after round {number}: {self.ended}")

    def resume(self, result: Result) -> int:
        """Put back a saved state; return the round it was saved after, 0 without one."""
        self.progress = Progress(initial=result.arrays)
        if self.saver is None:
            return 0
        kept = set(self.aggregation.trained()) - set(self.aggregation.uploaded())
        if self.saver.round is not None and kept:
            log(WARNING, "resume: clients of %s keep %s themselves; who has lost it starts anew",
                self.aggregation.name, ", ".join(sorted(kept)))  # fmt: skip
        return self.saver.resume(self._parts(), self.progress, result)

    def _parts(self) -> dict[str, Stateful]:
        """Return what has a state that must last."""
        private = {"privacy": self.privacy} if self.privacy else {}
        return {
            "ranks": self.ranks,
            "participation": self.participation,
            "roster": self.roster,
            **private,
        }

    # ----- parts ---------------------------------------------------------------------

    def _rng(self, *purpose: int) -> np.random.Generator:
        """Return the generator of one round and purpose: nothing to store, nothing shared."""
        return np.random.default_rng([self.seed, *purpose])

    def _short_of_noise(self, *, may: bool = False) -> list[str]:
        """Return why noise for a mean would be too little, with the ranks of this round."""
        ranks = {assignment.rank for assignment in self.round.assignments.values()}
        return short_of_noise(
            self.aggregation, self.wire_dtype, independent=self.participation.independent,
            ranks_differ=may or len(ranks) > 1,
        )  # fmt: skip

    def _pack(self, server_round: int, arrays: ArrayRecord) -> Packing:
        """Return the packing of the model in ``arrays`` for one round."""
        return Packing(self.aggregation, self._model_of(arrays), self.wire_dtype, server_round)

    def _model_of(self, arrays: ArrayRecord) -> GlobalModel:
        """Read the global arrays, once for every new record."""
        if self._door is None or self._door[0] is not arrays:
            model = GlobalModel.from_tensors(from_record(arrays), self.scale)
            self._door = (arrays, model)
        return self._door[1]

    def _present(self, grid: Grid, config: ConfigRecord, server_round: int) -> list[Client]:
        """Return who can take part; from round 2 on, nobody who joins late ends the run."""
        clients = self.census.take(grid, self.ranks, config, server_round)
        while self.roster.handed_on:
            self.participation.guard.forget(self.roster.handed_on.pop())
        if server_round == 1:
            return clients
        for client in clients:
            if not self.ranks.serves(client):
                log(WARNING, "round %s: %s is left out: the rank policy %s has no rank for it",
                    server_round, client.name, self.ranks.summary())  # fmt: skip
        return [client for client in clients if self.ranks.serves(client)]

    def _assign_ranks(self, clients: list[Client], server_round: int) -> Mapping[int, int]:
        """Return the ranks by node id; who has one keeps it until the next round begins."""
        if all(client.node_id in self._ranks for client in clients):
            return self._ranks
        ranks = {**self.ranks.assign(clients, server_round), **self._ranks}
        self._ranks = ranks
        record = rank_record(self.ranks, clients, ranks, server_round)
        # Numbers of examples come in with the replies of every round: no reason to tell it all.
        entries = [{**entry, "samples": None} for entry in record["clients"]]
        news = [record["weights"], record["notes"], entries]
        if news != self._ranks_told:
            self._ranks_told = news
            self._emit(record)
            for line in rank_table(record):
                log(INFO, "%s", line)
            for note in record["notes"]:
                log(WARNING, "ranks: %s", note)
        return ranks

    def _observe(self, client: Client, sent: Adapter, adapter: Adapter, reply: Reply) -> None:
        """Let the rank policy and the sampler look at a good reply."""
        merged = self._packing.model.merged if self._packing else Adapter({})
        trained = Trained(client, adapter, sent, reply.metrics, self.round.number, merged)
        self._say_unmoved(trained)
        for learner in (self.ranks, self.participation.sampler):
            try:
                learner.observe(trained)
            except ValueError as error:
                log(WARNING, "round %s: %s: %s", self.round.number, client.name, error)

    def _say_unmoved(self, trained: Trained) -> None:
        """Warn once of a client whose training moves nothing of what it was to train."""
        client, packing = trained.client, self._packing
        if packing is None or client.index in self._unmoved or trained.metrics.get(STEPS_KEY) == 0:
            return
        asked = "".join(f for f in packing.trained if f in packing.uploaded)
        if still := trained.unmoved(asked):
            self._unmoved.add(client.index)
            log(WARNING, "round %s: %s: lora_%s came back exactly as it was sent: make the "
                "optimiser after apply_adapter (receive_parameters), which makes new parameters; "
                "or its steps are smaller than %s can tell", self.round.number, client.name,
                " and lora_".join(still), self.wire_dtype)  # fmt: skip

    def _stop_clock(self) -> None:
        """Take the time of the round, and tell listeners of every client's part in it."""
        assignments = self.round.assignments.values()
        works = [assignment.work() for assignment in assignments]
        self.round.time = self.participation.finish(works, self.round.number)
        self.round.clock_total = self.participation.seconds
        for assignment in assignments:
            self._emit(assignment.record(self.round.number, self.round.time))

    def _place(self, message: Message) -> tuple[int, int]:
        """Return where a reply stands in the lasting order."""
        node_id = message.metadata.src_node_id
        client = self.roster.clients.get(node_id)
        return (client.index, node_id) if client else (len(self.roster.clients), node_id)

    def _count_of(self, message: Message) -> tuple[int, float] | None:
        """Return the client of a reply and how much it counts, if it is one and says so."""
        client = self.roster.clients.get(message.metadata.src_node_id)
        try:
            return None if client is None else (client.index, self.protocol.count(message))
        except (ValueError, KeyError, TypeError):
            return None

    def _metrics(self, replies: Sequence[Reply]) -> list[RecordDict]:
        """Return the metrics of replies alone, as metric aggregation functions expect them."""
        # Flower's average takes it that every reply has the same metrics.
        shared = set.intersection(*(set(reply.metrics) for reply in replies))
        shared -= {*self.ranks.metrics, self.weighted_by_key}
        records = []
        for reply in replies:
            metrics: dict[str, Any] = {k: v for k, v in reply.metrics.items() if k in shared}
            metrics[self.weighted_by_key] = reply.weight
            records.append(RecordDict({"metrics": MetricRecord(metrics)}))
        return records

    def _clip(
        self, assignment: Assignment, sent: Adapter, adapter: Adapter
    ) -> tuple[Adapter, float]:
        """Return a client's adapter, its change scaled down to ``clip_norm``, and its norm.

        Raises
        ------
        ReplyError
            If the change cannot be training's.
        """
        clipped, norm = clip_update(sent, adapter, self.clip_norm or math.inf)
        if self.clip_norm and norm > self.clip_norm:
            log(WARNING, "round %s: %s: its change of norm %.4g was scaled down to clip_norm = %g",
                self.round.number, assignment.client.name, norm, self.clip_norm)  # fmt: skip
            return clipped, min(norm, self.clip_norm)
        noise = 0.0
        if self.privacy:
            noise = self.privacy.privacy.clip * self.privacy.privacy.noise_multiplier
        if math.isfinite(norm):  # the rule names what is not
            self.participation.guard.check_norm(norm, sent, noise)
        return clipped, norm

    def _tell_plan(self) -> None:
        """Hand what the sampler decided to listeners."""
        while (record := self.participation.sampler.record()) is not None:
            self._emit(cast(Record, record))

    def _reject(self, assignment: Assignment, reason: str, nbytes: int = 0) -> None:
        self.round.reject(assignment, reason, nbytes)
        self.census.doubt(assignment.client.node_id)
        log(WARNING, "round %s: rejected %s: %s", self.round.number, assignment.client.name, reason)
