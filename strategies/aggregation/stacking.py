"""Rules that are exact because they put a part of the update into the frozen weights.

Their result has a ``base_delta``: an adapter of its own, as large a rank as it needs, to be merged
into the base. How far it may be recompressed is a matter of exactness, never of the
clients' ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from strategies.aggregation.averaging import FactorSum
from strategies.aggregation.base import AggregationResult, Aggregator, Update, register
from strategies.aggregation.product import (
    FlexLoRA,
    ProductState,
    from_svd,
    keep_product,
    shaped_like,
)
from strategies.aggregation.state import State
from strategies.lora import Adapter, LoraPair
from strategies.lora.lowrank import ProductSum, in_parallel


@dataclass
class StackState(State):
    """Stacked products by module."""

    sums: dict[str, ProductSum] = field(default_factory=dict)


@register
class FLoRA(Aggregator[StackState]):
    """Stack all factors into one exact update for the base; every client starts afresh.

    FLoRA, https://arxiv.org/abs/2409.05976 (rule as published): ``A = [p_1 A_1; p_2 A_2; …]`` and
    ``B = [B_1, B_2, …]``, so ``B A = Σ p_k B_k A_k``. The data weights ``p_k`` are in the
    stack. This project's decisions: a client that lacks a module counts as zero there; a stack of
    more rank than ``min(m, n)`` is recompressed without loss; a module that nobody sent stays as
    it was; the fresh factors are PEFT's start (``A`` uniform in ``±1/√n`` and ``B`` zero; for an
    embedding ``A`` zero and ``B`` normal), drawn from ``seed`` and the round.

    Parameters
    ----------
    seed : int, optional
        Seed of the fresh factors (default: that of the run).
    """

    name = "flora"
    unbiased = late = True
    merges_base = True
    supports_dora = False

    def __init__(self, *, seed: int | None = None) -> None:
        self.seed = seed

    def init(self, current: Adapter) -> StackState:
        """Return empty stacks."""
        return StackState(current)

    def add_pairs(self, state: StackState, update: Update, weight: float) -> None:
        """Put every pair onto its module's stack."""
        for module, pair in update.adapter.pairs.items():
            if module not in state.sums:
                state.sums[module] = ProductSum.like(pair.A, pair.B, lossless=True)
            elif not (bool(pair.A.any()) and bool(pair.B.any())):
                continue  # what a late one started from is zero
            state.sums[module].add(pair.A, pair.B, weight)

    def finish_pairs(self, state: StackState) -> AggregationResult:
        """Return fresh factors and, as ``base_delta``, the stacks."""
        seed = self.run_seed if self.seed is None else self.seed
        rng = _generator(seed, self.server_round)
        # Drawn for every module, so that nobody's values depend on who replied.
        fresh = {module: _fresh(old, rng) for module, old in state.current.pairs.items()}
        pairs, delta = dict(state.current.pairs), {}
        mass, share = state.over()
        modules = list(state.sums)
        for module in modules:  # zero after the first round: clients start with B A = 0
            keep_product(state.sums[module], state.current.pairs[module], share * mass)
        stacks = in_parallel(lambda module: state.sums[module].factors(), modules)
        for module, (A, B) in zip(modules, stacks, strict=True):
            pairs[module] = fresh[module]
            if len(A):
                delta[module] = shaped_like(pairs[module], A / mass, B)
        return AggregationResult(Adapter(pairs), Adapter(delta) if delta else None)


@register
class FedMomentum(FlexLoRA):
    """Average the products; the leading terms become the factors, the rest goes into the base.

    FedMomentum, https://arxiv.org/abs/2603.08014 (as one reader reports it): the leading r singular
    values of ``ΔW = Σ p_k s_k B_k A_k`` make the next factors, split evenly, and those after them,
    up to ``energy`` of all, are merged into the frozen weights. With ``energy = 1`` nothing of the
    mean product is lost, as with ``fedex``, and the factors are ordered, as with ``flexlora``.

    Parameters
    ----------
    energy : float (default: 0.9999)
        The part of ``Σ σ²`` that factors and base keep together, above 0 and at most 1.

    Raises
    ------
    ValueError
        If ``energy`` is not in (0, 1].
    """

    name = "fedmomentum"
    unbiased = symmetric = late = True
    merges_base = True

    def __init__(self, *, energy: float = 0.9999) -> None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy: expected a number in (0, 1], got {energy!r}")
        self.energy = energy

    def finish_pairs(self, state: ProductState) -> AggregationResult:
        """Return the leading terms and, as ``base_delta``, those after them."""
        mass, share = state.over()

        def split(module: str) -> tuple[LoraPair, LoraPair | None]:
            old, total = state.current.pairs[module], state.sums[module]
            rank = min(max(old.rank, state.ranks[module]), total.m, total.n)
            keep_product(total, old, share * mass)
            svd = total.svd()
            kept = max(rank, _reaching(svd.S, self.energy))
            rest = svd._replace(
                U=svd.U[:, rank:kept], S=svd.S[rank:kept] / mass, Vh=svd.Vh[rank:kept]
            )
            lead = svd._replace(U=svd.U[:, :rank], S=svd.S[:rank], Vh=svd.Vh[:rank])
            A, B = rest.balanced()
            return from_svd(old, lead, rank, mass), shaped_like(old, A, B) if len(A) else None

        modules = list(state.sums)
        found = dict(zip(modules, in_parallel(split, modules), strict=True))
        pairs = {m: found[m][0] if m in found else old for m, old in state.current.pairs.items()}
        delta = {module: rest for module, (_, rest) in found.items() if rest is not None}
        return AggregationResult(Adapter(pairs), Adapter(delta) if delta else None)


@dataclass
class ResidualState(State):
    """Sums of the factors, and of the products of what was trained away from the start."""

    means: dict[str, FactorSum] = field(default_factory=dict)
    moved: dict[str, ProductSum] = field(default_factory=dict)


@register
class FedEx(Aggregator[ResidualState]):
    """Average the factors, and merge what that loses against the mean product into the base.

    FedEx-LoRA, https://arxiv.org/abs/2410.09432 (rule as published): mean ``A``, mean ``B`` and the
    residual ``Σ p_k s_k B_k A_k − s B̄ Ā``. For unequal ranks a client leaves the entries and
    modules that it lacks as they are (this project's decision): the model moves by exactly the mean
    of what the clients changed in theirs, and entries that few clients hold do not fade. Under
    independent sampling the factors, and the product with what is merged, are unbiased.

    Notes
    -----
    The residual is a covariance, and like one it is summed around a point near the mean, here the
    current factors: ``Σ p (B_k − B₀)(A_k − A₀) − (B̄ − B₀)(Ā − A₀)``. Clients that moved
    little would otherwise leave a small difference of large numbers. What is below the rounding of
    the mean product itself is left out; equal clients have no residual.
    """

    name = "fedex"
    unbiased = symmetric = late = True
    merges_base = True
    supports_dora = False

    def init(self, current: Adapter) -> ResidualState:
        """Return empty sums."""
        return ResidualState(current)

    def add_pairs(self, state: ResidualState, update: Update, weight: float) -> None:
        """Add every pair to the means, and its movement to the products."""
        for module, pair in update.adapter.pairs.items():
            start = state.current.pairs[module]
            if module not in state.means:
                state.means[module] = FactorSum(start.rank)
                state.moved[module] = ProductSum.like(pair.A, pair.B)
            state.means[module].add(pair, weight)
            start = start.with_rank(pair.rank)
            A, B = pair.A.float() - start.A.float(), pair.B.float() - start.B.float()
            state.moved[module].add(A, B, weight)

    def finish_pairs(self, state: ResidualState) -> AggregationResult:
        """Return the mean factors and, as ``base_delta``, the residual at its own rank."""
        pairs, delta = dict(state.current.pairs), {}
        modules = list(state.means)
        found = in_parallel(lambda module: self._divide(state, module), modules)
        for module, (mean, residual) in zip(modules, found, strict=True):
            pairs[module] = mean
            if residual is not None:
                delta[module] = residual
        return AggregationResult(Adapter(pairs), Adapter(delta) if delta else None)

    @staticmethod
    def _divide(state: ResidualState, module: str) -> tuple[LoraPair, LoraPair | None]:
        """Return the mean and the residual of one module."""
        old, sums = state.current.pairs[module], state.means[module]
        divisor, share = state.over_all(sums.mass)
        mean_A, mean_B = sums.blended(divisor, old, share)
        mass, _ = state.over()
        start = old.with_rank(len(sums.mass)).to(torch.float32)
        shift_A, shift_B = mean_A - start.A, mean_B - start.B
        residual = state.moved[module].copy()
        residual.add(shift_A, -shift_B, mass)
        mean = replace(old, A=mean_A, B=mean_B)
        rounding = _rounding(mean_A, mean_B) + _rounding(shift_A, shift_B)
        svd = residual.svd(floor=mass * rounding)
        if len(svd.S) == 0:
            return mean, None
        A, B = svd._replace(S=svd.S / mass).balanced()
        return mean, shaped_like(old, A, B)


def _reaching(S: Tensor, energy: float) -> int:
    """Return how many leading singular values reach a part of ``Σ σ²``."""
    sums = S.double().square().cumsum(0)
    return len(S) if energy == 1 or not len(S) else int((sums < energy * sums[-1]).sum()) + 1


def _rounding(A: Tensor, B: Tensor) -> float:
    """Return what float32 rounding of the factors does to ``B A``, in the Frobenius norm."""
    lengths = A.flatten(1).norm(dim=1) * B.flatten(1).norm(dim=0)
    return torch.finfo(torch.float32).eps * float(lengths.norm())


def _generator(seed: int, server_round: int) -> torch.Generator:
    """Return the generator of one round."""
    (mixed,) = np.random.SeedSequence([seed, server_round]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed))


def _fresh(old: LoraPair, rng: torch.Generator) -> LoraPair:
    """Return the start PEFT gives a pair of these shapes, whose product is zero."""
    A = torch.zeros(old.A.shape)  # on the CPU: the same values whatever the device
    B = torch.zeros(old.B.shape)
    if old.embedding:
        B.normal_(generator=rng)
    else:
        bound = 1 / math.sqrt(old.A[0].numel())
        A.uniform_(-bound, bound, generator=rng)
    return replace(old, A=A.to(old.A.device), B=B.to(old.B.device))
