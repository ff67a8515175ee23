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
from strategies.schedules import anew
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
    rounds: int = 1,
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
    rounds : int (default: 1)
        The training of so many rounds in one go: in each share of the steps the schedule starts
        anew, at rates lowered by ``config.round_decay``, as they are from round to round.

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
    with nullcontext() if again else _dropout(model, device, own):
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
            **rates(config, rounds),
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


def rates(config: TrainConfig, rounds: int = 1) -> dict[str, Any]:
    """Return by which optimiser and how fast is learned, as ``train_loop`` takes it."""
    own = optimizer(config.optimizer, config.weight_decay)
    return {
        "learning_rate": {"lora_": config.learning_rate, "": config.head_learning_rate},
        "weight_decay": 0.0 if own else config.weight_decay,
        "optimizer": own,
        "schedule": anew(config.schedule, rounds, config.round_decay),
        "max_grad_norm": config.max_grad_norm,
    }


def _dropout(model: nn.Module, device: torch.device, seed: int) -> AbstractContextManager[Any]:
    size = sum(parameter.numel() for parameter in model.parameters())
    return QuickDropout(seed) if device.type == "cpu" and size >= LARGE else nullcontext()
