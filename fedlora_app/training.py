"""Train a task's model as the run config says, by ``strategies.training``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora_app.config.keys import TrainConfig
from fedlora_app.data.batches import training_batches
from fedlora_app.models.bits import optimizer
from fedlora_app.tasks.base import Indices, Inputs
from strategies.dropout import QuickDropout
from strategies.messages import MODEL_ROUND_KEY, ROUND_KEY
from strategies.training import TrainOutcome, train_loop, training_seed

#: Parameters from which ``QuickDropout`` saves more than it costs to look at every call.
LARGE = 1_000_000


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module,
    inputs: Inputs,
    config: TrainConfig,
    message: Mapping[str, Any] | None = None,
    *,
    seed: int,
) -> TrainOutcome:
    """Train the weights of ``model`` that require gradients, in place.

    Parameters
    ----------
    model : nn.Module
        ``model(**batch)`` returns ``.loss``. It is moved to the GPU if there is one.
    inputs : Inputs
        Training rows, at least one.
    config : TrainConfig
        Steps or epochs, batch size, learning rates and so on.
    message : Mapping[str, Any], optional
        The received config, as ``train_loop`` takes it.
    seed : int
        Decides, with the message's round and client, the order of the rows and the dropout. On the
        same machine, with the same number of threads, it gives the same weights whatever ran
        before.

    Raises
    ------
    ValueError
        If there are no rows or nothing in the model is trainable.
    """
    total, steps = amount(config, len(inputs))
    device, own = default_device(), training_seed(message or {}, seed)
    parts = min(config.accumulate, config.batch_size)
    order = chain.from_iterable(
        np.array_split(rows, min(parts, len(rows)))
        for rows in batches(config, inputs, total, np.random.default_rng(own))
    )
    model.to(device)
    again = config.gradient_checkpointing  # which must draw the same dropout twice, as torch's does
    around = getattr(inputs, "around", nullcontext)
    with nullcontext() if again else _dropout(model, device, own), around(model):
        return train_loop(
            model,
            map(inputs.batch, order),
            message,
            steps=steps,
            accumulation=parts,
            precision=config.precision,
            gradient_checkpointing=again,
            threads=config.threads,
            num_examples=len(inputs),
            seed=seed,
            **rates(config),
        )


def train_rounds(
    model: nn.Module,
    inputs: Inputs,
    config: TrainConfig,
    message: Mapping[str, Any],
    *,
    seed: int,
    rounds: int,
) -> TrainOutcome:
    """Train as in so many rounds, one after the other, with nobody else.

    It is what a federation of this client alone would do: each round has its own order of rows, its
    own rates and an optimiser of its own.

    Parameters
    ----------
    model, inputs, seed
        As of ``train``.
    config : TrainConfig
        Of the whole run, not of a round.
    message : Mapping[str, Any]
        The received config, which says what the first of the rounds is.
    rounds : int
        At least 1.

    Returns
    -------
    TrainOutcome
        Of all rounds: the mean loss over their steps, and the sums of steps and seconds.
    """
    first, told = int(message[MODEL_ROUND_KEY]), int(message[ROUND_KEY])
    done = []
    for i in range(rounds):
        in_turn = {**message, ROUND_KEY: told + i}
        done.append(train(model, inputs, config.in_round(first + i), in_turn, seed=seed))
    steps = sum(each.steps for each in done)
    peaks = {key: max(each.memory.get(key, 0.0) for each in done) for key in done[0].memory}
    return TrainOutcome(
        sum(each.loss * each.steps for each in done) / steps,
        steps,
        sum(each.seconds for each in done),
        len(inputs),
        peaks,
    )


def amount(config: TrainConfig, rows: int) -> tuple[int, int]:
    """Return how many rows are seen in training on so many, and in how many steps."""
    if not rows:
        raise ValueError("expected rows to train on, got none")
    total = config.steps * config.batch_size or math.ceil(config.epochs * rows)
    return total, math.ceil(total / config.batch_size)


def batches(
    config: TrainConfig, inputs: Inputs, total: int, rng: np.random.Generator
) -> Iterator[Indices]:
    """Return the rows of each step, ``total`` over all."""
    sizes = inputs.sizes if config.group_by_length else None
    return training_batches(len(inputs), config.batch_size, total, rng, sizes)


def rates(config: TrainConfig) -> dict[str, Any]:
    """Return by which optimiser and how fast is learned, as ``train_loop`` takes it."""
    own = optimizer(config.optimizer, config.weight_decay)
    return {
        "learning_rate": {"lora_": config.learning_rate, "": config.head_learning_rate},
        "weight_decay": 0.0 if own else config.weight_decay,
        "optimizer": own,
        "schedule": config.schedule,
        "max_grad_norm": config.max_grad_norm,
    }


def _dropout(model: nn.Module, device: torch.device, seed: int) -> AbstractContextManager[Any]:
    size = sum(parameter.numel() for parameter in model.parameters())
    return QuickDropout(seed) if device.type == "cpu" and size >= LARGE else nullcontext()
