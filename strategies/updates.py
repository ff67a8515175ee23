"""The steps of an optimiser: rates by name, their schedule and the clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from strategies.schedules import Schedule, make_schedule

Rates = float | Mapping[str, float]
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


class Updates:
    """The optimiser of one client's training, its learning rates and its clipping.

    Parameters
    ----------
    trained : Mapping[str, Tensor]
        What is trained, by name.
    steps : int, optional
        All steps there will be; needed where the schedule is not constant.
    learning_rate, weight_decay, schedule, max_grad_norm, optimizer
        As in ``strategies.training.train_loop``.
    scaler : GradScaler, optional
        What the gradients were scaled by.
    """

    def __init__(
        self,
        trained: Mapping[str, Tensor],
        steps: int | None,
        *,
        learning_rate: Rates = 1e-3,
        weight_decay: float = 0.0,
        schedule: str | Schedule = "constant",
        max_grad_norm: float = 1.0,
        optimizer: OptimizerFactory | None = None,
        scaler: Any = None,
    ) -> None:
        if optimizer is not None and weight_decay:
            raise ValueError("weight_decay is AdamW's; set that of your own in optimizer")
        # Of a constant schedule nothing is set: an optimiser may have one of its own.
        self.schedule = None if schedule == "constant" else make_schedule(schedule)
        if self.schedule is not None and steps is None:
            raise ValueError(
                "a schedule needs the number of steps, which these batches do not tell: pass "
                "steps, or batches with a length (a DataLoader, a list)"
            )
        self.trained, self.clip = list(trained.values()), max_grad_norm
        self.scaler, self.steps, self.done = scaler, steps or 0, 0
        groups = (
            self.trained
            if isinstance(learning_rate, float | int)
            else _groups(trained, learning_rate)
        )
        self.optimizer = (
            optimizer(groups)
            if optimizer is not None
            else torch.optim.AdamW(
                groups,
                lr=learning_rate if isinstance(learning_rate, float | int) else 0.0,
                weight_decay=weight_decay,
                fused=self.trained[0].device.type in ("cpu", "cuda"),
            )
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Apply the gradients and forget them: a resident model would keep their memory."""
        if self.schedule is not None:
            factor = self.schedule(min(self.done, self.steps - 1), self.steps)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def _groups(trained: Mapping[str, Tensor], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return parameter groups: a parameter has the rate of the first key that its name holds."""
    groups: dict[str, list[Tensor]] = {key: [] for key in rates}
    for name, tensor in trained.items():
        key = next((key for key in rates if key in name), None)
        if key is None:
            raise ValueError(
                f"learning_rate: expected a rate for {name!r}, whose name holds none of "
                f"{', '.join(map(repr, rates)) or 'no keys'}; add '' for all others"
            )
        groups[key].append(tensor)
    return [{"params": found, "lr": rates[key]} for key, found in groups.items() if found]
