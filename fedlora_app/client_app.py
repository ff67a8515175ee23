"""The client: a Flower ``NumPyClient`` around a PEFT model.

The base model is loaded once a process and serves every client that runs there, one
after the other; only the adapter is swapped, at the rank the server sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar
from numpy.typing import NDArray

from fedlora_app.baselines import (
    CENTRAL_KEY,
    NOT_HERE,
    OWN_KEY,
    TIMES_KEY,
    own_metrics,
    together,
    training_of,
    trains_alone,
)
from fedlora_app.config.keys import RunConfig, TrainConfig
from fedlora_app.config.precision import with_precision
from fedlora_app.data.kept import encoded, shares_of
from fedlora_app.data.rows import train_validation_split
from fedlora_app.discretion import LOG, SiteError, discreet
from fedlora_app.evaluation import evaluate, per_sample_losses
from fedlora_app.launch.inspection import NO_DATA, block, refuse_few
from fedlora_app.models.bits import BITS
from fedlora_app.models.lora import add_lora, training_scale
from fedlora_app.tasks import About, Inputs, Rows, Task, make_task
from fedlora_app.training import default_device, train_rounds
from strategies.capacity import CAPACITY_KEY
from strategies.client import (
    IDENTITY_KEYS,
    adapter_state,
    bundled,
    capacity,
    fit_reply,
    load_adapter,
    merge_into_base,
    profile,
    profile_wanted,
    receive_parameters,
    timed,
    trained_at,
)
from strategies.lora import Adapter
from strategies.memory import PhaseMemory
from strategies.messages import CLIENT_KEY, COUNT_KEY, MODEL_ROUND_KEY, QUALITY_KEY, ROUND_KEY
from strategies.privacy.mechanism import CLIP_KEY, NOISE_KEY
from strategies.profiling import PROFILE_KEY, SAMPLES_KEY, Profile, profile_rows
from strategies.ranks.quality import VALIDATE_KEY, VALIDATION_LOSS
from strategies.training import TrainOutcome, message_penalty

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import, which a query does not need

INFO_KEY = "task-info"  # what the server knows of the task, as JSON
BITS_KEY = "precision-bits"  # of the frozen weights, as each node chose
PRECISION_BITS = {"float32": 32, "bfloat16": 16}

Settings = dict[str, Scalar]


class LoRAClient(NumPyClient):
    """Train and evaluate the received adapter on this node's own rows.

    Parameters
    ----------
    config : RunConfig
    node : mapping
        The node config: ``partition-id`` and ``num-partitions`` in a simulation, or
        ``data-path`` on a site of its own; ``max-rank`` if the device has a limit.
    state : RecordDict
        The node's Flower state, which lasts from round to round.
    """

    def __init__(self, config: RunConfig, node: Settings, state: RecordDict) -> None:
        self.config = config
        self.task = _task(config)
        self.node = node
        self.state = state
        # Also where only the node wants it: nothing about its rows leaves but noised updates.
        self.private = config.privacy.noise_multiplier > 0 or NOISE_KEY in node
        self.limits = dict(node)
        if config.privacy.noise_multiplier:  # what the run promises, a message must not undercut
            self.limits.setdefault(NOISE_KEY, config.privacy.noise_multiplier)
            self.limits.setdefault(CLIP_KEY, config.privacy.clip)

    def get_properties(self, config: Settings) -> Settings:
        """Say who this is: what the node config holds, and a profile if that is asked for.

        The profile is measured on the model as it starts, which every node builds from the
        same seed, and kept in the Flower state: asked again, nothing is computed.
        """
        told: Settings = {key: self.node[key] for key in IDENTITY_KEYS if key in self.node}
        if self.private:
            self._refuse(bool(config.get(PROFILE_KEY)), "a profile of its rows")
            self._refuse(bool(config.get(CAPACITY_KEY)), "the time of a step on its rows")
            told.pop("num-examples", None)
            return told
        if config.get(COUNT_KEY):
            told["num-examples"] = self.task.size(self._rows(config)[0])
        if config.get(PROFILE_KEY):

            def measure() -> Profile:
                model = self._model(config)
                merge_into_base(model, Adapter({}))
                load_adapter(model, _start(model))
                return self._losses(model, config)

            told.update(profile(self.state, measure))
        device = default_device()
        told.update(capacity(self.state, config, lambda: self._step(config, device), device=device))
        return told

    def fit(
        self, parameters: NDArrays, config: Settings
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train at the rank that was sent; return the same arrays, trained."""
        judged = bool(config.get(VALIDATE_KEY) or config.get(QUALITY_KEY))
        if self.private:
            self._refuse(judged or profile_wanted(config), "numbers measured on its rows")
        model = self._receive(parameters, config)
        rows, held_out = self._rows(config)
        seed, clients = self.config.seed, int(self.node.get("num-partitions", 1))
        settings = training_of(self.config, config, clients)
        inputs = self.task.for_training(rows)
        own = "" if self.private else str(config.get(OWN_KEY, ""))
        before = self._evaluate(model, held_out) if own == "both" else {}
        scale = training_scale(self.config.lora)
        with trained_at(model, scale) if scale else nullcontext():
            done = self._train_with_others(
                model, inputs, settings.in_round(int(config[MODEL_ROUND_KEY])), config
            ) or train_rounds(
                model, inputs, settings, config, seed=seed, rounds=int(config.get(TIMES_KEY, 1))
            )
        loaded: dict[str, float] = model.fedlora_loaded
        metrics = {**done.metrics(), BITS_KEY: self._bits, **loaded, **done.memory}
        after = self._evaluate(model, held_out) if own else {}
        metrics |= own_metrics(before, after)
        if judged:
            scores = self._evaluate(model, held_out)
            metrics |= {VALIDATION_LOSS: scores["loss"], "quality": self.task.quality(scores)}
        return fit_reply(
            model,
            config,
            self.state,
            num_examples=self.task.size(rows),
            metrics=metrics,
            node=self.limits,
        )

    def _train_with_others(
        self, model: PeftModel, inputs: Inputs, settings: TrainConfig, message: Settings
    ) -> TrainOutcome | None:
        """Train in one batch with clients of other processes, if that is asked for and possible."""
        most = self.config.simulate.clients_per_process
        if most < 2 or trains_alone(message) or "partition-id" not in self.node:
            return None
        if message_penalty(model, message) is not None:
            return None
        from fedlora_app.rendezvous import of_this_run
        from fedlora_app.together import Job, train_with_others

        meeting, config, info = of_this_run(most), self.config, _info(message)
        if meeting is None:
            return None

        def elsewhere(place: Any, told: Mapping[str, Any]) -> tuple[Inputs, TrainConfig]:
            rows = _partition_rows(*place, config, info)[0]
            return self.task.for_training(rows), config.train.in_round(told[MODEL_ROUND_KEY])

        told = {key: message[key] for key in (ROUND_KEY, CLIENT_KEY, MODEL_ROUND_KEY)}
        adapter = Adapter.from_state_dict(adapter_state(model), self.config.lora.scale)
        job = Job(adapter, inputs, settings, config.seed, told)
        place = [int(self.node[key]) for key in ("partition-id", "num-partitions")]
        return train_with_others(meeting, self.task, model, job, place, elsewhere)

    def evaluate(
        self, parameters: NDArrays, config: Settings
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate the received adapter on this node's validation rows."""
        self._refuse(self.private, "scores on its rows")
        model = self._receive(parameters, config)
        _, rows = self._rows(config)
        scores = self._evaluate(model, rows)
        return scores.pop("loss"), self.task.size(rows), dict(scores)

    @property
    def _bits(self) -> int:
        kind = self.config.model.quantization
        return BITS.get(kind, PRECISION_BITS[self.config.train.precision])

    @staticmethod
    def _refuse(asked: bool, what: str) -> None:
        if asked:
            text = (
                f"this node keeps its data private, but the message asks for {what}; see "
                "docs/privacy.md for settings that need none"
            )
            raise SiteError(text, text)

    def _evaluate(self, model: PeftModel, rows: Inputs) -> dict[str, float]:
        return evaluate(
            self.task,
            model,
            rows,
            batch_size=self.config.evaluate.batch_size,
            precision=self.config.train.precision,
        )

    def _losses(self, model: PeftModel, config: Settings) -> Profile:
        """Return the losses of the rows, or of a seeded choice of them, and all their classes."""
        c = self.config
        rows, strata = self._rows(config)[0], self._strata(config)
        chosen = profile_rows(len(rows), int(config.get(SAMPLES_KEY, 0)), c.seed)
        losses = per_sample_losses(
            self.task,
            model,
            rows.take(chosen),
            batch_size=c.evaluate.batch_size,
            precision=c.train.precision,
        )
        return Profile(losses, self.task.mix(rows, strata), self.task.size(rows))

    def _step(self, config: Settings, device: torch.device) -> Callable[[], None]:
        """Return a training step at rank 1 on a batch of this node's largest rows."""
        from fedlora_app.timing import training_step  # with the clocks, which no other query needs

        model = self._model(config)
        merge_into_base(model, Adapter({}))
        load_adapter(model, _start(model))
        inputs = self.task.for_training(self._rows(config)[0])
        return training_step(model.to(device), inputs, self.config, 1)

    def _receive(self, parameters: NDArrays, config: Settings) -> PeftModel:
        """Put the received arrays into the resident model, and profile it if that is asked for."""
        model = self._model(config)
        receive_parameters(
            model,
            parameters,
            config,
            self.state,
            measure=lambda: self._losses(model, config),
            node=self.node,
        )
        return model

    def _model(self, config: Settings) -> PeftModel:
        """Return the resident model, as the client before left it."""
        torch.set_num_threads(self.config.train.threads)  # the process is this app's own
        return _resident_model(self.config, _info(config))

    def _rows(self, config: Settings) -> tuple[Inputs, Inputs]:
        """Return this node's training and validation rows, as the model takes them."""
        return self._held(config)[:2]

    def _strata(self, config: Settings) -> NDArray[np.int64]:
        """Return the classes of the training rows; empty where the task has none."""
        return self._held(config)[2]

    def _held(self, config: Settings) -> Held:
        info, central = _info(config), CENTRAL_KEY in config
        if "data-path" in self.node and central:
            raise SiteError(NOT_HERE, NOT_HERE)
        if "data-path" in self.node:
            return _own_rows(str(self.node["data-path"]), self.config, info)
        if "partition-id" not in self.node or "num-partitions" not in self.node:
            raise SiteError(NO_DATA, NO_DATA)
        share, shares = int(self.node["partition-id"]), int(self.node["num-partitions"])
        if central:
            return _all_rows(shares, self.config, info)
        return _partition_rows(share, shares, self.config, info)


Held = tuple[Inputs, Inputs, NDArray[np.int64]]


def _info(config: Settings) -> str:
    """Return what a message says of the task, as it stands there."""
    if INFO_KEY not in config:
        text = f"the message has no {INFO_KEY!r}: the server runs another version of this app"
        raise SiteError(text, text)
    return str(config[INFO_KEY])


@lru_cache(maxsize=8)
def _about(info: str) -> About:
    found: About = json.loads(info)
    return found


@lru_cache(maxsize=1)
def _task(config: RunConfig) -> Task:
    """Return the process's one task."""
    try:
        return make_task(config)
    except ValueError as error:
        told = (
            f"task = {config.task!r}: this node does not know it; install the module that "
            f"registers it (plugins = {config.plugins!r}) where the node runs"
        )
        raise SiteError(f"{told}: {error}", told) from error


@lru_cache(maxsize=1)
def _resident_model(config: RunConfig, info: str) -> PeftModel:
    """Return the process's one model; every client resizes its LoRA modules in place."""
    memory, task = PhaseMemory(default_device()), _task(config)
    with memory.phase("load"):
        base = task.model(_about(info), seed=config.seed, precision=config.train.precision)
        base.to(memory.device)
    made = add_lora(base, config.lora, rank=1, seed=config.seed)
    made.fedlora_loaded = memory.peaks
    made.fedlora_start = {k: tensor.cpu().clone() for k, tensor in adapter_state(made).items()}
    return made


def _start(model: PeftModel) -> Adapter:
    """Return the adapter the model was made with: a seeded head, and B = 0."""
    return Adapter.from_state_dict(model.fedlora_start, 1.0)  # no scale matters where B = 0


@lru_cache(maxsize=1)
def _train_rows(config: RunConfig, info: str) -> Rows:
    return _task(config).train_rows(_about(info))


@lru_cache(maxsize=1)
def _shares(shares: int, config: RunConfig, info: str) -> list[np.ndarray]:
    return shares_of(_task(config), _train_rows(config, info), shares)


@lru_cache(maxsize=1024)
def _partition_rows(share: int, shares: int, config: RunConfig, info: str) -> Held:
    indices = _shares(shares, config, info)[share]
    rows = _train_rows(config, info).take(indices)
    return _held(rows, encoded(_task(config), rows), config)


@lru_cache(maxsize=1)
def _all_rows(shares: int, config: RunConfig, info: str) -> Held:
    """Return the training rows of all clients together, and what they hold out."""
    rows, task = _train_rows(config, info), _task(config)
    kept, held_out = together(_shares(shares, config, info), config)
    inputs, strata = encoded(task, rows), task.strata(rows)
    none = np.zeros(0, np.int64)
    return inputs.take(kept), inputs.take(held_out), none if strata is None else strata[kept]


@lru_cache(maxsize=1)
def _own_rows(path: str, config: RunConfig, info: str) -> Held:
    task = _task(config)
    rows = task.own_rows(path, _about(info))
    refuse_few(rows, path)
    LOG.info("%s", "\n".join(block(task, "own rows", rows)))  # in this node's own log
    return _held(rows, task.encode(rows), config)


def _held(rows: Rows, inputs: Inputs, config: RunConfig) -> Held:
    """Hold some of the rows out."""
    fraction, strata = config.data.validation_fraction, _task(config).strata(rows)
    kept, held_out = train_validation_split(range(len(rows)), fraction, config.seed)
    if strata is None:
        strata = np.zeros(0, np.int64)
    return inputs.take(kept), inputs.take(held_out), strata[kept] if len(strata) else strata


@lru_cache(maxsize=1)
def _begin(run_id: int) -> None:
    """Forget what this process holds of another run: a site's file may have other rows by now."""
    rows = (_train_rows, _shares, _partition_rows, _all_rows, _own_rows)
    for held in (_task, _resident_model, *rows):
        held.cache_clear()


def client_fn(context: Context) -> Client:
    """Return the client of one node."""
    _begin(context.run_id)
    # The server has checked it. In what this node computes is for its own hardware to say.
    config = with_precision(RunConfig.from_flat(context.run_config))
    return LoRAClient(config, dict(context.node_config), context.state).to_client()


app = ClientApp(client_fn=client_fn, mods=[discreet, bundled, timed])
