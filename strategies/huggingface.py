"""Train a client with ``transformers.Trainer``; needs transformers and accelerate.

``train_with_trainer`` is the whole of a client's training in one call. Who makes a
``Trainer`` already adds a ``FedLoRACallback`` to it instead:

.. code-block:: python

    @app.train()
    def train(message, context):
        config = apply_adapter(model, message, context)
        reporter = FedLoRACallback(config, context.state)
        Trainer(model, args, train_dataset=rows, callbacks=[reporter]).train()
        done = reporter.outcome()
        return make_reply(model, message, num_examples=done.num_examples,
                          metrics=done.metrics(), context=context)
"""

from __future__ import annotations

import copy
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from flwr.app import RecordDict
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from strategies.client.profiling import profile, profile_wanted
from strategies.profiling import SAMPLES_KEY, Profile, profile_rows
from strategies.training import (
    TrainOutcome,
    losses_and_labels,
    message_penalty,
    trainable,
    training_seed,
)

#: What ``train_with_trainer`` sets where its ``args`` are a mapping and do not.
QUIET = {
    "report_to": "none",
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,  # a diverged client must not report a harmless loss
    "disable_tqdm": True,
}


#: What trainers set on modules and leave there: a forward method that is wrapped once more by each
#: of them (TRL's returns no logits), and checkpoints.
CHANGED = (
    "forward",
    "_original_forward",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
)


class FedLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Let any ``Trainer`` do what a training message asks, and report it.

    It counts steps and seconds for the clock, profiles the received adapter where AutoRank
    asks for that, and adds FedProx's term and self-pruning's penalty to the gradients (the
    reported loss leaves them out).

    Parameters
    ----------
    config : Mapping[str, Any], optional
        The received config.
    state : RecordDict, optional
        ``context.state``, where a profile is kept for ``make_reply``; without it none is
        made.
    """

    def __init__(
        self, config: Mapping[str, Any] | None = None, state: RecordDict | None = None
    ) -> None:
        self.config = config or {}
        self.state = state
        self._started = 0.0
        self._rows = 0
        self._penalty: Callable[[], torch.Tensor] | None = None
        self._outcome: TrainOutcome | None = None

    def outcome(self) -> TrainOutcome:
        """Return what the training did.

        Raises
        ------
        RuntimeError
            If no training with this callback has ended.
        """
        if self._outcome is None:
            raise RuntimeError("no training has ended; give this callback to a Trainer and train")
        return self._outcome

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any
    ) -> None:
        """Profile, if asked to; start the watch."""
        self._outcome = None
        self._penalty = message_penalty(found["model"], self.config)
        loader = found["train_dataloader"]
        self._rows = len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0
        if self.state is not None and profile_wanted(self.config):
            model, limit = found["model"], int(self.config.get(SAMPLES_KEY, 0))

            def measure() -> Profile:
                return dataset_losses_and_labels(
                    model,
                    loader.dataset,
                    loader.collate_fn,
                    batch_size=args.eval_batch_size,
                    limit=limit,
                    seed=args.seed,
                )

            profile(self.state, measure, again=True)
        self._started = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any
    ) -> None:
        """Start the gradients of a step with those of the penalty, so that both are clipped."""
        if self._penalty is not None:
            scaler = getattr(found["optimizer"], "scaler", None)  # float16 scales its gradients
            scale = scaler.get_scale() if scaler is not None else 1.0
            (scale * self._penalty()).backward()  # type: ignore[no-untyped-call]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any
    ) -> None:
        """Note steps, seconds and loss."""
        seconds = time.perf_counter() - self._started
        self._penalty = None  # and with it a copy of what was trained
        losses = (log["train_loss"] for log in reversed(state.log_history) if "train_loss" in log)
        seen = state.global_step * args.train_batch_size * args.gradient_accumulation_steps
        self._outcome = TrainOutcome(
            next(losses, float("nan")), state.global_step, seconds, self._rows or seen
        )


def train_with_trainer(
    model: nn.Module,
    train_dataset: Any,
    config: Mapping[str, Any] | None = None,
    *,
    args: TrainingArguments | Mapping[str, Any] | None = None,
    state: RecordDict | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    save: bool = False,
    trainer_class: type[Trainer] = Trainer,
    **trainer_options: Any,
) -> TrainOutcome:
    """Train what requires gradients with ``transformers.Trainer``, in place.

    Batches, schedule, gradient accumulation and mixed precision are those of ``args``. The
    process is left as it was: random states, the model's mode, its ``use_cache`` and its
    forward method, which mixed precision wraps. One resident model serves client after
    client.

    Parameters
    ----------
    model : nn.Module
        As ``apply_adapter`` left it.
    train_dataset : Dataset
        For a ``Trainer``: rows with what the model's ``forward`` takes, and ``labels``.
    config : Mapping[str, Any], optional
        The received config: round and client vary the seed; for the rest see
        ``FedLoRACallback``.
    args : TrainingArguments or Mapping[str, Any], optional
        A mapping holds arguments of ``TrainingArguments``; with it nothing is printed, logged
        or reported but what it asks for. ``args.seed`` seeds the client's own seed.
    state : RecordDict, optional
        ``context.state``, to profile.
    callbacks : Iterable[TrainerCallback]
        More callbacks.
    save : bool (default: False)
        Let the Trainer save checkpoints as ``args`` say. Otherwise it saves none, and makes
        no output folder, whatever they say.
    trainer_class : type (default: Trainer)
        A subclass of it, such as TRL's ``SFTTrainer``; ``args`` are then an ``SFTConfig``.
    **trainer_options
        Further arguments of the class, such as ``data_collator`` or ``processing_class``.

    Raises
    ------
    ValueError
        If nothing is trainable, or there are no rows.
    """
    trainable(model)
    if not len(train_dataset):
        raise ValueError("expected rows to train on, got none")
    reporter = FedLoRACallback(config, state)
    with _borrowed(model), tempfile.TemporaryDirectory(prefix="fedlora-trainer-") as folder:
        if isinstance(args, TrainingArguments):
            settings, quiet = copy.copy(args), False
        else:
            quiet = True
            pin = {"dataloader_pin_memory": torch.cuda.is_available()}  # or torch warns
            settings = TrainingArguments(**{"output_dir": folder, **QUIET, **pin, **(args or {})})
        if not save:
            settings.output_dir = folder
            settings.save_strategy = type(settings.save_strategy)("no")
            settings.load_best_model_at_end = False
        settings.seed = settings.data_seed = training_seed(config or {}, settings.seed)
        trainer = trainer_class(
            model=model,
            args=settings,
            train_dataset=train_dataset,
            callbacks=[reporter, *callbacks],
            **trainer_options,
        )
        if quiet and settings.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
    # A trainer may make other rows of them, as TRL's does when it packs.
    return replace(reporter.outcome(), num_examples=len(train_dataset))


def dataset_losses_and_labels(
    model: nn.Module,
    dataset: Dataset[Any],
    data_collator: Any,
    *,
    batch_size: int = 8,
    limit: int = 0,
    seed: int = 42,
) -> Profile:
    """Return what ``register_profile`` and ``profile`` measure, for a ``Trainer``'s data set.

    ``register_profile(app, lambda context: dataset_losses_and_labels(model, rows, collator))``.

    Parameters
    ----------
    model, dataset, data_collator
        As for a ``Trainer``. See ``strategies.training.losses_and_labels``.
    batch_size : int (default: 8)
        Changes the speed, not the result.
    limit : int (default: 0)
        At most this many rows, a seeded choice; 0: all.
    seed : int (default: 42)
    """
    rows = profile_rows(len(dataset), limit, seed)  # type: ignore[arg-type]
    loader = DataLoader(
        Subset(dataset, rows.tolist()),
        batch_size,
        collate_fn=data_collator,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    return replace(losses_and_labels(model, loader), rows=len(dataset))  # type: ignore[arg-type]


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Put back what a Trainer changes beside the weights: it takes process and model as its own."""
    training = model.training
    before = [(m, {k: m.__dict__[k] for k in CHANGED if k in m.__dict__}, m._forward_hooks.copy())
              for m in model.modules()]  # fmt: skip
    types = [(p, p.dtype) for p in model.parameters() if p.requires_grad]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (the Trainer seeds it)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for module, own, hooks in before:
                for name in CHANGED:
                    module.__dict__.pop(name, None)
                module.__dict__.update(own)
                module._forward_hooks = hooks
            for parameter, dtype in types:  # TRL makes adapters on a quantised base bfloat16
                parameter.data = parameter.data.to(dtype)
            if use_cache is not None:
                config.use_cache = use_cache
            if precision is None:  # transformers 4 sets it for good
                os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
            else:
                os.environ["ACCELERATE_MIXED_PRECISION"] = precision
            model.train(training)
            model.zero_grad()
            AcceleratorState._reset_state()  # or the next one's precision is refused
