"""The rows on which the server tests, and judges clients where a rank policy asks for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, MetricRecord

from fedlora_app.evaluation import evaluate, per_sample_losses
from fedlora_app.launch.inspection import CORES
from fedlora_app.tasks import Inputs, Rows, Sample, Task
from strategies.client import load_adapter
from strategies.lora import Adapter
from strategies.messages import from_record
from strategies.model import GlobalModel
from strategies.seeding import stream
from strategies.surroundings import torch_threads

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import


class HeldOut:
    """The server's held-out rows; ``validation`` are those that judge, and never test.

    ``samples`` are those of the last evaluation.

    Parameters
    ----------
    task : Task
    rows : Rows
        Its test rows.
    validation_rows : int (default: 0)
        How many of them judge.
    """

    def __init__(self, task: Task, rows: Rows, validation_rows: int = 0) -> None:
        config = task.config
        self.task, self.about = task, rows.about
        self.rows, self.all = rows, task.encode(rows)
        self.samples: Sequence[Sample] = ()
        self.validation: Inputs | None = None
        if validation_rows:
            order = stream(config.seed, "validation").permutation(len(self.all))
            self.validation = self.all.take(np.sort(order[:validation_rows]))
            tested = np.sort(order[validation_rows:])
            self.rows, self.all = rows.take(tested), self.all.take(tested)
        self.some = self.all
        if 0 < config.data.test_rows < len(self.all):
            rng = np.random.default_rng(config.seed)
            chosen = rng.choice(len(self.all), config.data.test_rows, replace=False)
            self.some = self.all.take(np.sort(chosen))

    def evaluate(
        self, model: PeftModel, *, everything: bool = False, beside: bool = False
    ) -> dict[str, float]:
        """Evaluate the model as it is; return its scores, ``loss`` among them.

        On all cores, or ``beside`` others on half of them: a simulation's clients may train on
        all, and threads that have to wait for each other lose more than they gain then.
        """
        config, cores = self.task.config, _cores()
        with torch_threads(max(1, cores // 2) if beside else cores):
            scores = evaluate(
                self.task,
                model,
                self.all if everything else self.some,
                batch_size=config.evaluate.batch_size,
                precision=config.train.precision,
            )
            more, self.samples = self.task.try_out(model, self.rows)
        return {**scores, **more}

    def validation_loss(self, model: PeftModel, adapter: Adapter) -> float:
        """Return the loss of a client's adapter on the validation rows."""
        if self.validation is None:
            raise ValueError("there are no validation rows; set ranks.validation-rows")
        load_adapter(model, adapter)
        config = self.task.config
        with torch_threads(_cores()):
            losses = per_sample_losses(
                self.task,
                model,
                self.validation,
                batch_size=config.evaluate.batch_size,
                precision=config.train.precision,
            )
        return float(losses.mean())

    def metrics(
        self, model: PeftModel, arrays: ArrayRecord, *, beside: bool = False
    ) -> MetricRecord:
        """Evaluate global arrays; what the strategy calls after each round."""
        load_adapter(model, effective_adapter(arrays, self.task.config.lora.scale))
        return MetricRecord(dict(self.evaluate(model, beside=beside)))


def _cores() -> int:
    """Return how many cores are for this run."""
    return int(os.environ.get(CORES) or os.cpu_count() or 1)


def effective_adapter(arrays: ArrayRecord, scale: float) -> Adapter:
    """Return the whole global model as one adapter on the base, for evaluation and export."""
    return GlobalModel.from_tensors(from_record(arrays), scale).combined()
