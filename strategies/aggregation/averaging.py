"""Rules that average the factors A and B themselves.

They differ in one thing: by what the sum over clients of entry ``j`` of the rank axis is
divided. All of them stream: one running sum, whatever the number of clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from strategies.aggregation.aligning import turned
from strategies.aggregation.base import (
    LARGEST_WEIGHT,
    AggregationResult,
    Aggregator,
    Update,
    register,
)
from strategies.aggregation.population import entry_mass
from strategies.aggregation.state import State
from strategies.lora import Adapter, AdapterError, LoraPair
from strategies.lora.algebra import resize
from strategies.lora.lowrank import in_parallel


class FactorSum:
    """Weighted sums of one module's factors, and the weight behind each rank entry.

    Parameters
    ----------
    rank : int
        Entries at the start; an update with more widens the sums.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self._weights: dict[int, float] = {}  # by rank: cheaper than a tensor for each update

    def add(self, pair: LoraPair, weight: float) -> None:
        """Add ``weight · pair`` to the leading entries, in one pass over the memory."""
        self.rank = max(self.rank, pair.rank)
        self.A = _add_leading(self.A, pair.A, weight, 0, self.rank)
        self.B = _add_leading(self.B, pair.B, weight, 1, self.rank)
        self._weights[pair.rank] = self._weights.get(pair.rank, 0.0) + weight

    @property
    def mass(self) -> Tensor:
        """The weight of the clients that hold each entry, float64, ``(rank,)``."""
        return entry_mass(self._weights, self.rank)

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return both sums, entry ``j`` of the rank axis multiplied by ``factor[j]``; in place."""
        if self.A is None or self.B is None:
            raise RuntimeError("nothing was added yet")
        return self.A.mul_(_along(factor, self.A, 0)), self.B.mul_(_along(factor, self.B, 1))

    def blended(self, divisor: Tensor, old: LoraPair, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``sum / divisor + share · old`` for every entry of the rank axis; in place.

        Where the divisor is 0 there is no sum.
        """
        A, B = self.scaled(torch.where(divisor > 0, 1.0 / divisor, 0.0))
        return keep(A, B, old, share)


def _add_leading(total: Tensor | None, x: Tensor, weight: float, axis: int, size: int) -> Tensor:
    """Add ``weight · x`` to the leading entries of ``axis`` of a float32 sum of that size."""
    if total is None:
        return resize(x.to(torch.float32) * weight, axis, size)
    total = resize(total, axis, size)
    resize(total, axis, x.shape[axis]).add_(x, alpha=weight)  # a view of the leading entries
    return total


def keep(A: Tensor, B: Tensor, old: LoraPair, share: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``share[j]`` of the current entry ``j`` to both factors, in place."""
    if bool(share.any()):
        old = old.with_rank(len(share))
        A.addcmul_(old.A.to(A.dtype), _along(share, A, 0))
        B.addcmul_(old.B.to(B.dtype), _along(share, B, 1))
    return A, B


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return ``values`` in the type of ``x`` and so shaped that they run along its ``axis``."""
    return values.to(x.dtype).reshape(*[1] * axis, -1, *[1] * (x.dim() - 1 - axis))


@dataclass
class FactorState(State):
    """Factor sums by module; the others only for the rules that have a use for them."""

    sums: dict[str, FactorSum] = field(default_factory=dict)
    donated: dict[str, FactorSum] = field(default_factory=dict)  # what is replicated
    highest: dict[str, int] = field(default_factory=dict)  # the largest rank so far
    norms: float = 0.0


class FactorAverage(Aggregator[FactorState]):
    """Base of the rules that average factors: streaming sums, then one division."""

    def init(self, current: Adapter) -> FactorState:
        """Return empty sums."""
        return FactorState(current)

    def add_pairs(self, state: FactorState, update: Update, weight: float) -> None:
        """Add every pair to its module's sums."""
        _accumulate(state, state.sums, update, weight)

    def finish_pairs(self, state: FactorState) -> AggregationResult:
        """Divide the sums."""
        pairs = dict(state.current.pairs)  # what nobody trained this round stays
        for module, (A, B) in self.divided(state, list(state.sums)):
            pairs[module] = replace(pairs[module], A=A, B=B)
        return AggregationResult(Adapter(pairs))

    def divided(
        self, state: FactorState, modules: Sequence[str]
    ) -> Iterable[tuple[str, tuple[Tensor, Tensor]]]:
        """Return the new factors of modules, one after the other."""
        return ((module, self.divide(state, module)) for module in modules)

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return the new factors of one module: the sums over the weight of all clients."""
        sums, old = state.sums[module], state.current.pairs[module]
        mass, share = state.over()
        like = sums.mass
        return sums.blended(torch.full_like(like, mass), old, torch.full_like(like, share))


class Aligning(FactorAverage):
    """Base of the averages of both factors that can turn each client's towards what it was sent.

    FedRot-LoRA, https://arxiv.org/abs/2602.23638 (as published, official code read): the product
    of every client stays as it is, and its A, in even rounds, or its B, in odd ones, comes as near
    as a rotation can bring it to the one it started from; not in the first round, when B was zero.
    For unequal ranks within the entries that the client holds (this project's decision).

    Parameters
    ----------
    align : bool or float (default: False)
        Whether to; a number between 0 and 1 turns a part of the way (its soft form).

    Raises
    ------
    ValueError
        If ``align`` is outside 0 to 1.
    """

    def __init__(self, *, align: bool | float = False) -> None:
        if not isinstance(align, bool | int | float) or not 0 <= align <= 1:
            raise ValueError(f"align: expected true, false or a number from 0 to 1, got {align!r}")
        self.align = float(align)
        if self.align:  # no more the mean of the numbers that were sent
            self.linear = self.mean_of_all = self.late = False  # type: ignore[misc]

    def fold(self, state: FactorState, update: Update) -> Update:
        """Return the update at the global scale, turned towards what its client was sent."""
        update = super().fold(state, update)
        if not self.align or self.server_round <= 1:
            return update
        sent = update.sent.adapter if update.sent else state.current
        by: Literal["A", "B"] = "B" if self.server_round % 2 else "A"

        def turn(module: str) -> LoraPair:
            pair = update.adapter.pairs[module]
            towards = sent.pairs[module].with_rank(pair.rank)
            return turned(pair, towards, by=by, strength=self.align)

        modules = list(update.adapter.pairs)
        pairs = dict(zip(modules, in_parallel(turn, modules), strict=True))
        return replace(update, adapter=Adapter(pairs, update.adapter.dense))


def _accumulate(
    state: FactorState, sums: dict[str, FactorSum], update: Update, weight: float
) -> None:
    for module, pair in update.adapter.pairs.items():
        if module not in sums:
            sums[module] = FactorSum(state.current.pairs[module].rank)
        sums[module].add(pair, weight)


@register
class FedIT(Aligning):
    """Mean of A and mean of B over clients of one equal rank.

    FedIT, https://arxiv.org/abs/2305.05644 (rule as published). The mean of factors is not the mean
    of the products ``B A``; ``flexlora`` gives that.

    Raises
    ------
    AdapterError
        From ``add``, if a rank differs from the global one.
    """

    name = "fedit"
    unbiased = linear = symmetric = mean_of_all = entrywise = late = keeps_start = True
    equal_ranks = True

    def add_pairs(self, state: FactorState, update: Update, weight: float) -> None:
        """Add the update if its ranks are the global ones."""
        ranks = state.current.ranks
        problems = [
            f"rank {r} for {module!r}, but the global rank is {ranks[module]}"
            for module, r in update.adapter.ranks.items()
            if r != ranks[module]
        ]
        missing = [f"module {m!r} is missing" for m in ranks if m not in update.adapter.pairs]
        if problems or missing:
            raise AdapterError(
                [*problems, *missing], "fedit averages equal ranks only (use another aggregation)"
            )
        super().add_pairs(state, update, weight)


@register
class ZeroPadding(Aligning):
    """Pad every A and B with zeros to the largest rank, then average over ALL clients.

    The padding of HetLoRA, https://arxiv.org/abs/2401.06432 (rule as published). A row that few
    clients hold is divided by the weight of all: what high-rank clients learned is
    diluted. Here as the baseline that the other rules repair.
    """

    name = "zero-padding"
    unbiased = linear = symmetric = mean_of_all = entrywise = late = True


@register
class HetLoRA(ZeroPadding):
    """Zero padding, but clients weigh by the size of their update instead of their data.

    HetLoRA, https://arxiv.org/abs/2401.06432 (weights as published): client k weighs
    ``‖s_k B_k A_k‖_F``, here over all its modules together, and tensors that are not LoRA
    pairs keep their data weights (both this project's decisions). The other half of
    HetLoRA, shrinking ranks, is the rank policy ``self-pruning``.
    """

    name = "hetlora"
    symmetric = entrywise = True
    sampling_refusal = (
        "it weighs clients by the norms of their updates, and those of clients that were not "
        "drawn are unknown; use zero-padding or rbla"
    )

    def add_pairs(self, state: FactorState, update: Update, weight: float) -> None:
        """Add the update with its norm as weight."""
        norm = math.sqrt(sum(pair.norm() ** 2 for pair in update.adapter.pairs.values()))
        if not norm <= LARGEST_WEIGHT:
            raise ValueError(f"the norm of the update is {norm:g}, expected up to 1e18")
        state.norms += norm
        super().add_pairs(state, update, norm)

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return the sums over the norms of all clients."""
        sums = state.sums[module]
        if state.norms == 0:  # everybody sent B = 0; there is nothing to tell them apart
            kept = state.current.pairs[module].with_rank(len(sums.mass))
            return kept.A, kept.B
        return sums.scaled(torch.full_like(sums.mass, 1.0 / state.norms))


class HolderMean(FactorAverage):
    """Average entry j over the clients that hold it; without holders it stays as it was.

    Under independent sampling the divisor is by default the weight of the holders that take part
    (this project's decision): few clients may hold an entry, and then the weight of all of
    them is far from that of the draw.
    """

    default_ratio = mean_of_holders = True

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return the new factors of one module: the sums over the weight of the holders."""
        sums, old = state.sums[module], state.current.pairs[module]
        mass, share = state.over_holders(sums.mass)
        return sums.blended(mass, old, share)


@register
class RBLA(Aligning, HolderMean):
    """Average each entry of the rank axis over the clients that hold it.

    RBLA, https://arxiv.org/abs/2408.08699 (rule as published): weights are renormalised
    over the holders, A and B separately. An entry that no client of the round holds stays unchanged
    (this project's decision).
    """

    name = "rbla"
    unbiased = linear = symmetric = entrywise = late = keeps_start = True


@register
class Replication(Aligning, HolderMean):
    """Replicate missing entries from the clients that hold them, then average over all.

    Byun & Lee, https://arxiv.org/abs/2406.17477 (as reported by a reader of the paper; the
    matrix form and more than two rank levels are this project's decision). With ``H`` the
    clients that hold entry ``j``, the others' entry is
    ``Σ_{k∈H} w_k A_k[j] / Σ_{k∈H} w_k``. With data weights ``w_k = p_k`` the result equals
    ``rbla`` exactly; ``holder_weights="quality"`` makes them differ. Entries without
    holders stay unchanged (this project's decision).

    Parameters
    ----------
    holder_weights : "data" or "quality" (default: "data")
        What ``w_k`` is: the data weight, or the quality each update reports.
    donors : "holders" or "highest" (default: "holders")
        Whose entries are replicated: those of all who hold them, or, as the code of RBLA's author
        reads (a second reading of the same source), those of the clients of the module's largest
        rank in the round alone. With two ranks both are the same.
    align : bool or float (default: False)
        As in ``Aligning``.

    Raises
    ------
    ValueError
        If an option is none of these; from ``add``, if quality weights are asked for and an
        update has none above 0.
    """

    name = "replication"
    unbiased = linear = symmetric = entrywise = late = keeps_start = True

    def __init__(
        self,
        *,
        holder_weights: Literal["data", "quality"] = "data",
        donors: Literal["holders", "highest"] = "holders",
        align: bool | float = False,
    ) -> None:
        super().__init__(align=align)
        if holder_weights not in ("data", "quality"):
            raise ValueError(
                f"holder_weights: expected 'data' or 'quality', got {holder_weights!r}"
            )
        if donors not in ("holders", "highest"):
            raise ValueError(f"donors: expected 'holders' or 'highest', got {donors!r}")
        self.holder_weights, self.donors = holder_weights, donors
        self.needs_quality = holder_weights == "quality"
        if self.needs_quality or donors == "highest":  # what is replicated is no sum by weight
            self.late = False  # type: ignore[misc]
        if self.needs_quality:
            self.sampling_refusal = (
                "holder_weights = 'quality' weighs clients by what they report, and the quality "
                "of clients that were not drawn is unknown; use holder_weights = 'data'"
            )
        elif donors == "highest":
            self.sampling_refusal = (
                "donors = 'highest' replicates from the largest rank of a round, and which that "
                "is depends on who was drawn; use donors = 'holders'"
            )

    def add_pairs(self, state: FactorState, update: Update, weight: float) -> None:
        """Add the update; with quality weights, to a second set of sums as well."""
        if self.holder_weights == "quality":
            if update.quality is None or not 0 < update.quality <= LARGEST_WEIGHT:
                raise ValueError(
                    f"holder_weights = 'quality' needs a quality above 0, got {update.quality!r}"
                )
            if self.donors == "holders":
                _accumulate(state, state.donated, update, update.quality)
        if self.donors == "highest":
            self._donate(state, update, update.quality if self.needs_quality else weight)
        super().add_pairs(state, update, weight)

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return the mean over all clients after replication."""
        if self.holder_weights == "data" and self.donors == "holders":
            return super().divide(state, module)
        sums, donated = state.sums[module], state.donated[module]
        held = sums.mass > 0
        own_A, own_B = sums.scaled(torch.full_like(sums.mass, 1.0 / state.total))
        share = torch.where(held, (state.total - sums.mass) / state.total / donated.mass, 0.0)
        replica_A, replica_B = donated.scaled(share)
        A, B = own_A + replica_A, own_B + replica_B
        return keep(A, B, state.current.pairs[module], (~held).double())

    @staticmethod
    def _donate(state: FactorState, update: Update, weight: float | None) -> None:
        """Sum the pairs of the largest rank so far, which forgets those of smaller ones."""
        for module, pair in update.adapter.pairs.items():
            known = state.donated.get(module)
            highest = state.highest.get(module, 0)
            if known is None or pair.rank > highest:
                state.donated[module] = known = FactorSum(state.current.pairs[module].rank)
                state.highest[module] = highest = pair.rank
            if pair.rank == highest and weight is not None:
                known.add(pair, weight)
