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

from fedlora_app.config import TrainConfig
from fedlora_app.data import Batch, TokenizedRows, evaluation_batches, training_batches
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


@dataclass(frozen=True)
class EvalResult:
    """Quality of a model on some rows.

    Parameters
    ----------
    loss : float
        Mean cross-entropy over the rows.
    accuracy : float
        Share of the rows whose most likely label is right.
    macro_f1 : float
        Mean F1 over the labels that occur among the rows or the predictions.
    examples : int
        Number of rows.
    """

    loss: float
    accuracy: float
    macro_f1: float
    examples: int


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
    rows: TokenizedRows,
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
        Takes ``input_ids`` and ``attention_mask``, returns ``.logits``. It is moved to
        the GPU if there is one.
    rows : TokenizedRows
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
    total, steps = amount(config, len(rows))
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
        for batch in training_batches(rows, config.batch_size, total, rng):
            logits = logits_of(model, batch, device, config.precision)
            loss = nn.functional.cross_entropy(logits, batch.labels.to(device))
            objective = loss if penalty is None else loss + penalty()
            objective.backward()  # type: ignore[no-untyped-call]
            updates.step()
            losses += loss.detach()  # read once at the end: each read would wait for the GPU
    mean = float(losses) / steps
    return TrainResult(mean, len(rows), steps, time.perf_counter() - start)


def evaluate(
    model: nn.Module,
    rows: TokenizedRows,
    *,
    batch_size: int,
    num_labels: int,
    precision: str = "float32",
) -> EvalResult:
    """Measure the loss, accuracy and macro-F1 of ``model``, which stays as it is.

    Parameters
    ----------
    model : nn.Module
        Takes ``input_ids`` and ``attention_mask``, returns ``.logits``.
    rows : TokenizedRows
        At least one row.
    batch_size : int
        Rows of a batch, fewer on a CPU if they are long; changes the speed, not the result.
    num_labels : int
        Labels of the task.
    precision : {"float32", "bfloat16"}
        As in ``build_model`` (default: "float32").

    Raises
    ------
    ValueError
        If there are no rows, or one has a label that is not below ``num_labels``.
    """
    from sklearn.metrics import f1_score  # takes most of a second

    if not len(rows):
        raise ValueError("expected rows to evaluate on, got none")
    if not 0 <= rows.labels.min() <= rows.labels.max() < num_labels:
        raise ValueError(
            f"expected labels 0 to {num_labels - 1}, got {rows.labels.min()} to "
            f"{rows.labels.max()}; load these rows with the label names of training"
        )
    losses, predictions = _forward_all(model, rows, batch_size, precision)
    return EvalResult(
        loss=float(losses.mean()),
        accuracy=float((predictions == rows.labels).mean()),
        macro_f1=float(f1_score(rows.labels, predictions, average="macro", zero_division=0)),
        examples=len(rows),
    )


def per_sample_losses(
    model: nn.Module, rows: TokenizedRows, *, batch_size: int, precision: str = "float32"
) -> NDArray[np.float64]:
    """Return the cross-entropy of each row, shape (n,), in the order of the rows.

    Parameters are those of ``evaluate``.
    """
    return _forward_all(model, rows, batch_size, precision)[0]


def _forward_all(
    model: nn.Module, rows: TokenizedRows, batch_size: int, precision: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return loss and most likely label of each row."""
    losses = np.empty(len(rows), dtype=np.float64)
    predictions = np.empty(len(rows), dtype=np.int64)
    device = default_device()
    tokens = THREAD_TOKENS * torch.get_num_threads() if device.type == "cpu" else None
    with torch.inference_mode(), mode(model, training=False):
        model.to(device)
        for batch in evaluation_batches(rows, batch_size, tokens):
            logits = logits_of(model, batch, device, precision)
            loss = nn.functional.cross_entropy(logits, batch.labels.to(device), reduction="none")
            losses[batch.rows] = loss.cpu().numpy()
            predictions[batch.rows] = logits.argmax(-1).cpu().numpy()
    return losses, predictions


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


def logits_of(model: nn.Module, batch: Batch, device: torch.device, precision: str) -> Tensor:
    """Return the logits of a batch in float32, (batch, labels)."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        output = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
        )
    logits: Tensor = output.logits
    return logits.float()


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
