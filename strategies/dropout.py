"""Dropout on a CPU whose random numbers cost little beside the matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

RESOLUTION = 2**16  # dropout rates are rounded to whole parts of it

#: Up to so many tokens torch's fused attention in bfloat16 loses on the way back, on a CPU.
SHORT = 128


class QuickDropout(TorchFunctionMode):
    """Inside the block, ``dropout`` and attention with dropout draw 16 bits for each value.

    Torch draws 64 bits of a Mersenne twister for each, which takes a seventh of a training step
    of the packaged model. Attention with dropout is computed as torch does it, less the search
    for rows that attend to nothing (they get the mean instead of zeros; only padding is such a
    row). Attention without dropout is torch's own, of short texts in bfloat16 by its plain formula,
    which takes half the time there. What this does not know is left to torch.

    Small models lose more by the look at every call than they gain. ``with QuickDropout(seed):
    train_loop(…)``; never with activations that are computed again on the way back (gradient
    checkpointing), which would draw other numbers.

    Parameters
    ----------
    seed : int
        Same seed, same numbers, on every CPU and beside anything else that draws.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.bits = np.random.SFC64(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = None
        if func is functional.dropout:
            found = self._dropout(*args, **(kwargs or {}))
        elif func is functional.scaled_dot_product_attention:
            found = self._attention(*args, **(kwargs or {}))
            if found is None and _plain_is_faster(*args, **(kwargs or {})):
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found

    def noise(self, shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
        """Return zeros with probability ``p``, else what keeps the mean at 1."""
        return draw(self.bits, shape, dtype, p)

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor | None:
        if not (training and _feasible(p)) or x.device.type != "cpu":
            return None
        noise = self.noise(x.shape, x.dtype, p)
        return x.mul_(noise) if inplace else x * noise

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        if not _feasible(dropout_p) or is_causal or enable_gqa or query.device.type != "cpu":
            return None
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            return None
        factor = query.size(-1) ** -0.5 if scale is None else scale
        scores = (query * factor) @ key.transpose(-1, -2)
        if attn_mask is not None:
            away = torch.zeros(attn_mask.shape, dtype=scores.dtype)
            scores = scores + away.masked_fill_(~attn_mask, torch.finfo(scores.dtype).min)
        shares = scores.softmax(-1)
        return (shares * self.noise(shares.shape, shares.dtype, dropout_p)) @ value


def draw(bits: np.random.SFC64, shape: Sequence[int], dtype: torch.dtype, p: float) -> Tensor:
    """Return a tensor that is 0 with probability ``p``, else 1 / (1 - p)."""
    count, dropped = int(np.prod(shape)), round(p * RESOLUTION)
    numbers = torch.from_numpy(bits.random_raw(-(-count // 4)).view(np.int16)[:count])
    # In place, and from whole numbers: from booleans it takes ten times as long.
    kept = numbers.ge_(dropped - RESOLUTION // 2).to(dtype)
    return kept.mul_(1 / (1 - dropped / RESOLUTION)).view(*shape)


def _plain_is_faster(query: Tensor, *others: Any, **options: Any) -> bool:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return (
        query.requires_grad  # the way there is faster fused
        and query.device.type == "cpu"
        and query.size(-2) <= SHORT
        and dtype == torch.bfloat16
    )


def _feasible(p: float) -> bool:
    return 0 < round(p * RESOLUTION) < RESOLUTION
