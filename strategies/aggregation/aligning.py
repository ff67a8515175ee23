"""Rotate factors onto others: ``A <- Qᵀ A``, ``B <- B Q`` with an orthogonal Q.

That leaves every product ``B A`` as it was, but not the mean of factors: clients that learned the
same in different bases cancel each other in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from strategies.lora import LoraPair

# Directions that the reference lacks are not turned: a part of the identity this small decides.
_TIE = 1e-9


def turned(
    pair: LoraPair, towards: LoraPair, *, by: Literal["A", "B"], strength: float = 1.0
) -> LoraPair:
    """Return a pair of the same product whose factor ``by`` is as near as can be to another's.

    Parameters
    ----------
    pair, towards : LoraPair
        Of one rank and shape.
    by : "A" or "B"
    strength : float (default: 1.0)
        As in ``rotation``.
    """
    A, B = _matrix(pair.A), _matrix(pair.B)
    if by == "A":
        agreement = A @ _matrix(towards.A).mT
    else:
        agreement = B.mT @ _matrix(towards.B)
    if not bool(torch.isfinite(agreement).all()):
        return pair  # who looks at the numbers next refuses it
    Q = rotation(agreement, strength).to(torch.float32)
    return replace(pair, A=(Q.mT @ A).reshape(pair.A.shape), B=(B @ Q).reshape(pair.B.shape))


def rotation(agreement: Tensor, strength: float = 1.0) -> Tensor:
    """Return the orthogonal Q for which ``‖Qᵀ A_k - A_ref‖`` is least.

    Parameters
    ----------
    agreement : Tensor
        ``A_k A_refᵀ`` or ``B_kᵀ B_ref``, ``(r, r)``.
    strength : float (default: 1.0)
        1: the whole way. Less: the orthogonal matrix nearest to ``(1 - λ) I + λ Q``, with Q made
        a proper rotation first, by turning its last direction round.

    Returns
    -------
    Tensor
        Float64, ``(r, r)``.
    """
    M = agreement.double()
    eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
    U, _, Vh = torch.linalg.svd(M + _TIE * M.norm() * eye)
    if strength < 1:
        if float(torch.linalg.det(U @ Vh)) < 0:
            Vh = torch.cat([Vh[:-1], -Vh[-1:]])
        U, _, Vh = torch.linalg.svd((1 - strength) * eye + strength * (U @ Vh))
    Q: Tensor = U @ Vh
    return Q


def _matrix(x: Tensor) -> Tensor:
    return x.to(torch.float32).flatten(1)
