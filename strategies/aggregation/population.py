"""Whom the updates of a sampled round stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Population:
    """Whom the updates of a round stand for, where clients join by independent coins.

    Client n joins with probability ``q_n`` and then weighs ``η a_n / q_n``, with ``a_n`` its data
    weight and ``η`` the server's rate. Dividing by what ALL clients weigh, and leaving what is
    over with the current adapter, moves the model in expectation exactly as if everybody had taken
    part (Horvitz and Thompson on displacements, as a reader of the paper on adaptive federated
    LoRA reports it).

    Parameters
    ----------
    masses : Mapping[int, float]
        By rank, the sum of the data weights ``a_n`` of all clients of that rank, sampled or not;
        1 together.
    ratio : bool (default: False)
        Whether to divide by the weight of the participants instead: biased but consistent,
        and of less variance.

    Raises
    ------
    ValueError
        If a rank is below 1, a mass is negative or not finite, or all of them are 0.
    """

    masses: Mapping[int, float]
    ratio: bool = False

    def __post_init__(self) -> None:
        for rank, mass in self.masses.items():
            if rank < 1 or not (math.isfinite(mass) and mass >= 0):
                raise ValueError(
                    "masses: expected a finite weight of at least 0 by rank from 1, "
                    f"got {mass!r} for rank {rank!r}"
                )
        if not self.total > 0:
            raise ValueError(f"masses: expected a sum of 1, got {self.total:g}")

    @property
    def total(self) -> float:
        """The weight of everybody."""
        return math.fsum(self.masses.values())

    def mass_at(self, rank: int) -> Tensor:
        """Return the weight of those who hold each entry, float64, ``(rank,)``."""
        return entry_mass(self.masses, rank)


def entry_mass(masses: Mapping[int, float], rank: int) -> Tensor:
    """Return ``Σ_{r > j} masses[r]`` for the entries j below ``rank``, float64, ``(rank,)``."""
    out = torch.zeros(rank, dtype=torch.float64)
    for held, mass in sorted(masses.items()):
        out[:held] += mass
    return out
