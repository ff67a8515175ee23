"""Fed-PLoRA: a client trains some rank-one terms, the others folded into its weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from strategies.aggregation.averaging import keep
from strategies.aggregation.base import AggregationResult, Aggregator, Download, Update, register
from strategies.aggregation.state import State
from strategies.lora import Adapter, LoraPair


@dataclass
class TermState(State):
    """By module: the sums of each term's factors, and the weight of those who trained it."""

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masses: dict[str, Tensor] = field(default_factory=dict)  # float64, (R,)


@register
class Fold(Aggregator[TermState]):
    """Each client trains r of the R rank-one terms, drawn anew each round; the rest it holds fixed.

    Fed-PLoRA, ICLR 2026, https://arxiv.org/abs/2602.16936 (as two readers of it report): the drawn
    terms travel as an adapter at the usual scale, the others beside it, to be merged into the
    client's frozen weights for this message, so that every client computes with the whole model.
    Term j becomes the mean over the clients that trained it, A and B by themselves; what nobody
    drew stays. With equal ranks R it is ``fedit``. This project's decisions: the mean is by data
    weights; modules of one rank share a draw; clients evaluate with the whole adapter; under the
    unbiased estimator of independent sampling a term is divided by the weight that is expected to
    train it, ``Σ a_n r_n / R``, and moves by the changes alone.
    """

    name = "fold"
    unbiased = entrywise = True
    merges_base = True  # on the clients; the server merges nothing
    supports_dora = False
    shares_downloads = False
    sketches = True
    sketch_adds_variance = False
    default_ratio = True

    def download(self, current: Adapter, rank: int, rng: np.random.Generator) -> Download:
        """Return ``rank`` terms drawn at random, and the others to be held fixed."""
        drawn: dict[int, Tensor] = {}
        pairs, fixed, entries = {}, {}, {}
        for module, pair in current.pairs.items():
            if pair.rank not in drawn:
                size = min(rank, pair.rank)
                drawn[pair.rank] = torch.from_numpy(
                    np.sort(rng.choice(pair.rank, size=size, replace=False))
                )
            index = entries[module] = drawn[pair.rank]
            rest = torch.ones(pair.rank, dtype=torch.bool)
            rest[index] = False
            pairs[module] = replace(pair, A=pair.A[index], B=pair.B[:, index])
            if bool(rest.any()):
                fixed[module] = replace(pair, A=pair.A[rest], B=pair.B[:, rest])
        return Download(Adapter(pairs, current.dense), entries, Adapter(fixed) if fixed else None)

    def view(self, current: Adapter, rank: int) -> Adapter:
        """Return the whole adapter."""
        return current

    def init(self, current: Adapter) -> TermState:
        """Return empty sums."""
        return TermState(current)

    def add_pairs(self, state: TermState, update: Update, weight: float) -> None:
        """Add every term that was trained to its sum.

        Raises
        ------
        ValueError
            If the update says not which terms these are and has not the global rank.
        """
        entries = (update.sent.entries if update.sent else None) or {}
        found = {}
        for module, pair in update.adapter.pairs.items():
            rank = state.current.pairs[module].rank
            index = entries.get(module, torch.arange(rank))
            if len(index) != pair.rank:
                raise ValueError(
                    f"fold averages terms, but {module!r} came with rank {pair.rank} and nothing "
                    f"says which of the {rank} they are; give Update.sent"
                )
            found[module] = index
        for module, index in found.items():
            pair, old = update.adapter.pairs[module], state.current.pairs[module]
            if module not in state.sums:
                zeros = torch.zeros_like
                state.sums[module] = (
                    zeros(old.A, dtype=torch.float32),
                    zeros(old.B, dtype=torch.float32),
                )
                state.masses[module] = torch.zeros(old.rank, dtype=torch.float64)
            A, B = state.sums[module]
            A.index_add_(0, index, pair.A.float(), alpha=weight)
            B.index_add_(1, index, pair.B.float(), alpha=weight)
            state.masses[module][index] += weight

    def finish_pairs(self, state: TermState) -> AggregationResult:
        """Divide every term by the weight of those who trained it."""
        pairs: dict[str, LoraPair] = dict(state.current.pairs)
        for module, (A, B) in state.sums.items():
            old, own = pairs[module], state.masses[module]
            divisor = self._expected(state, old.rank, own)
            share = torch.where(divisor > 0, 1.0 - own / divisor, 1.0)
            factor = torch.where(divisor > 0, 1.0 / divisor, 0.0).to(A.dtype)
            A.mul_(factor.reshape(-1, *[1] * (A.dim() - 1)))
            B.mul_(factor.reshape(1, -1, *[1] * (B.dim() - 2)))
            A, B = keep(A, B, old, torch.where(share.abs() < 1e-9, 0.0, share))
            pairs[module] = replace(old, A=A, B=B)
        return AggregationResult(Adapter(pairs))

    @staticmethod
    def _expected(state: TermState, rank: int, own: Tensor) -> Tensor:
        """Return by what each term is divided, float64, ``(R,)``."""
        everybody = state.population
        if everybody is None or everybody.ratio:
            return own
        mass = sum(a * min(r, rank) / rank for r, a in everybody.masses.items())
        return torch.full_like(own, mass / state.unit)
