"""The global model of a run: the adapter, and what was put into the base and taken out of it.

Clients may be fresh processes every round, so a rule that merges into the frozen weights
(``flora``, ``fedex``) cannot count on their memory. The server owns the sum of all merges
and sends it along; in a record its keys carry the prefix ``merged.``. An adapter that starts from
factors of the frozen weights (PiSSA, OLoRA) has them taken out of these; they carry ``start.``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from strategies.lora import Adapter, LoraPair
from strategies.lora.lowrank import ProductSum

MERGED = "merged."
START = "start."


@dataclass(frozen=True)
class GlobalModel:
    """An adapter and what goes with it; the model is ``W0 + merged + adapter - start``.

    Parameters
    ----------
    adapter : Adapter
    merged : Adapter
        What was merged into the frozen weights (default: nothing).
    start : Adapter
        What the adapter was when it began, if that was not zero (default: nothing). Its entries go
        with those of the adapter: who holds r of these does without r of the start's, the first r,
        so that every rank begins with the model as it was loaded.
    """

    adapter: Adapter
    merged: Adapter = field(default_factory=lambda: Adapter({}))
    start: Adapter = field(default_factory=lambda: Adapter({}))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scale: float, *, check_finite: bool = True
    ) -> GlobalModel:
        """Read adapter keys, and those with the prefixes ``merged.`` and ``start.``.

        Raises
        ------
        AdapterError
            If either part cannot be used.
        """
        own = {k: t for k, t in tensors.items() if not k.startswith((MERGED, START))}
        merged, start = (
            {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            for prefix in (MERGED, START)
        )
        return cls(
            Adapter.from_state_dict(own, scale, check_finite=check_finite),
            Adapter.from_state_dict(merged, 1.0, check_finite=check_finite),
            Adapter.from_state_dict(start, 1.0, check_finite=check_finite),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the inverse of ``from_tensors``."""
        beside = {MERGED: self.merged, START: self.start}
        return self.adapter.to_state_dict() | {
            prefix + key: tensor
            for prefix, part in beside.items()
            for key, tensor in part.with_scale(1.0).to_state_dict().items()
        }

    def merging(self, delta: Adapter | None) -> GlobalModel:
        """Return the model with one more delta merged into the base, exactly."""
        if delta is None:
            return self
        return replace(self, merged=add_deltas([self.merged, delta], scale=1.0))

    def combined(self) -> Adapter:
        """Return one adapter with the effect of both parts, for evaluation and export.

        Its rank is the sum of both ranks, or ``min(m, n)`` if that is less.
        """
        frozen = self.frozen(self.adapter)
        if not frozen.pairs:
            return self.adapter
        return Adapter(add_deltas([self.adapter, frozen]).pairs, self.adapter.dense)

    def frozen(self, held: Adapter) -> Adapter:
        """Return what the frozen weights of who holds ``held`` have more than the loaded ones."""
        begun = {
            module: pair.with_rank(min(pair.rank, held.pairs[module].rank))
            for module, pair in self.start.pairs.items()
            if module in held.pairs
        }
        if not begun:
            return self.merged
        taken = Adapter({module: replace(pair, B=-pair.B) for module, pair in begun.items()})
        return add_deltas([self.merged, taken]) if self.merged.pairs else taken


def add_deltas(adapters: Iterable[Adapter], scale: float | None = None) -> Adapter:
    """Return the exact sum of the deltas of several adapters, without dense tensors.

    Parameters
    ----------
    adapters : Iterable[Adapter]
        A module may be missing in some.
    scale : float, optional
        Scale of the result (default: that of the first adapter that has the module).
    """
    sums: dict[str, ProductSum] = {}
    first: dict[str, LoraPair] = {}
    for adapter in adapters:
        for module, pair in adapter.pairs.items():
            if module not in sums:
                sums[module] = ProductSum.like(pair.A, pair.B, lossless=True)
                first[module] = pair
            sums[module].add(pair.A, pair.B, pair.scale)
    pairs = {}
    for module, total in sums.items():
        A, B = total.factors()
        old = first[module]
        s = old.scale if scale is None else scale
        shape_A = (len(A), *old.A.shape[1:])
        shape_B = (len(B), B.shape[1], *old.B.shape[2:])
        if not len(A):  # a zero sum has no factors; keep a pair of rank 1
            A, B = torch.zeros(1, A.shape[1]), torch.zeros(len(B), 1)
            shape_A, shape_B = (1, *old.A.shape[1:]), (len(B), 1, *old.B.shape[2:])
        pairs[module] = LoraPair(
            A.reshape(shape_A), (B / s).reshape(shape_B), s, embedding=old.embedding
        )
    return Adapter(pairs)
