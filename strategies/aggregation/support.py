"""The mean of the holders, shrunk where an entry has few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.aggregation.averaging import Aligning, FactorState, HolderMean
from strategies.aggregation.base import register


@register
class Support(Aligning, HolderMean):
    """Average each entry over its holders, times ``(their share of the weight) ** gamma``.

    This project's own, published nowhere. An entry of the rank axis that one client of many trained
    is as large under ``replication`` as one that all trained, though it fits that client alone;
    ``zero-padding`` shrinks it by its holders' share, in both factors. This rule lies between:
    ``gamma = 0`` is ``rbla`` (and ``replication`` with data weights), ``gamma = 1`` is
    ``zero-padding`` on all entries that somebody of the round holds. Where all hold an entry, or
    all ranks are equal, it is ``fedit`` whatever ``gamma``. An entry without holders stays as it
    was: nothing was learned about it.

    The factor is that of both ``A`` and ``B``, so the product of an entry shrinks by its square. It
    is at most 1, so that no entry is larger than its holders made it. As under zero padding, what
    few hold fades unless they train it on: that is what keeps it from ruining the whole.

    Parameters
    ----------
    gamma : float (default: 0.5)
        0 to 1.
    align : bool or float (default: False)
        As in ``rbla``.

    Raises
    ------
    ValueError
        If ``gamma`` or ``align`` is not in [0, 1].
    """

    name = "support"
    mean_of_holders = False  # what few hold is made smaller
    unbiased = linear = symmetric = entrywise = late = True

    def __init__(self, *, gamma: float = 0.5, align: bool | float = False) -> None:
        super().__init__(align=align)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected 0 (rbla) to 1 (zero-padding), got {gamma!r}")
        self.gamma = gamma

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return the holders' mean of one module, each entry times its support."""
        sums, old = state.sums[module], state.current.pairs[module]
        holders, left = state.over_holders(sums.mass)
        everybody, _ = state.over()
        held = holders > 0
        factor = torch.where(held, (holders / everybody).clamp(max=1.0) ** self.gamma, 1.0)
        return sums.blended(torch.where(held, holders / factor, 0.0), old, left)
