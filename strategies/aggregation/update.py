"""What a client is sent, and what it sends back, as a rule sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from strategies.lora import Adapter


@dataclass(frozen=True)
class Download:
    """What one client gets.

    Parameters
    ----------
    adapter : Adapter
        At the client's rank, with the scale it is to train with.
    entries : Mapping[str, Tensor], optional
        By module, which entries of the global rank axis these are, where they are not the
        leading ones.
    fixed : Adapter, optional
        What the client holds beside it, merged into its frozen weights for this message.
    """

    adapter: Adapter
    entries: Mapping[str, Tensor] | None = None
    fixed: Adapter | None = None


@dataclass(frozen=True)
class Update:
    """One client's contribution.

    Parameters
    ----------
    adapter : Adapter
        What the client trained.
    weight : float
        Its data weight, e.g. its number of examples; above 0, any common unit. Where the
        round has a ``Population``, ``η a_n / q_n``.
    quality : float, optional
        How good its model is, e.g. validation accuracy; for rules that ask for it.
    sent : Download, optional
        What the client started from; for rules that work on what changed.
    late : float, optional
        Where it started from an older model: what part of its change counts, at the whole weight,
        on top of the current one (default: it is of the current one, and counts itself).
    """

    adapter: Adapter
    weight: float
    quality: float | None = None
    sent: Download | None = None
    late: float | None = None
