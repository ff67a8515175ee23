"""The client: a Flower ``NumPyClient`` around a PEFT model.

The base model is loaded once a process and serves every client that runs there, one
after the other; only the adapter is swapped, at the rank the server sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import Context, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar
from torch import Tensor

from fedlora_app.config import DataConfig, LoraConfig, ModelConfig, RunConfig
from fedlora_app.data import (
    TokenizedRows,
    load_own,
    load_train,
    partition_indices,
    tokenize,
    train_validation_split,
)
from fedlora_app.discretion import LOG, SiteError, discreet
from fedlora_app.inspection import NO_DATA, block, refuse_few
from fedlora_app.models import add_lora, build_model, build_tokenizer
from fedlora_app.precision import with_precision
from fedlora_app.training import EvalResult, evaluate, per_sample_losses, train
from strategies.client import (
    IDENTITY_KEYS,
    adapter_state,
    check_limit,
    load_adapter,
    merge_into_base,
    profile,
    profile_wanted,
    receive,
    send,
    tail_penalty,
)
from strategies.lora import Adapter
from strategies.messages import (
    CLIENT_KEY,
    COUNT_KEY,
    MODEL_ROUND_KEY,
    NAMES_KEY,
    QUALITY_KEY,
    ROUND_KEY,
    STEPS_KEY,
    TRAIN_SECONDS_KEY,
)
from strategies.privacy.mechanism import CLIP_KEY, NOISE_KEY
from strategies.profiling import METRICS, PROFILE_KEY, SAMPLES_KEY, Profile, profile_rows
from strategies.ranks.pruning import GAMMA_KEY, PENALTY_KEY
from strategies.ranks.quality import VALIDATE_KEY, VALIDATION_LOSS

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import, which a query does not need

LABELS_KEY = "label-names"
TIMES_KEY = "steps-factor"
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
            told.pop("num-examples", None)
            return told
        if config.get(COUNT_KEY):
            told["num-examples"] = len(self._rows(json.loads(str(config[LABELS_KEY])))[0])
        if config.get(PROFILE_KEY):
            labels = json.loads(str(config[LABELS_KEY]))

            def measure() -> Profile:
                model = self._model(len(labels))
                merge_into_base(model, Adapter({}))
                load_adapter(model, _start(model))
                return self._losses(model, self._rows(labels)[0], config)

            told.update(profile(self.state, measure))
        return told

    def fit(
        self, parameters: NDArrays, config: Settings
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train at the rank that was sent; return the same arrays, trained."""
        labels = json.loads(str(config[LABELS_KEY]))
        model = self._receive(parameters, config, len(labels))
        rows, held_out = self._rows(labels)
        extra: dict[str, Scalar] = {}
        if self.private:
            wanted = profile_wanted(config) or config.get(VALIDATE_KEY) or config.get(QUALITY_KEY)
            self._refuse(bool(wanted), "numbers measured on its rows")
        if profile_wanted(config):  # of the received adapter, before it is trained
            found = profile(self.state, lambda: self._losses(model, rows, config), again=True)
            extra.update({key: found[key] for key in METRICS})
        server_round = int(config[ROUND_KEY])
        times = int(config.get(TIMES_KEY, 1))
        settings = self.config.train.in_round(int(config[MODEL_ROUND_KEY]), times=times)
        seed = np.random.SeedSequence([self.config.seed, server_round, int(config[CLIENT_KEY])])
        result = train(
            model,
            rows,
            settings,
            seed=int(seed.generate_state(1)[0]),
            penalty=_penalty(model, config),
            rounds=times,
        )
        if config.get(VALIDATE_KEY) or config.get(QUALITY_KEY):
            score = self._evaluate(model, held_out, len(labels))
            extra[VALIDATION_LOSS] = score.loss
            # A model that gets nothing right still counts a little: weights are above 0.
            extra["quality"] = max(score.accuracy, 1e-6)
        arrays = send(model, config, self.state, node=self.limits)
        if self.private:
            return [array.numpy() for array in arrays.values()], 1, {}
        metrics = {
            "loss": result.loss,
            TRAIN_SECONDS_KEY: result.seconds,
            STEPS_KEY: result.steps,
            BITS_KEY: PRECISION_BITS[self.config.train.precision],
            **extra,
        }
        return [array.numpy() for array in arrays.values()], result.examples, metrics

    def evaluate(
        self, parameters: NDArrays, config: Settings
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate the received adapter on this node's validation rows."""
        self._refuse(self.private, "scores on its rows")
        labels = json.loads(str(config[LABELS_KEY]))
        model = self._receive(parameters, config, len(labels))
        _, rows = self._rows(labels)
        result = self._evaluate(model, rows, len(labels))
        metrics: dict[str, Scalar] = {"accuracy": result.accuracy, "macro_f1": result.macro_f1}
        return result.loss, result.examples, metrics

    @staticmethod
    def _refuse(asked: bool, what: str) -> None:
        if asked:
            text = (
                f"this node keeps its data private, but the message asks for {what}; see "
                "docs/privacy.md for settings that need none"
            )
            raise SiteError(text, text)

    def _evaluate(self, model: PeftModel, rows: TokenizedRows, num_labels: int) -> EvalResult:
        c = self.config
        return evaluate(
            model,
            rows,
            batch_size=c.evaluate.batch_size,
            num_labels=num_labels,
            precision=c.train.precision,
        )

    def _losses(self, model: PeftModel, rows: TokenizedRows, config: Settings) -> Profile:
        """Return the losses of the rows, or of a seeded choice of them, and all labels."""
        c = self.config
        chosen = profile_rows(len(rows), int(config.get(SAMPLES_KEY, 0)), c.seed)
        losses = per_sample_losses(
            model,
            rows.take(chosen),
            batch_size=c.evaluate.batch_size,
            precision=c.train.precision,
        )
        return Profile(losses, rows.labels, len(rows))

    def _receive(self, parameters: NDArrays, config: Settings, num_labels: int) -> PeftModel:
        """Put the received arrays into the resident model."""
        try:
            check_limit(config, self.node)
        except ValueError as error:  # nothing in it comes from the data
            raise SiteError(str(error), str(error)) from None
        names: list[str] = json.loads(str(config[NAMES_KEY]))
        arrays = {n: torch.from_numpy(p) for n, p in zip(names, parameters, strict=True)}
        model = self._model(num_labels)
        receive(model, arrays, config, self.state)
        return model

    def _model(self, num_labels: int) -> PeftModel:
        """Return the resident model, as the client before left it."""
        c = self.config
        torch.set_num_threads(c.train.threads)  # the process is this app's own
        return _resident_model(c.model, c.lora, num_labels, c.train.precision, c.seed)

    def _rows(self, labels: list[str]) -> tuple[TokenizedRows, TokenizedRows]:
        """Return this node's training and validation rows."""
        c, label_names = self.config, tuple(labels)
        if "data-path" in self.node:
            path = str(self.node["data-path"])
            return _own_rows(path, c.data, c.model, label_names, c.seed)
        if "partition-id" not in self.node or "num-partitions" not in self.node:
            raise SiteError(NO_DATA, NO_DATA)
        share, shares = int(self.node["partition-id"]), int(self.node["num-partitions"])
        return _partition_rows(share, shares, c.data, c.model, label_names, c.seed)


@lru_cache(maxsize=1)
def _resident_model(
    model: ModelConfig, lora: LoraConfig, num_labels: int, precision: str, seed: int
) -> PeftModel:
    """Return the process's one model; every client resizes its LoRA modules in place."""
    base = build_model(model, num_labels=num_labels, seed=seed, precision=precision)
    made = add_lora(base, lora, rank=1, seed=seed)
    made.fedlora_start = {k: tensor.cpu().clone() for k, tensor in adapter_state(made).items()}
    return made


def _start(model: PeftModel) -> Adapter:
    """Return the adapter the model was made with: a seeded head, and B = 0."""
    return Adapter.from_state_dict(model.fedlora_start, 1.0)  # no scale matters where B = 0


def _penalty(model: PeftModel, config: Settings) -> Callable[[], Tensor] | None:
    """Return what self-pruning adds to the loss, if the message asks for it."""
    weight, gamma = float(config.get(PENALTY_KEY, 0.0)), float(config.get(GAMMA_KEY, 1.0))
    return (lambda: weight * tail_penalty(model, gamma)) if weight else None


@lru_cache(maxsize=1)
def _shares(shares: int, data: DataConfig, labels: tuple[str, ...], seed: int) -> list[np.ndarray]:
    rows = load_train(data, labels)
    return partition_indices(rows.labels, data, num_clients=shares, seed=seed, label_names=labels)


@lru_cache(maxsize=1024)
def _partition_rows(
    share: int,
    shares: int,
    data: DataConfig,
    model: ModelConfig,
    labels: tuple[str, ...],
    seed: int,
) -> tuple[TokenizedRows, TokenizedRows]:
    indices = _shares(shares, data, labels, seed)[share]
    rows = tokenize(load_train(data, labels).take(indices), _tokenizer(model), data.max_length)
    return _split(rows, data, seed)


@lru_cache(maxsize=1)
def _own_rows(
    path: str, data: DataConfig, model: ModelConfig, labels: tuple[str, ...], seed: int
) -> tuple[TokenizedRows, TokenizedRows]:
    texts = load_own(path, data, labels)
    refuse_few(texts, path)
    LOG.info("%s", "\n".join(block("own rows", texts)))  # in this node's own log
    rows = tokenize(texts, _tokenizer(model), data.max_length)
    return _split(rows, data, seed)


def _split(rows: TokenizedRows, data: DataConfig, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    kept, held_out = train_validation_split(range(len(rows)), data.validation_fraction, seed)
    return rows.take(kept), rows.take(held_out)


_tokenizer = lru_cache(maxsize=1)(build_tokenizer)


def client_fn(context: Context) -> Client:
    """Return the client of one node."""
    # The server has checked it. In what this node computes is for its own hardware to say.
    config = with_precision(RunConfig.from_flat(context.run_config, check=False))
    return LoRAClient(config, dict(context.node_config), context.state).to_client()


app = ClientApp(client_fn=client_fn, mods=[discreet])
