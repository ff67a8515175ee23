"""A plain training loop for clients, and what it shares with the one of Hugging Face.

Both follow what a training message says beyond rank and scale: the round and client it
seeds from, FedProx's proximal term, and self-pruning's penalty. Both return a ``TrainOutcome``,
whose ``metrics`` are what the clock reads. ``strategies.huggingface`` is the other one. Only torch
is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.common import log
from torch import Tensor, nn

from strategies.client.peft_model import tail_penalty
from strategies.losses import (
    IGNORED,
    Batch,
    autocast_type,
    losses_and_labels,
    on_device,
    predicts_next,
    sample_losses,
)
from strategies.memory import PhaseMemory
from strategies.messages import (
    CLIENT_KEY,
    PROXIMAL_KEY,
    ROUND_KEY,
    STEPS_KEY,
    TRAIN_SECONDS_KEY,
)
from strategies.ranks.pruning import GAMMA_KEY, PENALTY_KEY
from strategies.schedules import Schedule
from strategies.surroundings import checkpointed, mode, seeded, torch_threads
from strategies.updates import OptimizerFactory, Rates, Updates

__all__ = [
    "TrainOutcome",
    "losses_and_labels",
    "message_penalty",
    "sample_losses",
    "train_loop",
    "trainable",
    "training_seed",
]

LossFn = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class TrainOutcome:
    """What a client's training did.

    Parameters
    ----------
    loss : float
        Mean training loss over the steps, penalties left out; NaN or infinite if it diverged.
    steps : int
        Optimiser steps.
    seconds : float
        Wall-clock time of the training alone: without loading, profiling and messages.
    num_examples : int
        Rows there were to train on, the client's weight in an average.
    memory : Mapping[str, float]
        ``memory_forward_mb`` and so on, as ``strategies.memory`` measures them; empty where nobody
        did.
    """

    loss: float
    steps: int
    seconds: float
    num_examples: int
    memory: Mapping[str, float] = field(default_factory=dict, compare=False)

    def metrics(self) -> dict[str, float]:
        """Return ``loss``, ``seconds`` and ``steps``, as ``make_reply(metrics=…)`` takes them."""
        return {"loss": self.loss, TRAIN_SECONDS_KEY: self.seconds, STEPS_KEY: self.steps}


def train_loop(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Mapping[str, Any] | None = None,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: Rates = 1e-3,
    weight_decay: float = 0.0,
    schedule: str | Schedule = "constant",
    optimizer: OptimizerFactory | None = None,
    accumulation: int = 1,
    precision: str = "float32",
    max_grad_norm: float = 1.0,
    gradient_checkpointing: bool = False,
    threads: int | None = None,
    loss_fn: LossFn | None = None,
    num_examples: int | None = None,
    seed: int = 42,
) -> TrainOutcome:
    """Train what requires gradients, in place, where the model is.

    Gradients of ``accumulation`` batches are summed so that the step equals one with a single
    large batch: each batch counts with the labels in it that are not ``-100`` (the rows, with
    a ``loss_fn`` of one's own), as in Hugging Face's ``Trainer``.

    Parameters
    ----------
    model : nn.Module
        As ``apply_adapter`` left it. Frozen parameters stay so; its mode is put back.
    batches : Iterable[Mapping[str, Tensor]]
        For example a ``DataLoader``. Tensors are moved to the model's device.
    config : Mapping[str, Any], optional
        The received config: round and client vary the seed, and FedProx's term (``proximal-mu``)
        and self-pruning's penalty are added to the loss that is trained, not to the one told.
    steps : int, optional
        Optimiser steps; ``batches`` starts over when it ends.
    epochs : float, optional
        Instead of steps: passes over the batches, rounded up to whole steps. Default: one.
    learning_rate : float or Mapping[str, float] (default: 1e-3)
        Of AdamW. A mapping has a rate for parts of the parameters' names, of which the first that
        fits counts: ``{"lora_": 3e-3, "": 5e-3}`` trains all but the LoRA factors at 5e-3.
    weight_decay : float (default: 0.0)
        Of AdamW.
    schedule : {"constant", "linear", "cosine"} or callable
        The two others fall to 0 over the steps; ``schedule(step, steps)`` returns the factor on
        the rates at a step, 0 being the first (default: "constant").
    optimizer : callable, optional
        Makes another optimiser from the list of trained parameters, or, where ``learning_rate``
        is a mapping, from groups of them with their rates, as torch's optimisers take them.
    accumulation : int (default: 1)
        Batches of a step; the last step of a pass may have fewer.
    precision : {"float32", "bfloat16", "float16"}
        The two short ones compute under autocast; float16 with loss scaling as well
        (default: "float32").
    max_grad_norm : float (default: 1.0)
        Gradient clipping; 0: none.
    gradient_checkpointing : bool (default: False)
        Compute activations again on the way back: less memory, about a third more time, the same
        result. For transformers models that support it.
    threads : int, optional
        CPU threads of torch meanwhile. Default: as many as the process has.
    loss_fn : callable, optional
        ``loss_fn(model, batch)`` returns the mean loss. Default: ``model(**batch).loss``.
    num_examples : int, optional
        Default: the length of ``batches.dataset``, or else the rows of a pass.
    seed : int (default: 42)
        Decides dropout, and the order of a ``DataLoader`` without a generator of its own.
        The global random state is as before afterwards.

    Raises
    ------
    ValueError
        If an argument is out of range, nothing is trainable, or there are no batches.
    """
    if accumulation < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"expected accumulation and steps of at least 1, got {accumulation!r} and {steps!r}"
        )
    dtype = autocast_type(precision)
    trainable(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    planned = _planned(batches, steps, epochs, accumulation)
    repeat = steps is not None or epochs is not None
    penalty = message_penalty(model, config or {})
    measured = loss_fn or _own_loss
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # type: ignore[attr-defined]
    counted = _Rows(batches)
    total, empty = torch.zeros((), dtype=torch.float64, device=device), 0
    memory, start = PhaseMemory(device), time.perf_counter()
    with (
        torch_threads(threads),
        mode(model, training=True),
        checkpointed(model) if gradient_checkpointing else nullcontext(),
        seeded(device, training_seed(config or {}, seed)),
    ):
        updates = Updates(
            trained,
            planned,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            optimizer=optimizer,
            scaler=scaler,
        )
        for group in islice(_groups(counted, accumulation, repeat=repeat), planned):
            weights = [_weight(model, batch, own_loss=loss_fn is None) for batch in group]
            if not any(weights):  # not one label: no loss and no gradient
                empty += len(group)
                continue
            if penalty is not None:
                scaler.scale(penalty()).backward()  # type: ignore[no-untyped-call]
            for batch, weight in zip(group, weights, strict=True):
                if not weight:  # the mean over nothing would be NaN
                    empty += 1
                    continue
                memory.batch(_size(batch))
                with (
                    memory.phase("forward"),
                    torch.autocast(device.type, dtype, enabled=dtype is not None),
                ):
                    loss = measured(model, on_device(batch, device))
                loss = loss.float() * (weight / max(1, sum(weights)))
                with memory.phase("backward"):
                    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()  # read once at the end: each read would wait for a GPU
            with memory.phase("optimizer"):
                updates.step()
    done = updates.done
    if not done:
        raise ValueError(
            f"all labels of all {empty} batches are {IGNORED}, which means none: expected some to "
            "train on; see how rows are cut and what of them is masked"
        )
    if empty:
        log(WARNING, "%s batches have no label (all are %s) and were left out", empty, IGNORED)
    if num_examples is None:
        dataset = getattr(batches, "dataset", None)
        num_examples = len(dataset) if hasattr(dataset, "__len__") else counted.most  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    return TrainOutcome(float(total) / done, done, seconds, num_examples, memory.peaks)


def training_seed(config: Mapping[str, Any], seed: int) -> int:
    """Return a seed for this round and client, as the message names them."""
    parts = [seed, int(config.get(ROUND_KEY, 0)), int(config.get(CLIENT_KEY, 0))]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def message_penalty(model: nn.Module, config: Mapping[str, Any]) -> Callable[[], Tensor] | None:
    """Return what a message asks to add to the loss, or None.

    That is self-pruning's tail and FedProx's ``μ/2 ‖w - w_0‖²`` (Li et al., MLSys 2020,
    https://arxiv.org/abs/1812.06127, as published) over all that is trained. ``w_0`` are the
    weights as they are now: call this before training, once.

    Raises
    ------
    ValueError
        If μ is not a number of at least 0.
    """
    weight, gamma = float(config.get(PENALTY_KEY, 0.0)), float(config.get(GAMMA_KEY, 1.0))
    mu = float(config.get(PROXIMAL_KEY, 0.0))
    if not 0 <= mu < math.inf:
        raise ValueError(f"{PROXIMAL_KEY}: expected a number of at least 0, got {mu!r}")
    terms: list[Callable[[], Tensor]] = []
    if weight:
        terms.append(lambda: weight * tail_penalty(model, gamma))
    if mu:
        start = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        terms.append(lambda: mu / 2 * _sum((p - p0).float().square().sum() for p, p0 in start))
    return (lambda: _sum(term() for term in terms)) if terms else None


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of numbers that are on one device, at least one."""
    return torch.stack(list(terms)).sum()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients.

    Raises
    ------
    ValueError
        If there are none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError(
            f"expected trainable weights in {type(model).__name__}, but none requires gradients; "
            "make it with peft.get_peft_model"
        )
    return found


class _Rows:
    """Iterate over batches, and remember the rows of the longest pass."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.most = 0

    def __iter__(self) -> Iterator[Batch]:
        rows = 0
        for batch in self.batches:
            rows += _row_count(batch)
            self.most = max(self.most, rows)
            yield batch


def _planned(
    batches: Iterable[Batch], steps: int | None, epochs: float | None, accumulation: int
) -> int | None:
    """Return how many steps there will be; None: one pass over a stream."""
    if steps is not None and epochs is not None:
        raise ValueError(f"expected steps or epochs, got both ({steps!r} and {epochs!r})")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"epochs: expected a number above 0, got {epochs!r}")
    if steps is not None:
        return steps
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        if epochs is None:
            return None
        raise ValueError(
            "epochs needs the number of batches, which these do not tell: pass steps, or batches "
            "with a length (a DataLoader, a list)"
        ) from None
    # 1.1 passes of 10 steps are 11, though 1.1 * 10 is a little more than that.
    return max(1, math.ceil(round((epochs or 1) * math.ceil(count / accumulation), 6)))


def _groups(batches: Iterable[Batch], size: int, *, repeat: bool) -> Iterator[list[Batch]]:
    """Yield lists of ``size`` batches, fewer at the end of a pass."""
    while True:
        stream, empty = iter(batches), True
        while group := list(islice(stream, size)):
            empty = False
            yield group
        if empty:
            raise ValueError("expected batches to train on, got none (again): pass a DataLoader "
                             "or a list, which can be read more than once")  # fmt: skip
        if not repeat:
            return


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ValueError(f"{type(model).__name__} returned no loss; have 'labels' in the batch, "
                         "or pass loss_fn")  # fmt: skip
    return loss


def _weight(model: nn.Module, batch: Batch, *, own_loss: bool) -> int:
    """Return how many terms the mean loss of a batch is over."""
    labels = batch.get("labels") if own_loss else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return _row_count(batch)
    if labels.ndim > 1 and predicts_next(model):
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def _size(batch: Batch) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)


def _row_count(batch: Batch) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor)), 1)
