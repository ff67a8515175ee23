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

    losses = _losses(judged, task.target, model, inputs, batch_size, precision)
    return {"loss": float(losses.mean()), **task.summary(sums)}


def per_sample_losses(
    task: Task, model: nn.Module, inputs: Inputs, *, batch_size: int, precision: str = "float32"
) -> NDArray[np.float64]:
    """Return the loss of each row, shape (n,), in the order of the rows.

    Parameters are those of ``evaluate``.
    """
    return _losses(task.losses, task.target, model, inputs, batch_size, precision)


def _losses(
    of: Callable[[Tensor, dict[str, Any]], Tensor],
    target: str,
    model: nn.Module,
    inputs: Inputs,
    batch_size: int,
    precision: str,
) -> NDArray[np.float64]:
    if not len(inputs):
        raise ValueError("expected rows to evaluate on, got none")
    device = default_device()
    most = THREAD_TOKENS * torch.get_num_threads() if device.type == "cpu" else None
    order = list(evaluation_batches(inputs, batch_size, most))
    found = sample_losses(
        model.to(device), map(inputs.batch, order), of, precision=precision, withhold={target}
    )
    losses = np.empty(len(inputs), dtype=np.float64)
    losses[np.concatenate(order)] = found
    return losses
