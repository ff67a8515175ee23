"""``LoraPair``: the two factors of one module."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strategies.lora import algebra


class AdapterError(ValueError):
    """An adapter is not usable; ``problems`` and the message list every reason."""

    def __init__(self, problems: list[str], where: str = "adapter") -> None:
        self.problems = problems
        super().__init__(f"{where}: " + "; ".join(problems))


@dataclass(frozen=True, eq=False, slots=True)
class LoraPair:
    """One LoRA module: it adds ``scale · B A`` to a frozen weight.

    Parameters
    ----------
    A : Tensor
        ``(r, n)``; ``(r, in, *kernel)`` for a convolution.
    B : Tensor
        ``(m, r)``; ``(m, r, 1, …)`` for a convolution.
    scale : float
        ``alpha / r``, or ``alpha / √r`` with rsLoRA.
    embedding : bool (default: False)
        Whether PEFT stores the pair as ``lora_embedding_A/B``.

    Raises
    ------
    AdapterError
        If the factors' shapes do not make a pair.
    """

    A: Tensor
    B: Tensor
    scale: float
    embedding: bool = False

    def __post_init__(self) -> None:
        if problems := pair_problems("the pair", self.A, self.B):
            raise AdapterError(problems)

    @property
    def rank(self) -> int:
        """The number of rank-one terms."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """Return ``scale · B A``: ``(m, n)``, or ``(m, in, *kernel)`` for a convolution."""
        dense = self.scale * algebra.product(self.A, self.B)
        return dense.reshape(self.B.shape[0], *self.A.shape[1:])

    def norm(self) -> float:
        """Return the Frobenius norm of ``delta`` without forming it."""
        return abs(self.scale) * algebra.frobenius(self.A, self.B)

    def with_rank(self, rank: int) -> LoraPair:
        """Return the leading ``rank`` terms, zero-padded when there are fewer."""
        if rank == self.rank:
            return self
        return replace(self, A=algebra.resize(self.A, 0, rank), B=algebra.resize(self.B, 1, rank))

    def with_scale(self, scale: float) -> LoraPair:
        """Return the same ``delta`` at another scale; the ratio goes into ``B``."""
        if scale == self.scale:
            return self
        return replace(self, B=self.B * (self.scale / scale), scale=scale)

    def to(self, dtype: torch.dtype) -> LoraPair:
        """Return the pair with both factors in ``dtype``."""
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))


def pair_problems(module: str, A: Tensor, B: Tensor) -> list[str]:
    """Return what keeps two factors from being a pair."""
    if A.dim() < 2 or B.dim() != A.dim() or any(d != 1 for d in B.shape[2:]):
        return [
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of {module} are not a pair: "
            "expected (r, n) and (m, r), or (r, in, *kernel) and (m, r, 1, …)"
        ]
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        return [
            f"ranks disagree in {module}: lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)} "
            "(a grouped convolution is not supported)"
        ]
    return []
