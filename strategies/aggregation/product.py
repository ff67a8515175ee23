"""Rules that average the products ``B A`` and cut the result back to a rank by SVD.

The factors of the result are ``B = U √Σ`` and ``A = √Σ Vᵀ`` with falling singular values, so the
leading r rows and columns are the best approximation of rank r: one decomposition serves
every client's rank. All of it is low-rank arithmetic, see ``strategies.lora.lowrank``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from strategies.aggregation.base import AggregationResult, Aggregator, Update, register
from strategies.aggregation.state import State
from strategies.lora import Adapter, LoraPair
from strategies.lora.algebra import resize
from strategies.lora.lowrank import SVD, ProductSum, complete, in_parallel


@dataclass
class ProductState(State):
    """Sums of products and the largest rank that was seen, by module."""

    sums: dict[str, ProductSum] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)


@register
class FlexLoRA(Aggregator[ProductState]):
    """Average the full updates, then cut them to rank r by SVD.

    FlexLoRA, https://arxiv.org/abs/2402.11505: ``ΔW = Σ p_k s_k B_k A_k`` and its
    truncated SVD (rule as published). This project's decisions: singular values are split evenly
    between the factors (the authors' code puts them into ``B``); a client that lacks a module
    counts as zero there, so weights are shares of ALL clients; a module that nobody sent stays as
    it was; where ``ΔW`` has less rank than the adapter, the spare entries keep ``B`` at zero and
    get rows in ``A`` that can be trained, see ``strategies.lora.lowrank.complete``. The rank is
    the largest of the global adapter's and the updates', at most ``min(m, n)``.
    """

    name = "flexlora"
    unbiased = symmetric = late = True
    supports_dora = False

    def init(self, current: Adapter) -> ProductState:
        """Return empty sums."""
        return ProductState(current)

    def add_pairs(self, state: ProductState, update: Update, weight: float) -> None:
        """Add every product to its module's sum."""
        for module, pair in update.adapter.pairs.items():
            if module not in state.sums:
                state.sums[module] = ProductSum.like(pair.A, pair.B)
            state.sums[module].add(pair.A, pair.B, weight)
            state.ranks[module] = max(pair.rank, state.ranks.get(module, 0))

    def finish_pairs(self, state: ProductState) -> AggregationResult:
        """Decompose every module's mean product."""

        def mean(module: str) -> LoraPair:
            old, total = state.current.pairs[module], state.sums[module]
            rank = min(max(old.rank, state.ranks[module]), total.m, total.n)
            mass, share = state.over()
            keep_product(total, old, share * mass)
            return self.cut(old, total, rank, mass)

        return _replaced(state.current, state.sums, mean)

    def cut(self, old: LoraPair, total: ProductSum, rank: int, divisor: float) -> LoraPair:
        """Return ``total / divisor`` as a pair of ``rank``, in the shape of ``old``."""
        return from_svd(old, total.svd(rank), rank, divisor)


@register
class Florist(FlexLoRA):
    """Like ``flexlora``, but with the smallest global rank that keeps most of the energy.

    FLoRIST, https://arxiv.org/abs/2506.09199 (rule as published). The rank of every
    module is the smallest whose squared singular values sum to ``energy`` of all; a client of
    rank r gets ``min(r, that)``. The rank may rise above the clients' ranks, as the sum of their
    updates does. A module whose ``ΔW`` is zero keeps rank 1 (this project's decision).

    Parameters
    ----------
    energy : float (default: 0.95, this project's decision)
        The part of ``Σ σ²`` to keep, above 0 and at most 1.

    Raises
    ------
    ValueError
        If ``energy`` is not in (0, 1].
    """

    name = "florist"
    unbiased = symmetric = late = True

    def __init__(self, *, energy: float = 0.95) -> None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy: expected a number in (0, 1], got {energy!r}")
        self.energy = energy

    def cut(self, old: LoraPair, total: ProductSum, rank: int, divisor: float) -> LoraPair:
        """Return the mean product at the rank its energy asks for."""
        svd = total.svd(energy=self.energy)
        return from_svd(old, svd, max(len(svd.S), 1), divisor)


@dataclass
class RankOneState(State):
    """Every client's factors and weight, by module.

    By what an entry of the rank axis is divided is known only after the last reply, and it
    differs along that axis, so nothing can be summed before: memory grows with ``Σ r_k (m + n)``.
    """

    held: dict[str, list[tuple[Tensor, Tensor, float]]] = field(default_factory=dict)


class HolderProduct(Aggregator[RankOneState]):
    """Base of the rules that reweigh rank-one terms by who holds their entry.

    Under independent sampling the divisor is by default the weight of the holders that take part,
    as with the averages over holders (this project's decision).
    """

    supports_dora = False
    default_ratio = mean_of_holders = True

    def init(self, current: Adapter) -> RankOneState:
        """Return an empty list of factors."""
        return RankOneState(current)

    def add_pairs(self, state: RankOneState, update: Update, weight: float) -> None:
        """Keep a copy of every pair; the update itself is not needed afterwards."""
        for module, pair in update.adapter.pairs.items():
            A = pair.A.to(torch.float32, copy=True)
            B = pair.B.to(torch.float32, copy=True)
            state.held.setdefault(module, []).append((A, B, weight))

    def finish_pairs(self, state: RankOneState) -> AggregationResult:
        """Weigh, sum and decompose."""

        def mean(module: str) -> LoraPair:
            old, held = state.current.pairs[module], state.held[module]
            largest = max(old.rank, *(len(A) for A, _, _ in held))
            own = torch.zeros(largest, dtype=torch.float64)
            reached = self.holders([(len(A), w) for A, _, w in held])
            own[: len(reached)] = reached
            mass, share = state.over_holders(own)
            total = ProductSum.like(old.A, old.B)
            for A, B, w in held:
                total.add(A, B, w / mass[: len(A)])
            # An entry that nobody holds is dropped, whoever is drawn.
            keep_product(total, old, torch.where(mass > 0, share, 0.0)[: old.rank])
            rank = min(largest, total.m, total.n)
            return from_svd(old, total.svd(rank), rank, 1.0)

        return _replaced(state.current, state.held, mean)

    @abstractmethod
    def holders(self, clients: list[tuple[int, float]]) -> Tensor:
        """Return by what each entry's terms are divided, ``(max r_k,)``, from (rank, weight)s."""


@register
class RBLoRA(HolderProduct):
    """Weigh the rank-one terms by the clients that hold their entry, sum them, cut by SVD.

    RB-LoRA, Findings of EACL 2026 (rule as published): entry j of client k weighs
    ``p_k · Σn / Σ_{r_i ≥ j} n_i``. Counting a module's data over the clients that sent it, and what
    happens to spare entries (as in ``flexlora``), are this project's decisions.
    """

    name = "rb-lora"
    unbiased = symmetric = late = True

    def holders(self, clients: list[tuple[int, float]]) -> Tensor:
        """Return ``Σ_{r_i ≥ j} n_i``."""
        mass = torch.zeros(max(r for r, _ in clients), dtype=torch.float64)
        for r, w in clients:
            mass[:r] += w
        return mass


@register
class RaFLoRA(HolderProduct):
    """Average each partition of the rank axis as a product over the clients that reach it.

    raFLoRA, https://arxiv.org/abs/2602.13486 (idea as published: aggregate by rank partition,
    weighted by the clients that contribute to it). The formula is this project's
    decision: the ranks ``ρ_1 < ρ_2 < …`` of the clients split the rank axis into ``P_l =
    (ρ_{l−1}, ρ_l]``, and
    ``ΔW = Σ_l Σ_{k: r_k ≥ ρ_l} n_k B_k[:, P_l] A_k[P_l] / Σ_{k: r_k ≥ ρ_l} n_k``, cut by SVD.
    Read so it equals ``rb-lora`` in exact arithmetic, since whoever holds one entry of a partition
    holds all of it; the tests say so. Spare entries as in ``flexlora``.
    """

    name = "raflora"
    unbiased = symmetric = late = True

    def holders(self, clients: list[tuple[int, float]]) -> Tensor:
        """Return ``Σ_{k: r_k ≥ ρ_l} n_k`` on each partition ``P_l``."""
        ends = sorted({r for r, _ in clients})
        mass = torch.zeros(ends[-1], dtype=torch.float64)
        for start, end in zip([0, *ends], ends, strict=False):
            mass[start:end] = sum(w for r, w in clients if r >= end)
        return mass


def _replaced(
    current: Adapter, trained: Iterable[str], new: Callable[[str], LoraPair]
) -> AggregationResult:
    """Return ``current`` with the trained modules replaced; the others stay as they were."""
    modules = list(trained)
    found = dict(zip(modules, in_parallel(new, modules), strict=True))
    return AggregationResult(Adapter({m: found.get(m, old) for m, old in current.pairs.items()}))


def keep_product(total: ProductSum, old: LoraPair, weight: float | Tensor) -> None:
    """Add the current product to a sum, with the weight that was not drawn (one, or by entry)."""
    if bool(torch.as_tensor(weight).any()) and bool(old.A.any()) and bool(old.B.any()):
        total.add(old.A, old.B, weight)


def from_svd(old: LoraPair, svd: SVD, rank: int, divisor: float) -> LoraPair:
    """Return ``U S Vh / divisor`` as a pair of ``rank`` in the shape and at the scale of ``old``.

    The products were summed without the scale, which all updates share by now.
    """
    A, B = svd._replace(S=svd.S / divisor).balanced()
    A = complete(A, old.A.flatten(1), rank)
    return shaped_like(old, A, resize(B, 1, rank))


def shaped_like(old: LoraPair, A: Tensor, B: Tensor) -> LoraPair:
    """Return matrices ``(r, n)`` and ``(m, r)`` as a pair with the axes of ``old``."""
    return replace(
        old, A=A.reshape(-1, *old.A.shape[1:]), B=B.reshape(len(B), -1, *old.B.shape[2:])
    )
