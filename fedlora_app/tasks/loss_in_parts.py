"""The loss of a language model without all its logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from strategies.losses import IGNORED

#: Logits that are there at a time.
LOGITS = 2**25


@contextmanager
def loss_in_parts(model: Any) -> Iterator[None]:
    """Inside the block, a causal model's loss is that of all its logits, of which few are made.

    Only of trained tokens, and so many at a time that there are at most ``LOGITS`` of them. Its
    outputs have no logits meanwhile. Its last layer is not trained.
    """
    head = model.get_output_embeddings()
    before = [(head, "forward"), (model, "_loss_function")]
    held = [where.__dict__.get(name) for where, name in before]
    project = head.forward

    def loss(logits: Tensor, labels: Any, shift_labels: Tensor | None = None, **_: Any) -> Tensor:
        wanted = shift_labels
        if wanted is None:
            wanted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        kept = wanted != IGNORED
        found: Tensor = _MeanLoss.apply(logits[kept], wanted[kept], project)  # type: ignore[no-untyped-call]
        return found

    head.forward, model.loss_function = lambda states: states, loss
    try:
        yield
    finally:
        for (where, name), value in zip(before, held, strict=True):
            where.__dict__.pop(name)
            if value is not None:
                where.__dict__[name] = value


class _MeanLoss(torch.autograd.Function):
    """The mean loss of tokens from their last states, whose gradient is made on the way there."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, wanted: Tensor, project: Callable[[Tensor], Tensor]
    ) -> Tensor:
        total, gradient = states.new_zeros((), dtype=torch.float32), torch.empty_like(states)
        start, size = 0, 1  # one alone tells how many logits a token has
        while start < len(states):
            part = slice(start, start + size)
            with torch.enable_grad():
                own = states[part].detach().requires_grad_()
                logits = project(own).float()
                loss = functional.cross_entropy(logits, wanted[part], reduction="sum")
                loss = loss / len(states)
            (gradient[part],) = torch.autograd.grad(loss, own)
            total += loss.detach()
            start, size = start + size, max(1, LOGITS // logits.shape[-1])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors[0] * slope, None, None
