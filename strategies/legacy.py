"""``FedLoRA`` for servers of the old style: ``ServerAppComponents(strategy=…)``.

``LegacyFedLoRA`` is a ``flwr.server.strategy.Strategy`` around a ``FedLoRA``, which does all
the work: this file only translates. ``Parameters`` become records and back, ``FitIns`` and
``FitRes`` become messages, and client proxies become node ids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    MetricsAggregationFn,
    NDArrays,
    Parameters,
    Scalar,
    log,
)
from flwr.server import ClientManager
from flwr.server.strategy import Strategy
from flwr.serverapp.strategy import Result
from torch import Tensor

from strategies.claims import clean
from strategies.flower import ClientProxy
from strategies.flower import recorddict_compat as compat
from strategies.messages import NAMES_KEY, SCALE_KEY, NumPyProtocol, to_record
from strategies.proxy_grid import ProxyGrid, identify, node_id_of
from strategies.round.replies import MetricsAggregation
from strategies.strategy import FedLoRA

ConfigFn = Callable[[int], dict[str, Scalar]]
EvaluateFn = Callable[[int, NDArrays, dict[str, Scalar]], tuple[float, dict[str, Scalar]] | None]
Failures = Sequence[tuple[ClientProxy, Any] | BaseException]


class LegacyFedLoRA(Strategy):
    """A ``FedLoRA`` as a strategy of the old style.

    ``ServerAppComponents(strategy=LegacyFedLoRA(FedLoRA(client_api="numpy", …), arrays))``
    in place of ``FedAvg(…)``. The functions are called as ``FedAvg`` calls them; the shares
    and numbers of clients are settings of the ``FedLoRA`` (``sampling``,
    ``evaluate_fraction``, ``min_available_nodes``).

    An instance serves one run.

    Parameters
    ----------
    engine : FedLoRA
        With ``client_api="numpy"``; a preset or a subclass will do.
    initial_arrays : ArrayRecord or Mapping[str, Tensor]
        What ``peft.get_peft_model_state_dict`` returns for a model of the largest rank.
    num_rounds : int, optional
        That of the ``ServerConfig``: with it the log has a line for each round, the last
        round is evaluated whatever ``evaluate_every`` is, and a resumed run ends after as many
        rounds in all. Rounds that the server still calls for after that, or after
        ``stop_when``, are empty.
    evaluate_fn : callable, optional
        ``(server_round, parameters, config) -> (loss, metrics) or None``, on the server.
        ``strategies.client.receive_parameters(model, parameters, config)`` loads them.
    on_fit_config_fn, on_evaluate_config_fn : callable, optional
        ``server_round -> dict``, sent to the clients along with the settings of ``FedLoRA``.
    fit_metrics_aggregation_fn, evaluate_metrics_aggregation_fn : callable, optional
        ``[(num_examples, metrics), …] -> metrics``, given the numbers that all good replies
        have (default: their mean by ``num_examples``).

    Raises
    ------
    ValueError
        If ``engine`` is set for Message API clients.
    """

    def __init__(
        self,
        engine: FedLoRA,
        initial_arrays: ArrayRecord | Mapping[str, Tensor],
        *,
        num_rounds: int | None = None,
        evaluate_fn: EvaluateFn | None = None,
        on_fit_config_fn: ConfigFn | None = None,
        on_evaluate_config_fn: ConfigFn | None = None,
        fit_metrics_aggregation_fn: MetricsAggregationFn | None = None,
        evaluate_metrics_aggregation_fn: MetricsAggregationFn | None = None,
    ) -> None:
        if not isinstance(engine.protocol, NumPyProtocol):
            raise ValueError(
                "engine: a server of the old style speaks to NumPyClients; expected "
                "FedLoRA(client_api='numpy', …)"
            )
        self.engine = engine
        self.num_rounds = num_rounds
        self.evaluate_fn = evaluate_fn
        self.on_fit_config_fn = on_fit_config_fn
        self.on_evaluate_config_fn = on_evaluate_config_fn
        if fit_metrics_aggregation_fn is not None:
            engine.train_metrics_aggr_fn = _old_style(fit_metrics_aggregation_fn)
        if evaluate_metrics_aggregation_fn is not None:
            engine.evaluate_metrics_aggr_fn = _old_style(evaluate_metrics_aggregation_fn)
        if not isinstance(initial_arrays, ArrayRecord):
            initial_arrays = to_record(initial_arrays)
        self.result = Result(arrays=initial_arrays)
        self._parameters: Parameters | None = None  # result.arrays as the server knows them
        # What the server goes on holding after a round that nobody joined, whatever we hold.
        self._stale: Parameters | None = None
        self._done = 0  # rounds of an earlier run that this one goes on with
        self._over = False
        self._began = time.perf_counter()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.engine).__name__})"

    # ----- what the server calls -------------------------------------------------------

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Return the initial adapter, once it is checked.

        Raises
        ------
        ValueError
            If the rule or the rank policy cannot work with it.
        """
        self.engine.summary()
        self.engine.check(self.result.arrays)
        self.engine.num_rounds = self.num_rounds or 0
        self.engine.flow.refuse_other_loops()
        self.engine.led = True
        self._done = self.engine.resume(self.result)
        self.engine.begin(self._done)
        self._over = self.num_rounds is not None and self._done >= self.num_rounds
        self._began = time.perf_counter()
        if not self._done and self.evaluate_fn is None:
            self.engine.round_over(0, self.result)
        return self._current()

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Return for each chosen client its own slice of the adapter, and its settings."""
        if self._over:
            return []
        number = self._done + server_round
        grid = ProxyGrid(client_manager)
        messages = self.engine.configure_train(
            number, self._arrays(parameters), _config(self.on_fit_config_fn, number), grid
        )
        chosen = [
            (grid.proxy(message), compat.recorddict_to_fitins(message.content, keep_input=True))
            for message in messages
        ]
        if not chosen:  # the server will not call aggregate_fit
            self._stale = parameters
            self.aggregate_fit(server_round, [], [])
        return chosen

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: Failures,
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Return the next adapter and the clients' metrics; a bad reply is left out, by name."""
        number = self._done + server_round
        replies = [
            _reply(proxy, compat.fitres_to_recorddict(answer, keep_input=True), "train")
            for proxy, answer in _answers(results, failures, number)
        ]
        arrays, metrics = self.engine.aggregate_train(number, replies)
        if arrays is not None:
            self.result.arrays, self._parameters = arrays, None
        if metrics is not None:
            self.result.train_metrics_clientapp[number] = metrics
        return self._current(), _scalars(metrics)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate the adapter with ``evaluate_fn``, in the rounds that are evaluated."""
        number = self._done + server_round
        due = self._due(number) if server_round else not self._done  # a resumed run has been
        if self.evaluate_fn is None or self._over or not due:
            return None
        arrays = self._arrays(parameters)
        config: dict[str, Scalar] = {
            NAMES_KEY: json.dumps(list(arrays)), SCALE_KEY: self.engine.scale
        }  # fmt: skip
        found = self.evaluate_fn(number, [array.numpy() for array in arrays.values()], config)
        if found is not None:
            loss, metrics = found
            numbers = {"loss": float(loss), **_numbers(metrics)}
            self.result.evaluate_metrics_serverapp[number] = MetricRecord(dict(numbers))
            self.engine.round.evaluation = {key: float(value) for key, value in numbers.items()}
        if number == 0:
            self._tell()
            self.engine.round_over(0, self.result)
        return found

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Return for each client that evaluates the adapter at its own rank."""
        if self._over:
            return []
        number = self._done + server_round
        grid = ProxyGrid(client_manager)
        chosen = []
        if self._due(number):
            settings = _config(self.on_evaluate_config_fn, number)
            messages = self.engine.configure_evaluate(
                number, self._arrays(parameters), settings, grid
            )
            chosen = [
                (grid.proxy(m), compat.recorddict_to_evaluateins(m.content, keep_input=True))
                for m in messages
            ]
        if not chosen:  # the server will not call aggregate_evaluate
            self._round_over(number)
        return chosen

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: Failures,
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Return the clients' mean loss and metrics."""
        number = self._done + server_round
        replies = [
            _reply(proxy, compat.evaluateres_to_recorddict(answer), "evaluate")
            for proxy, answer in _answers(results, failures, number)
        ]
        metrics = self.engine.aggregate_evaluate(number, replies)
        if metrics is not None:
            self.result.evaluate_metrics_clientapp[number] = metrics
        loss = self.engine.round.clients_evaluation.get("loss")
        self._round_over(number)
        return loss, {key: value for key, value in _scalars(metrics).items() if key != "loss"}

    # ----- parts -----------------------------------------------------------------------

    def _current(self) -> Parameters:
        """Return the arrays of the run as parameters."""
        if self._parameters is None:
            self._parameters = compat.arrayrecord_to_parameters(self.result.arrays, keep_input=True)
        return self._parameters

    def _arrays(self, parameters: Parameters) -> ArrayRecord:
        """Return parameters under their names; the record they came from, if it is ours."""
        if parameters is self._parameters or parameters is self._stale:
            return self.result.arrays
        names, tensors = list(self.result.arrays), parameters.tensors
        if len(names) != len(tensors):
            raise ValueError(
                f"expected the {len(names)} arrays of the adapter, got {len(tensors)}; a strategy "
                "around this one may change their values, not their number"
            )
        unnamed = compat.parameters_to_arrayrecord(parameters, keep_input=True)
        record = ArrayRecord(dict(zip(names, unnamed.values(), strict=True)))
        self.engine.outside.came_back(record)
        self._parameters, self.result.arrays = parameters, record
        return record

    def _due(self, number: int) -> bool:
        return self.engine.evaluates(number) or number == self.num_rounds

    def _round_over(self, number: int) -> None:
        self._tell()
        if self.num_rounds is not None:
            each = (time.perf_counter() - self._began) / (number - self._done)
            line = self.engine.round_line(self.num_rounds, each * (self.num_rounds - number))
            log(INFO, "%s", line)
        ended = self.engine.reached(number)
        if not ended and number == self.num_rounds:
            ended = f"all {number} rounds are done"
        self.engine.ended = ended
        self.engine.round_over(number, self.result)
        self._over = bool(ended)
        if ended:
            log(INFO, "the run is over: %s", ended)
            self.engine.finish(number)

    def _tell(self) -> None:
        self.engine.tell(self.engine.round.record())


def _answers(
    results: Sequence[tuple[ClientProxy, Any]], failures: Failures, number: int
) -> list[tuple[ClientProxy, Any]]:
    """Return results and refused results; an exception does not say whose it is."""
    answers = list(results)
    for failure in failures:
        if isinstance(failure, BaseException):
            log(WARNING, "round %s: a client failed: %s", number, clean(str(failure)))
        else:
            answers.append(failure)
    return answers


def _reply(proxy: ClientProxy, content: RecordDict, message_type: str) -> Message:
    """Return a result as the message it once was."""
    identify()
    return Message(content, reply_to=Message(RecordDict(), node_id_of(proxy), message_type))


def _config(make: ConfigFn | None, number: int) -> ConfigRecord:
    return ConfigRecord(dict(make(number)) if make is not None else {})  # type: ignore[arg-type]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _scalars(metrics: MetricRecord | None) -> dict[str, Scalar]:
    return dict(metrics) if metrics is not None else {}  # type: ignore[arg-type]


def _old_style(aggregate: MetricsAggregationFn) -> MetricsAggregation:
    """Return a metrics aggregation of the old style as one of the new."""

    def new_style(contents: list[RecordDict], weight_key: str) -> MetricRecord:
        pairs = []
        for content in contents:
            metrics = dict(content.metric_records["metrics"])
            pairs.append((int(metrics.pop(weight_key)), metrics))  # type: ignore[arg-type]
        return MetricRecord(_numbers(aggregate(pairs)))  # type: ignore[arg-type]

    return new_style
