"""What a round of aggregation sums up, and by what its sums are divided."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from strategies.aggregation.population import Population
from strategies.aggregation.update import Update
from strategies.lora import Adapter

# A part of the weight this small is rounding of the weights themselves, below what a sum can show.
_NOTHING = 1e-9


@dataclass
class State:
    """Running sums of one round; every rule extends it.

    ``unit`` is a power of two near the first weight. Dividing weights by it costs no
    precision and keeps sums far from overflow, whatever unit the weights come in. ``total`` is
    the weight of the updates. ``population`` says whom they stand for; None: for themselves.
    ``reach`` has, by module, which entries somebody holds, bool. ``waiting`` are updates that are
    yet to be compared with each other, see ``Aggregator.protect``.
    """

    current: Adapter
    total: float = 0.0
    count: int = 0
    unit: float = 0.0
    dense: dict[str, Tensor] = field(default_factory=dict)
    dense_mass: dict[str, float] = field(default_factory=dict)
    population: Population | None = None
    waiting: list[Update] = field(default_factory=list)
    reach: dict[str, Tensor] = field(default_factory=dict)

    def note(self, update: Update) -> None:
        """Note which entries of the rank axis an update has."""
        named = (update.sent.entries if update.sent else None) or {}
        for module, pair in update.adapter.pairs.items():
            known = self.reach.get(module)
            rank = max(pair.rank, self.current.pairs[module].rank)
            if known is None or len(known) < rank:
                wider = torch.zeros(rank, dtype=torch.bool)
                if known is not None:
                    wider[: len(known)] = known
                known = self.reach[module] = wider
            known[named.get(module, slice(pair.rank))] = True

    def over(self, own: float | None = None) -> tuple[float, float]:
        """Return by what a sum is divided, and the part of the mean that the current adapter has.

        Parameters
        ----------
        own : float, optional
            The weight of the updates in the sum (default: of all).

        Returns
        -------
        (float, float)
            Without a population ``own`` and 0. With one its weight and ``1 - own / weight``, which
            is below 0 in a draw that weighs more than everybody.
        """
        own = self.total if own is None else own
        everybody = self._everybody()
        if everybody is None:
            return own, 0.0
        mass = everybody.total / self.unit
        share = 1.0 - own / mass
        return mass, 0.0 if abs(share) < _NOTHING else share

    def over_all(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as ``over`` for sums where a client that lacks an entry leaves it.

        Parameters
        ----------
        own : Tensor
            The weight of the updates that hold each entry, float64, ``(rank,)``.

        Returns
        -------
        (Tensor, Tensor)
            The divisors, the weight of everybody, and the parts that the current adapter has;
            both float64, ``(rank,)``.
        """
        mass, _ = self.over()
        share = 1.0 - own / mass
        return torch.full_like(own, mass), torch.where(share.abs() < _NOTHING, 0.0, share)

    def over_holders(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as ``over`` for sums over the holders of each rank entry.

        Parameters
        ----------
        own : Tensor
            The weight of the updates that hold each entry, float64, ``(rank,)``. It divides
            also where nobody of the population is known to hold an entry.

        Returns
        -------
        (Tensor, Tensor)
            The divisors, 0 where nobody holds an entry, and the parts that the current adapter
            has there, 1 where nobody does; both float64, ``(rank,)``.
        """
        mass = own
        if everybody := self._everybody():
            full = everybody.mass_at(len(own)) / self.unit
            mass = torch.where(full > 0, full, own)
        share = torch.where(mass > 0, 1.0 - own / mass, 1.0)
        return mass, torch.where(share.abs() < _NOTHING, 0.0, share)

    def _everybody(self) -> Population | None:
        """Return the population whose full weight divides, if one does."""
        return None if self.population is None or self.population.ratio else self.population
