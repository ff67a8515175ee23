"""How good a model is on some rows, by what the task says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_app.data.batches import evaluation_batches
from fedlora_app.tasks.base import Inputs, Task
from fedlora_app.training import default_device
from strategies.training import sample_losses

#: Tokens of an evaluation batch for each CPU thread: what passes between layers stays in cache.
THREAD_TOKENS = 1024

#: Those of one on a GPU: logits over a large vocabulary are gigabytes.
GPU_TOKENS = 4096


def evaluate(
    task: Task, model: nn.Module, inputs: Inputs, *, batch_size: int, precision: str = "float32"
) -> dict[str, float]:
    """Return the scores of ``model``, which stays as it is; ``loss`` and those of the task.

    Parameters
    ----------
    task : Task
        Says what a row's loss is, and what its scores are.
    model : nn.Module
        ``model(**batch)`` returns ``.logits``.
    inputs : Inputs
        At least one row.
    batch_size : int
        Rows of a batch, fewer on a CPU if they are long; changes the speed, not the result.
    precision : {"float32", "bfloat16"}
        As in ``build_model`` (default: "float32").

    Raises
    ------
    ValueError
        If there are no rows, or they are none of the task's.
    """
    sums: dict[str, NDArray[np.float64]] = {}

    def judged(logits: Tensor, batch: dict[str, Any]) -> Tensor:
        for name, found in task.judge(logits, batch).items():
            sums[name] = sums[name] + found if name in sums else found
        return task.losses(logits, batch)

    order = _order(inputs, batch_size)
    losses = _losses(judged, task.target, model, inputs, order, precision)
    return {"loss": float(losses.mean()), **task.summary(sums)}


def per_sample_losses(
    task: Task, model: nn.Module, inputs: Inputs, *, batch_size: int, precision: str = "float32"
) -> NDArray[np.float64]:
    """Return the loss of each row, shape (n,), in the order of the rows.

    Parameters are those of ``evaluate``.
    """
    order = _order(inputs, batch_size)
    return _losses(task.losses, task.target, model, inputs, order, precision)


def row_logits(task: Task, model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the logits of each row, float32 of shape (n, …), in the order of the rows.

    For models whose logits have the same shape for every row. The run config says how many rows
    make a batch, and in which precision.
    """
    found: dict[int, Tensor] = {}
    order = _order(inputs, task.config.evaluate.batch_size)
    places = iter(order)

    def keep(logits: Tensor, batch: dict[str, Any]) -> Tensor:
        found.update(zip(next(places).tolist(), logits.cpu(), strict=True))
        return torch.zeros(len(logits))

    _losses(keep, task.target, model, inputs, order, task.config.train.precision)
    return torch.stack([found[row] for row in range(len(inputs))])


def _order(inputs: Inputs, batch_size: int) -> list[NDArray[np.int64]]:
    """Return the rows of each batch."""
    cpu = default_device().type == "cpu"
    most = THREAD_TOKENS * torch.get_num_threads() if cpu else GPU_TOKENS
    return list(evaluation_batches(inputs, batch_size, most))


def _losses(
    of: Callable[[Tensor, dict[str, Any]], Tensor],
    target: str,
    model: nn.Module,
    inputs: Inputs,
    order: list[NDArray[np.int64]],
    precision: str,
) -> NDArray[np.float64]:
    if not order:
        raise ValueError("expected rows to evaluate on, got none")
    found = sample_losses(
        model.to(default_device()),
        map(inputs.batch, order),
        of,
        precision=precision,
        withhold={target},
    )
    losses = np.empty(len(found), dtype=np.float64)
    losses[np.concatenate(order)] = found
    return losses
