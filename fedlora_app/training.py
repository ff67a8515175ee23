"""How a model is trained and evaluated on one machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_app.batches import evaluation_batches, training_batches
from fedlora_app.config import TrainConfig
from fedlora_app.tasks.base import Inputs, Task
from strategies.dropout import QuickDropout

#: Tokens of an evaluation batch for each CPU thread: what passes between layers stays in cache.
THREAD_TOKENS = 1024

#: Parameters from which ``QuickDropout`` saves more than it costs to look at every call.
LARGE = 1_000_000


@dataclass(frozen=True)
class TrainResult:
    """What a call of ``train`` did.

    Parameters
    ----------
    loss : float
        Mean of the cross-entropy over the steps; NaN or infinite if training diverged.
    examples : int
        Rows there were to train on (not rows seen), the client's weight in an average.
    steps : int
        Optimiser steps.
    seconds : float
        Wall-clock time.
    """

    loss: float
    examples: int
    steps: int
    seconds: float


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` CPU threads inside the block."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def train(
    model: nn.Module,
    inputs: Inputs,
    config: TrainConfig,
    *,
    seed: int,
    penalty: Callable[[], Tensor] | None = None,
    rounds: int = 1,
) -> TrainResult:
    """Train the weights of ``model`` that require gradients, in place.

    AdamW with one learning rate for the LoRA weights and one for everything else, a
    schedule that starts anew in each call, and gradient clipping.

    Parameters
    ----------
    model : nn.Module
        ``model(**batch)`` returns ``.loss``. It is moved to the GPU if there is one.
    inputs : Inputs
        Training rows, at least one.
    config : TrainConfig
        Steps or epochs, batch size, learning rates and so on.
    seed : int
        Decides the order of the rows and the dropout. On the same machine, with the same
        number of threads, a seed gives the same weights whatever ran before.
    penalty : callable, optional
        A scalar that is added to the loss at each step; the reported loss leaves it out.
    rounds : int (default: 1)
        The training of so many rounds in one go: in each share of the steps the schedule starts
        anew, at rates lowered by ``config.round_decay``, as they are from round to round.

    Raises
    ------
    ValueError
        If there are no rows or nothing in the model is trainable.
    """
    start = time.perf_counter()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            f"expected trainable weights in {type(model).__name__}, but none requires gradients"
        )
    total, steps = amount(config, len(inputs))
    device = default_device()
    losses = torch.zeros((), dtype=torch.float64)
    with (
        torch_threads(config.threads),
        mode(model, training=True),
        seeded(device, seed),
        _dropout(model, device, seed),
    ):
        model.to(device)
        losses = losses.to(device)
        updates = Updates(trained, config, steps, rounds)
        rng = np.random.default_rng(seed)
        for chosen in training_batches(len(inputs), config.batch_size, total, rng):
            batch = on_device(inputs.batch(chosen), device)
            loss = output_of(model, batch, config.precision).loss.float()
            objective = loss if penalty is None else loss + penalty()
            objective.backward()  # type: ignore[no-untyped-call]
            updates.step()
            losses += loss.detach()  # read once at the end: each read would wait for the GPU
    mean = float(losses) / steps
    return TrainResult(mean, len(inputs), steps, time.perf_counter() - start)


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
    if not len(inputs):
        raise ValueError("expected rows to evaluate on, got none")
    losses, sums = _forward_all(task, model, inputs, batch_size, precision)
    return {"loss": float(losses.mean()), **task.summary(sums)}


def per_sample_losses(
    task: Task, model: nn.Module, inputs: Inputs, *, batch_size: int, precision: str = "float32"
) -> NDArray[np.float64]:
    """Return the loss of each row, shape (n,), in the order of the rows.

    Parameters are those of ``evaluate``.
    """
    return _forward_all(task, model, inputs, batch_size, precision)[0]


def _forward_all(
    task: Task, model: nn.Module, inputs: Inputs, batch_size: int, precision: str
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return the loss of each row, and the sums that the scores are made of."""
    losses = np.empty(len(inputs), dtype=np.float64)
    sums: dict[str, NDArray[np.float64]] = {}
    device = default_device()
    most = THREAD_TOKENS * torch.get_num_threads() if device.type == "cpu" else None
    with torch.inference_mode(), mode(model, training=False):
        model.to(device)
        for chosen in evaluation_batches(inputs, batch_size, most):
            batch = on_device(inputs.batch(chosen), device)
            asked = {name: tensor for name, tensor in batch.items() if name != "labels"}
            logits = output_of(model, asked, precision).logits.float()
            losses[chosen] = task.losses(logits, batch).cpu().numpy()
            for name, found in task.judge(logits, batch).items():
                sums[name] = sums[name] + found if name in sums else found
    return losses, sums


class Updates:
    """The optimiser of one client's training, its learning rates and its clipping.

    Parameters
    ----------
    trained : Mapping[str, Tensor]
        What is trained, by names that tell the LoRA weights.
    config : TrainConfig
    steps, rounds : int
        As in ``train``.
    """

    def __init__(
        self, trained: Mapping[str, Tensor], config: TrainConfig, steps: int, rounds: int = 1
    ) -> None:
        self.trained, self.clip = list(trained.values()), config.max_grad_norm
        lora = [tensor for name, tensor in trained.items() if "lora_" in name]
        others = [tensor for name, tensor in trained.items() if "lora_" not in name]
        groups = [
            {"params": lora, "lr": config.learning_rate},
            {"params": others, "lr": config.head_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _rate_of(config, step, steps, min(rounds, steps))
        )
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Apply the gradients and forget them: a resident model would keep their memory."""
        if self.clip:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def amount(config: TrainConfig, rows: int) -> tuple[int, int]:
    """Return how many rows are seen in training on so many, and in how many steps."""
    total = config.steps * config.batch_size or math.ceil(config.epochs * rows)
    return total, math.ceil(total / config.batch_size)


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def output_of(model: nn.Module, batch: Mapping[str, Tensor], precision: str) -> Any:
    """Return what a model says of a batch: ``.logits`` and ``.loss``."""
    device = next(iter(batch.values())).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model(**batch)


def _rate_of(config: TrainConfig, step: int, steps: int, rounds: int) -> float:
    """Return the factor on the learning rates at a step of the training of some rounds."""
    done = step * rounds // steps  # rounds that are over
    first, following = (-(-n * steps // rounds) for n in (done, done + 1))
    decay: float = config.round_decay**done
    return decay * _rate(config.schedule, step - first, following - first)


def _rate(schedule: str, step: int, steps: int) -> float:
    """Return the factor on the learning rates at a step (0 is the first)."""
    done = step / steps
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case other:
            raise ValueError(f"train.schedule: expected constant, linear or cosine, got {other!r}")


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Have the model train or not inside the block."""
    previous = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(previous)


def _dropout(model: nn.Module, device: torch.device, seed: int) -> AbstractContextManager[Any]:
    size = sum(parameter.numel() for parameter in model.parameters())
    return QuickDropout(seed) if device.type == "cpu" and size >= LARGE else nullcontext()


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed what torch's own dropout draws from inside the block: it takes no other generator."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
