"""What a training step keeps in memory beside the frozen weights, counted in one real step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Bytes of a trained number: its value, its gradient and Adam's two moments, in float32.
TRAINED_BYTES = 16


def saved_bytes(step: Callable[[], object], model: nn.Module) -> float:
    """Run a training step once and return the bytes that forward keeps for backward.

    Each storage counts once; parameters and buffers of the model, which are there anyway, do not.
    Not counted is what operations need for a moment, such as the workspace of a matrix product.

    Parameters
    ----------
    step : callable
        Does forward and backward pass on one batch; it is really run.
    model : nn.Module
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return float(sum(kept.values()))


def rank_memory(
    model_step_at: Callable[[int], Callable[[], object]],
    model: nn.Module,
    low: int = 1,
    high: int = 8,
) -> tuple[float, float]:
    """Return ``(base, per_rank)``: training at rank ``k`` takes ``base + per_rank · k`` bytes.

    Beside the frozen weights: what is kept for the backward pass, and ``TRAINED_BYTES`` for each
    trained number. Both are linear in the rank, so two ranks are enough.

    Parameters
    ----------
    model_step_at : callable
        Takes a rank, makes the model that, and returns a training step.
    model : nn.Module
        The model of these steps.
    low, high : int (default: 1, 8)
        The two ranks, 1 ≤ low < high.

    Raises
    ------
    ValueError
        If the ranks are out of order.
    """
    if not 1 <= low < high:
        raise ValueError(f"expected ranks 1 ≤ low < high, got {low!r} and {high!r}")
    needs = []
    for rank in (low, high):
        step = model_step_at(rank)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        needs.append(saved_bytes(step, model) + TRAINED_BYTES * trained)
    per_rank = max(0.0, (needs[1] - needs[0]) / (high - low))
    return max(0.0, needs[0] - per_rank * low), per_rank
