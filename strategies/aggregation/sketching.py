"""FSLoRA: every client trains a random part of the global adapter's rank entries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from strategies.aggregation.base import AggregationResult, Aggregator, Download, Update, register
from strategies.aggregation.state import State
from strategies.lora import Adapter, LoraPair


@dataclass
class SketchState(State):
    """Weighted sums of what changed at the sketched entries, by module."""

    sum_a: dict[str, Tensor] = field(default_factory=dict)
    sum_b: dict[str, Tensor] = field(default_factory=dict)


@register
class FSLoRA(Aggregator[SketchState]):
    """Send a client k of the R rank entries, drawn anew each round; add what it changed.

    FSLoRA, https://arxiv.org/abs/2501.19389 (rule as published). The sketch is
    ``S = diag(e)`` with ``e_j = R/k`` on the drawn set, so ``E[S] = I``: the client trains
    ``B[:, I], A[I, :]`` at scale ``s·R/k``. The server adds the weighted changes at those
    entries, zero elsewhere, divided over ALL participants. One set serves A and B of a
    module; modules of one rank share it. Clients evaluate with the whole adapter, for a
    sketch of it is not the model (this project's decision).

    Parameters
    ----------
    ratio : float (default: 1.0)
        A client of rank r trains ``k = max(1, round(ratio · r))`` entries. Leave it at 1 where
        the sampling plans ``k`` itself.

    Raises
    ------
    ValueError
        If ``ratio`` is not in (0, 1].
    """

    name = "fslora"
    unbiased = entrywise = True
    supports_dora = False
    shares_downloads = False
    sketches = True

    def __init__(self, *, ratio: float = 1.0) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected a number in (0, 1], got {ratio!r}")
        self.ratio = ratio

    def check(self, adapter: Adapter) -> None:
        """Refuse what ``Aggregator.check`` does, ``lora_bias``, and modules of different rank.

        Raises
        ------
        ValueError
            Sketches of different modules would have different scales, and a message carries one.
        """
        super().check(adapter)
        if any(key.endswith(".lora_B.bias") for key in adapter.dense):
            raise ValueError(
                "fslora trains a sketch at a scale of its own, which a bias of lora_B (lora_bias) "
                "would be multiplied by as well; train without it or use another rule"
            )
        if len(set(adapter.ranks.values())) > 1:
            raise ValueError(
                "fslora needs one rank for all modules, got "
                f"{sorted(set(adapter.ranks.values()))}; leave out rank_pattern"
            )

    def download(self, current: Adapter, rank: int, rng: np.random.Generator) -> Download:
        """Return a random block of ``rank`` entries at its scale."""
        drawn: dict[int, Tensor] = {}
        pairs, entries = {}, {}
        for module, pair in current.pairs.items():
            k = min(max(1, round(self.ratio * rank)), pair.rank)
            if pair.rank not in drawn:
                chosen = np.sort(rng.choice(pair.rank, size=k, replace=False))
                drawn[pair.rank] = torch.from_numpy(chosen)
            index = entries[module] = drawn[pair.rank]
            pairs[module] = replace(
                pair, A=pair.A[index], B=pair.B[:, index], scale=pair.scale * pair.rank / k
            )
        return Download(Adapter(pairs, current.dense), entries)

    def view(self, current: Adapter, rank: int) -> Adapter:
        """Return the whole adapter."""
        return current

    def init(self, current: Adapter) -> SketchState:
        """Return empty sums."""
        return SketchState(current)

    def fold(self, state: SketchState, update: Update) -> Update:
        """Return the update at the scale it was sent with, which its changes belong to."""
        sent = update.sent or Download(state.current)
        scales = {module: pair.scale for module, pair in sent.adapter.pairs.items()}
        return replace(update, adapter=update.adapter.with_scale(scales))

    def add_pairs(self, state: SketchState, update: Update, weight: float) -> None:
        """Add the weighted changes at the update's entries.

        Raises
        ------
        ValueError
            If the update says not what it started from and has not the global rank.
        """
        sent = update.sent or Download(state.current)
        for module, pair in update.adapter.pairs.items():
            if pair.rank != sent.adapter.pairs[module].rank:
                raise ValueError(
                    f"fslora adds changes, but {module!r} came with rank {pair.rank} and was sent "
                    f"with {sent.adapter.pairs[module].rank}; give Update.sent"
                )
        for module, pair in update.adapter.pairs.items():
            start, old = sent.adapter.pairs[module], state.current.pairs[module]
            if module not in state.sum_a:
                state.sum_a[module] = torch.zeros_like(old.A, dtype=torch.float32)
                state.sum_b[module] = torch.zeros_like(old.B, dtype=torch.float32)
            index = torch.arange(old.rank) if sent.entries is None else sent.entries[module]
            moved_A, moved_B = pair.A.float() - start.A.float(), pair.B.float() - start.B.float()
            state.sum_a[module].index_add_(0, index, moved_A, alpha=weight)
            state.sum_b[module].index_add_(1, index, moved_B, alpha=weight)

    def finish_pairs(self, state: SketchState) -> AggregationResult:
        """Add the mean change to the current adapter."""
        mass, _ = state.over()  # changes, not values: nothing is left for the current adapter
        pairs: dict[str, LoraPair] = {}
        for module, old in state.current.pairs.items():
            if module not in state.sum_a:
                pairs[module] = old
                continue
            A = old.A.float() + state.sum_a[module] / mass
            B = old.B.float() + state.sum_b[module] / mass
            pairs[module] = replace(old, A=A, B=B)
        return AggregationResult(Adapter(pairs))
