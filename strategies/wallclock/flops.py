"""What a training step costs, counted by PyTorch in one real step."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def training_flops(step: Callable[[], object]) -> float:
    """Run a training step once and return the FLOPs of its matrix products and convolutions.

    A product of (m, n) and (n, k) counts ``2 m n k``. Not counted are element-wise operations,
    softmax, normalisation, embeddings and the optimiser, nor kernels unknown to PyTorch's
    counter (custom ones; those of ``nn.TransformerEncoder`` in evaluation mode). Attention is
    computed from plain products during the count, since some of its fused kernels, the one for
    the CPU among them, are unknown too.

    Parameters
    ----------
    step : callable
        Does forward and backward pass on one batch. It is really run: parameters and gradients
        are afterwards as it leaves them.

    Returns
    -------
    float
        FLOPs of the step, > 0.

    Raises
    ------
    ValueError
        If the step computes nothing that is counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    flops = float(counter.get_total_flops())
    if flops == 0:
        raise ValueError(
            "expected a step with matrix products or convolutions, got none that PyTorch counts; "
            "give the FLOPs of a step by hand"
        )
    return flops


def rank_flops(
    model_step_at: Callable[[int], Callable[[], object]], low: int = 1, high: int = 8
) -> tuple[float, float]:
    """Return ``(base, per_rank)``: a training step at rank ``k`` costs ``base + per_rank · k``.

    LoRA's cost is linear in the rank, so two ranks are enough.

    Parameters
    ----------
    model_step_at : callable
        Takes a rank and returns a training step at that rank, as for `training_flops`; all on
        the same batch.
    low, high : int
        The two ranks, 1 ≤ low < high. (default: 1 and 8)

    Returns
    -------
    (float, float)
        FLOPs.

    Raises
    ------
    ValueError
        If the ranks are out of order, or the cost is not that of a growing rank.
    """
    if not 1 <= low < high:
        raise ValueError(f"expected ranks 1 ≤ low < high, got {low!r} and {high!r}")
    at_low, at_high = (training_flops(model_step_at(rank)) for rank in (low, high))
    per_rank = (at_high - at_low) / (high - low)
    base = at_low - per_rank * low
    if per_rank < 0 or base < 0:
        raise ValueError(
            f"expected a cost that grows linearly with the rank, got {at_low:g} FLOPs at rank "
            f"{low} and {at_high:g} at rank {high}: were both steps run on the same batch?"
        )
    return base, per_rank
