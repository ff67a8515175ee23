"""The server: config → strategy → start → save."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from fedlora_app.client_app import LABELS_KEY, STEPS_KEY
from fedlora_app.config import ConfigError, RunConfig
from fedlora_app.data import TokenizedRows, load_test, tokenize
from fedlora_app.models import add_lora, build_model, build_tokenizer
from fedlora_app.report import RunFolder
from fedlora_app.training import EvalResult, evaluate, per_sample_losses, torch_threads
from strategies import FedLoRA
from strategies.aggregation import make_aggregator
from strategies.client import adapter_state, check_mergeable, load_adapter
from strategies.clients import Client
from strategies.lora import Adapter
from strategies.messages import from_record, to_record
from strategies.model import GlobalModel
from strategies.ranks import (
    AutoRank,
    ListRank,
    QualityRank,
    RankPolicy,
    ReportedRank,
    SelfPruningRank,
    UniformRank,
)
from strategies.sampling import make_sampler

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import, which a query does not need

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says."""
    config = RunConfig.from_flat(context.run_config)
    default = f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{config.aggregation}"
    began = time.perf_counter()
    test = TestSet(config)
    model, adapter = initial_adapter(config, len(test.label_names))
    # Only now: a run that finds no model or data leaves no folder behind.
    folder = RunFolder(Path(config.output or default), config)
    log(INFO, "%s: %s on %s, %s", config.method, config.model.name, config.data.name, adapter)

    strategy = make_strategy(config, folder, test, model)
    if strategy.aggregation.merges_base:
        check_mergeable(model)
    alone = config.method == "local"
    train_config = ConfigRecord(
        {LABELS_KEY: json.dumps(test.label_names), STEPS_KEY: config.rounds if alone else 1}
    )
    result = strategy.start(
        grid,
        to_record(adapter.to_state_dict()),
        num_rounds=1 if alone else config.rounds,
        timeout=config.round_timeout,
        train_config=train_config,
        evaluate_config=train_config,
        evaluate_fn=None if alone else lambda _, arrays: test.metrics(model, arrays),
    )

    if not any(book["accepted"] for book in folder.rounds):
        raise RuntimeError(
            f"no client sent a good reply in any round; the last reason: {folder.last_reason}"
        )
    load_adapter(model, effective_adapter(result.arrays, config))
    if isinstance(strategy, Alone):
        scores = strategy.scores()
    else:
        score = test.evaluate(model, everything=True)
        scores = {"accuracy": score.accuracy, "macro_f1": score.macro_f1, "loss": score.loss}
    folder.finish(scores, model, seconds=time.perf_counter() - began)


class TestSet:
    """The server's held-out rows; ``validation`` are those that judge, and never test."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(self, config: RunConfig) -> None:
        rows = load_test(config.data)
        self.label_names = rows.label_names
        self.config = config
        tokenizer = build_tokenizer(config.model)
        self.all: TokenizedRows = tokenize(rows, tokenizer, config.data.max_length)
        self.validation: TokenizedRows | None = None
        if config.ranks.policy == "quality" and (size := config.ranks.validation_rows):
            if size >= len(self.all):
                raise ConfigError(
                    [
                        f"ranks.validation-rows: the test set has {len(self.all)} rows, so {size} "
                        "leave none to test on"
                    ]
                )
            order = np.random.default_rng([config.seed, 1]).permutation(len(self.all))
            self.validation = self.all.take(np.sort(order[:size]))
            self.all = self.all.take(np.sort(order[size:]))
        self.some = self.all
        if 0 < config.data.test_rows < len(self.all):
            rng = np.random.default_rng(config.seed)
            chosen = rng.choice(len(self.all), config.data.test_rows, replace=False)
            self.some = self.all.take(np.sort(chosen))

    def evaluate(self, model: PeftModel, *, everything: bool = False) -> EvalResult:
        """Evaluate the model as it is, on all cores."""
        with torch_threads(os.cpu_count() or 1):
            return evaluate(
                model,
                self.all if everything else self.some,
                batch_size=self.config.evaluate.batch_size,
                num_labels=len(self.label_names),
                precision=self.config.train.precision,
            )

    def validation_loss(self, model: PeftModel, adapter: Adapter) -> float:
        """Return the loss of a client's adapter on the validation rows."""
        if self.validation is None:
            raise ValueError("there are no validation rows; set ranks.validation-rows")
        load_adapter(model, adapter)
        with torch_threads(os.cpu_count() or 1):
            losses = per_sample_losses(
                model,
                self.validation,
                batch_size=self.config.evaluate.batch_size,
                precision=self.config.train.precision,
            )
        return float(losses.mean())

    def metrics(self, model: PeftModel, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate global arrays; what the strategy calls after each round."""
        load_adapter(model, effective_adapter(arrays, self.config))
        score = self.evaluate(model)
        return MetricRecord(
            {"loss": score.loss, "accuracy": score.accuracy, "macro_f1": score.macro_f1}
        )


def effective_adapter(arrays: ArrayRecord, config: RunConfig) -> Adapter:
    """Return the whole global model as one adapter on the base, for evaluation and export."""
    return GlobalModel.from_tensors(from_record(arrays), config.lora.scale).combined()


def initial_adapter(config: RunConfig, num_labels: int) -> tuple[PeftModel, Adapter]:
    """Return the server's model and the adapter that round 1 starts from."""
    base = build_model(
        config.model, num_labels=num_labels, seed=config.seed, precision=config.train.precision
    )
    model = add_lora(base, config.lora, rank=config.max_rank(), seed=config.seed)
    state = {key: value.clone() for key, value in adapter_state(model).items()}
    adapter = Adapter.from_state_dict(state, config=model.peft_config["default"])
    return model, adapter.only_dense() if config.method == "head" else adapter


def make_ranks(config: RunConfig, score_fn: Callable[[Adapter], float] | None = None) -> RankPolicy:
    """Return the rank policy of the run config; ``score_fn`` is for ``quality``."""
    r = config.ranks
    match r.policy:
        case "uniform":
            return UniformRank(r.rank)
        case "reported":
            return ReportedRank(r.max, fallback=r.fallback_rank())
        case "quality":
            return QualityRank(r.low, r.high, r.best_fraction, score_fn=score_fn)
        case "autorank":
            return AutoRank(
                r.min,
                r.max,
                budget=r.budget or None,
                byte_budget=r.budget_mb * 1e6 or None,
                reassign_every=r.reassign_every,
                fallback=r.fallback or None,
                profile_samples=r.profile_samples,
                order=r.order,
                seed=config.seed,
            )
        case "self-pruning":
            return SelfPruningRank(r.max, gamma=r.gamma, penalty=r.penalty, min_rank=r.min)
        case policy:
            return ListRank(config.rank_list(), cycle=policy == "cycle")


def make_strategy(config: RunConfig, folder: RunFolder, test: TestSet, model: PeftModel) -> FedLoRA:
    """Return the strategy of the run config."""
    sampler = make_sampler(
        config.sampling.policy,
        fraction=config.sampling.fraction,
        min_clients=config.sampling.min_clients,
    )
    judge = None
    if test.validation is not None:
        judge = partial(test.validation_loss, model)
    settings: dict[str, Any] = {
        "aggregation": make_aggregator(config.aggregation, **config.aggregation_settings()),
        "ranks": make_ranks(config, judge),
        "profile_timeout": config.ranks.profile_timeout,
        "client_api": "numpy",
        "scale": config.lora.scale,
        "wire_dtype": config.wire_dtype,
        "seed": config.seed,
        "min_replies": config.min_replies,
        "min_available_nodes": config.min_nodes,
        "evaluate_fraction": 0.0 if config.method == "local" else config.evaluate.clients,
        "evaluate_every": config.evaluate.every,
        "listeners": [folder],
    }
    if config.method == "local":
        # Whatever the rule: who trains alone trains, and is tested with, all of its adapter.
        return Alone(test, model, **{**settings, "aggregation": "replication"})
    return FedLoRA(sampling=sampler, **settings)


class Alone(FedLoRA):
    """Baseline: every client trains alone, and each result is tested by itself."""

    def __init__(self, test: TestSet, model: PeftModel, **settings: Any) -> None:
        super().__init__(**settings)
        self.test = test
        self.model = model
        self.results: dict[Client, EvalResult] = {}

    def on_update(self, client: Client, adapter: Adapter) -> None:
        """Test one client's own adapter on the server's test set."""
        load_adapter(self.model, adapter)
        score = self.test.evaluate(self.model, everything=True)
        self.results[client] = score
        log(INFO, "%s alone: accuracy %.3f macro-F1 %.3f",
            client.name, score.accuracy, score.macro_f1)  # fmt: skip

    def scores(self) -> dict[str, float]:
        """Return mean, best and worst over the clients."""
        results = list(self.results.values())
        accuracy = [r.accuracy for r in results]
        return {
            "accuracy": float(np.mean(accuracy)),
            "accuracy_best": max(accuracy),
            "accuracy_worst": min(accuracy),
            "macro_f1": float(np.mean([r.macro_f1 for r in results])),
            "macro_f1_best": max(r.macro_f1 for r in results),
            "loss": float(np.mean([r.loss for r in results])),
        }
