"""The server: config → strategy → start → save."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from fedlora_app.alone import Alone, OwnScores, tune
from fedlora_app.baselines import CENTRAL_KEY, OWN_KEY, TIMES_KEY, TUNE_KEY
from fedlora_app.client_app import INFO_KEY
from fedlora_app.config.build import Parts
from fedlora_app.config.precision import with_precision
from fedlora_app.config.read import read_config
from fedlora_app.held_out import HeldOut, effective_adapter
from fedlora_app.launch.door import check_run
from fedlora_app.launch.inspection import CHECKED, inspect
from fedlora_app.models.lora import add_lora
from fedlora_app.models.starts import STARTS, start_of
from fedlora_app.report.folder import RunFolder
from fedlora_app.report.trackers import make_trackers
from fedlora_app.resuming import make_saver, resumed_here
from fedlora_app.tasks import About, Score, primary
from fedlora_app.timing import rank_cost
from fedlora_app.ways import settled
from strategies import FedLoRA
from strategies.client import adapter_state, load_adapter
from strategies.lora import Adapter
from strategies.messages import to_record
from strategies.model import GlobalModel
from strategies.privacy import PrivateRun
from strategies.promises import declares
from strategies.ranks import CapacityRank, UniformRank
from strategies.sampling import FractionSampling
from strategies.saving import Saver
from strategies.wallclock import SimulatedClock

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import, which a query does not need

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says."""
    judged = read_config(context.run_config)
    parts = judged.with_config(with_precision(judged.config))
    config = parts.config
    default = f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{config.aggregation}"
    began = time.perf_counter()
    path = Path(config.output or default).expanduser().absolute()
    checked = CHECKED in os.environ  # ``flwr run`` comes without the door of run_simulation.py
    data = inspect(parts.task, looked=checked)
    if not checked:
        log(INFO, "%s", data)
        log(INFO, "%s: %s", config.model.name, check_run(parts, path, data))
    test = HeldOut(parts.task, data.test, parts.validation_rows)
    model, begin = initial_model(parts, data.about)
    saver = make_saver(config, path, data.about)
    resumed = resumed_here(saver, path)
    columns = data.test.origin.columns
    folder = RunFolder(path, config, data.about, columns=columns, resume_round=resumed)
    log(INFO, "%s: %s on %s in %s, %s", config.method, config.model.name, config.data.name,
        config.train.precision, begin.adapter)  # fmt: skip

    arrays = to_record(begin.to_tensors())
    if config.round.mode == "auto":
        clients = max(config.min_nodes, len(list(grid.get_node_ids())))
        probe = make_strategy(parts, folder, test, model, tells=False)
        parts = settled(parts, probe, arrays, clients, folder if resumed is None else None)
    strategy = make_strategy(parts, folder, test, model, saver)
    strategy.check(arrays)
    folder.begin()  # only now: a run that cannot start leaves no folder, and none as it was not
    alone = config.method == "local"
    told = {INFO_KEY: json.dumps(data.about)}
    wanted: dict[str, dict[str, str | int]] = {
        "local": {TIMES_KEY: config.rounds, OWN_KEY: "after"},
        "central": {CENTRAL_KEY: 1},
    }
    own = OwnScores(parts.task.scores)
    if alone:
        strategy.listeners.append(own)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        beside = strategy.evaluations_can_wait and server_round < config.rounds
        metrics = test.metrics(model, arrays, beside=beside)
        folder.keep(test.samples, server_round)
        return metrics

    with make_trackers(config, path, resumed) as trackers:
        strategy.listeners.append(trackers)
        result = strategy.start(
            grid,
            arrays,
            num_rounds=1 if alone else config.rounds,
            timeout=config.round_timeout,
            train_config=ConfigRecord({**told, **wanted.get(config.method, {})}),
            evaluate_config=ConfigRecord({**told}),
            evaluate_fn=None if alone else evaluate,
        )

        if not any(book["accepted"] for book in folder.rounds):
            raise RuntimeError(
                f"no client sent a good reply in any round; the last reason: {folder.last_reason}"
            )
        if strategy.degradation.over:  # what was trained so far is in the checkpoints
            raise RuntimeError(
                f"the run ended after round {strategy.round.number}: {strategy.ended}"
            )
        if config.method == "personal":
            asked = ConfigRecord({**told, TUNE_KEY: 1, OWN_KEY: "both"})
            tune(strategy, grid, result.arrays, asked, own, timeout=config.round_timeout)
            folder(own.record(max(book["round"] for book in folder.rounds)))
        load_adapter(model, effective_adapter(result.arrays, config.lora.scale))
        if isinstance(strategy, Alone):
            scores = strategy.final()
        else:
            scores = test.evaluate(model, everything=True)
        folder.finish({**scores, **own.summary()}, model, seconds=time.perf_counter() - began)
        trackers.finish()


def initial_model(parts: Parts, about: About) -> tuple[PeftModel, GlobalModel]:
    """Return the server's model and what round 1 starts from."""
    config = parts.config
    base = parts.task.model(about, seed=config.seed, precision=config.train.precision)
    model = add_lora(base, config.lora, rank=parts.policy.max_rank, seed=config.seed)
    state = {key: value.clone() for key, value in adapter_state(model).items()}
    adapter = Adapter.from_state_dict(state, config=model.peft_config["default"])
    if config.method == "head":
        return model, GlobalModel(adapter.only_dense())
    if (variant := config.lora.variant) not in STARTS:
        return model, GlobalModel(adapter)
    start = start_of(model, variant, scale=config.lora.scale, rank=parts.policy.max_rank)
    return model, GlobalModel(Adapter(start.pairs, adapter.dense), start=start)


def stop_at(
    score: Score, wanted: float, rounds: Iterable[Mapping[str, Any]]
) -> Callable[[Mapping[str, float]], bool] | None:
    """Return what ends a run when a score's mean over three evaluations in a row is good enough.

    ``wanted`` 0: nothing does. ``rounds`` are those of a run that is resumed.
    """
    known = (r.get(f"server_{score.name}") for r in rounds if r["round"] > 0)
    last: deque[float] = deque((value for value in known if value is not None), maxlen=3)

    def reached(scores: Mapping[str, float]) -> bool:
        last.append(scores[score.name])
        mean = sum(last) / len(last)
        return len(last) == last.maxlen and score.reached(mean, wanted)

    return reached if wanted else None


def make_strategy(
    parts: Parts,
    folder: RunFolder,
    test: HeldOut,
    model: PeftModel,
    saver: Saver | None = None,
    *,
    tells: bool = True,
) -> FedLoRA:
    """Return the strategy that is made of these parts; the folder is told of its clock."""
    config = parts.config
    if test.validation is not None:
        parts.judge_by(partial(test.validation_loss, model))
    if isinstance(parts.policy, CapacityRank):
        largest = parts.policy.max_rank
        parts.policy.cost = rank_cost(model, test.all, config, max_rank=largest)
    settings: dict[str, Any] = {
        "aggregation": parts.rule,
        "ranks": parts.policy,
        # In a simulation clients queue for a core to say who they are, too.
        "query_timeout": config.ranks.profile_timeout,
        "client_api": "numpy",
        "scale": config.lora.scale,
        "wire_dtype": config.wire_dtype,
        "seed": config.seed,
        "head_only": config.method == "head",
        "min_replies": config.min_replies,
        "min_available_nodes": config.min_nodes,
        "min_answering": config.min_answering,
        "evaluate_fraction": 0.0 if config.method == "local" else config.evaluate.clients,
        "evaluate_every": config.evaluate.every,
        "evaluate_overlap": config.evaluate.overlap,
        "saver": saver,
        "clip_norm": config.clip_norm,
        "privacy": make_privacy(parts, folder.path, saver),
        "scores": parts.task.scores,
        "stop_when": stop_at(primary(parts.task), config.stop_score, folder.rounds),
        "listeners": [folder],
    }
    if config.method == "local":
        # Whatever the rule: who trains alone trains, and is tested with, all of its adapter.
        return Alone(test, model, **{**settings, "aggregation": "replication"})
    if config.method == "central":  # one of the clients trains on the rows of all
        everything = UniformRank(parts.policy.max_rank)
        one = {"aggregation": "replication", "ranks": everything, "min_replies": 1}
        return FedLoRA(**{**settings, **one}, sampling=FractionSampling(clients=1))
    blind = declares(parts.sampler, "clock_blind")
    clock = parts.clock.clock_on(
        model, test.all, config, max_rank=parts.policy.max_rank, blind=blind
    )
    if tells and isinstance(clock, SimulatedClock):  # what it takes to time the run again elsewhere
        folder(
            {
                "kind": "clock",
                "base_flops": clock.base_flops,
                "rank_flops": clock.rank_flops,
                "steps": clock.steps,
            }
        )
    optimizer = parts.optimizer or "none"
    return FedLoRA(
        sampling=parts.sampler,
        clock=clock,
        server_optimizer=optimizer,
        waiting=parts.waiting,
        proximal_mu=config.train.proximal_mu,
        **settings,
    )


def make_privacy(parts: Parts, path: Path, saver: Saver | None) -> PrivateRun | None:
    """Return what keeps the clients' data private; None where that is not asked for."""
    if parts.privacy is None:
        return None
    ledger = path / "privacy.json"
    if saver is not None and saver.resumed is not None and not ledger.exists():
        before = saver.resumed.path.parents[1] / ledger.name  # of the run that is gone on with
        if before.exists():
            shutil.copyfile(before, ledger)
        else:
            log(WARNING, "there is no %s: what clients gave away after round %s, in rounds that "
                "are repeated now, is not counted", before, saver.round)  # fmt: skip
    return PrivateRun(parts.privacy, parts.config.privacy.delta, ledger)
