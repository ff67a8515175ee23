"""Pure tensor functions on LoRA factors.

``A`` has the rank on its first axis, ``B`` on its second; further axes of a
convolution are carried along. Nothing here knows names, clients or files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Tell whether ``x`` holds neither NaN nor Inf.

    A finite sum proves it in one pass without a temporary; only a sum that overflows
    needs the look at every element.
    """
    wide = torch.float32 if x.element_size() < 4 else None
    if math.isfinite(x.sum(dtype=wide).item()):
        return True
    return bool(torch.isfinite(x).all())


def resize(x: Tensor, axis: int, size: int) -> Tensor:
    """Return the leading ``size`` entries of ``axis``, zero-padded when there are fewer."""
    have = x.shape[axis]
    if size == have:
        return x
    if size < have:
        return x.narrow(axis, 0, size)
    shape = list(x.shape)
    shape[axis] = size - have
    return torch.cat([x, x.new_zeros(shape)], dim=axis)


def product(A: Tensor, B: Tensor) -> Tensor:
    """Return ``B A`` as a matrix ``(m, n)``; the kernel axes of a convolution are in ``n``."""
    return B.flatten(1) @ A.flatten(1)


def frobenius(A: Tensor, B: Tensor) -> float:
    """Return ``‖B A‖_F`` from the two r×r Gram matrices, without the m×n product."""
    a, b = A.flatten(1).double(), B.flatten(1).double()
    squared = ((a @ a.T) * (b.T @ b)).sum()
    return math.sqrt(max(float(squared), 0.0))  # rounding may leave a tiny negative number
