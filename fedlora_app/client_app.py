"""The client: a Flower ``NumPyClient`` around a PEFT model.

The base model is loaded once a process and serves every client that runs there, one
after the other; only the adapter is swapped, at the rank the server sent.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar
from peft import PeftModel

from fedlora_app.config import DataConfig, LoraConfig, ModelConfig, RunConfig
from fedlora_app.data import (
    TokenizedRows,
    load_own,
    load_train,
    partition_indices,
    tokenize,
    train_validation_split,
)
from fedlora_app.models import add_lora, build_model, build_tokenizer
from fedlora_app.training import evaluate, train
from strategies.client import receive, send
from strategies.messages import CLIENT_KEY, NAMES_KEY, ROUND_KEY

LABELS_KEY = "label-names"
STEPS_KEY = "steps-factor"

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

    def get_properties(self, config: Settings) -> Settings:
        """Say who this is; only what the node config holds, no look at the data."""
        told = ("partition-id", "max-rank")
        return {key: self.node[key] for key in told if key in self.node}

    def fit(
        self, parameters: NDArrays, config: Settings
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train at the rank that was sent; return the same arrays, trained."""
        labels = json.loads(str(config[LABELS_KEY]))
        model = self._receive(parameters, config, len(labels))
        rows, _ = self._rows(labels)
        server_round = int(config[ROUND_KEY])
        settings = self.config.train.in_round(server_round, times=int(config.get(STEPS_KEY, 1)))
        seed = np.random.SeedSequence([self.config.seed, server_round, int(config[CLIENT_KEY])])
        result = train(model, rows, settings, seed=int(seed.generate_state(1)[0]))
        arrays = send(model, config, self.state)
        metrics: dict[str, Scalar] = {"loss": result.loss, "seconds": result.seconds}
        return [array.numpy() for array in arrays.values()], result.examples, metrics

    def evaluate(
        self, parameters: NDArrays, config: Settings
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate the received adapter on this node's validation rows."""
        labels = json.loads(str(config[LABELS_KEY]))
        model = self._receive(parameters, config, len(labels))
        _, rows = self._rows(labels)
        result = evaluate(
            model,
            rows,
            batch_size=self.config.evaluate.batch_size,
            num_labels=len(labels),
            precision=self.config.train.precision,
        )
        metrics: dict[str, Scalar] = {"accuracy": result.accuracy, "macro_f1": result.macro_f1}
        return result.loss, result.examples, metrics

    def _receive(self, parameters: NDArrays, config: Settings, num_labels: int) -> PeftModel:
        """Put the received arrays into the resident model."""
        names: list[str] = json.loads(str(config[NAMES_KEY]))
        arrays = {n: torch.from_numpy(p) for n, p in zip(names, parameters, strict=True)}
        c = self.config
        torch.set_num_threads(c.train.threads)  # the process is this app's own
        model = _resident_model(c.model, c.lora, num_labels, c.train.precision, c.seed)
        receive(model, arrays, config, self.state)
        return model

    def _rows(self, labels: list[str]) -> tuple[TokenizedRows, TokenizedRows]:
        """Return this node's training and validation rows."""
        c, label_names = self.config, tuple(labels)
        if "data-path" in self.node:
            path = str(self.node["data-path"])
            return _own_rows(path, c.data, c.model, label_names, c.seed)
        if "partition-id" not in self.node or "num-partitions" not in self.node:
            raise ValueError(
                "this node has no data: expected data-path, or partition-id and num-partitions, "
                f"in its node config, got {self.node or 'nothing'}; start it with "
                "flower-supernode --node-config 'data-path=\"/path/to/rows.csv\"'"
            )
        share, shares = int(self.node["partition-id"]), int(self.node["num-partitions"])
        return _partition_rows(share, shares, c.data, c.model, label_names, c.seed)


@lru_cache(maxsize=1)
def _resident_model(
    model: ModelConfig, lora: LoraConfig, num_labels: int, precision: str, seed: int
) -> PeftModel:
    """Return the process's one model; every client resizes its LoRA modules in place."""
    base = build_model(model, num_labels=num_labels, seed=seed, precision=precision)
    return add_lora(base, lora, rank=1, seed=seed)


@lru_cache(maxsize=1)
def _shares(shares: int, data: DataConfig, labels: tuple[str, ...], seed: int) -> list[np.ndarray]:
    rows = load_train(data, labels)
    return partition_indices(rows.labels, data, num_clients=shares, seed=seed)


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
    rows = tokenize(load_own(path, data, labels), _tokenizer(model), data.max_length)
    return _split(rows, data, seed)


def _split(rows: TokenizedRows, data: DataConfig, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    kept, held_out = train_validation_split(range(len(rows)), data.validation_fraction, seed)
    return rows.take(kept), rows.take(held_out)


_tokenizer = lru_cache(maxsize=1)(build_tokenizer)


def client_fn(context: Context) -> Client:
    """Return the client of one node."""
    config = RunConfig.from_flat(context.run_config)
    return LoRAClient(config, dict(context.node_config), context.state).to_client()


app = ClientApp(client_fn=client_fn)
