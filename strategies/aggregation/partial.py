"""Rules by which clients train, keep or send only one of the two factors.

FFA and RoLoRA average with the other factor fixed. Where a client holds fewer rank entries, it
leaves the missing ones as they are: then the new product is exactly the current one and the mean
of what the clients changed in theirs, and entries that few clients hold do not fade.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strategies.aggregation.averaging import FactorAverage, FactorState, HolderMean
from strategies.aggregation.base import Update, register
from strategies.aggregation.product import shaped_like
from strategies.lora import Adapter
from strategies.lora.algebra import resize
from strategies.lora.lowrank import ProductSum, complete, in_parallel


def refuse_zero_factors(rule: str, adapter: Adapter) -> None:
    """Refuse modules whose A is zero, as PEFT's embeddings start: they would never learn."""
    for module, pair in adapter.pairs.items():
        if not bool(pair.A.any()):
            raise ValueError(
                f"{rule} starts clients from A with B = 0, but A of {module!r} is zero (PEFT "
                "starts embeddings so): it would never learn; leave it out of the target modules"
            )


class OneFactor(FactorAverage):
    """Base of the rules that average the factor that was trained and leave the other."""

    supports_dora = False  # magnitudes would be averaged over different directions

    def fold(self, state: FactorState, update: Update) -> Update:
        """Return the update at the global scale, the ratio in the factor that was trained."""
        if self.trained() == "B":
            return super().fold(state, update)
        scales = {m: p.scale for m, p in state.current.pairs.items()}
        pairs = {
            m: p
            if p.scale == scales[m]
            else replace(p, A=p.A * (p.scale / scales[m]), scale=scales[m])
            for m, p in update.adapter.pairs.items()
        }
        return replace(update, adapter=Adapter(pairs, update.adapter.dense))

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return the mean of the trained factor and the current other one."""
        sums, old = state.sums[module], state.current.pairs[module]
        mass, share = state.over_all(sums.mass)
        A, B = sums.blended(mass, old, share)
        kept = old.with_rank(len(A))
        return (A, kept.B) if self.trained() == "A" else (kept.A, B)


@register
class FFA(OneFactor):
    """A stays at its seeded start on every client; B is trained, sent and averaged.

    FFA-LoRA, ICLR 2024, https://arxiv.org/abs/2403.12313 (rule as published; for unequal
    ranks the leading slice, this project's decision). Exact, and half the bytes come back.
    """

    name = "ffa"
    unbiased = linear = symmetric = mean_of_all = entrywise = late = True

    def check(self, adapter: Adapter) -> None:
        """Refuse what ``Aggregator.check`` does, and modules whose A is zero."""
        super().check(adapter)
        refuse_zero_factors(self.name, adapter)

    def trained(self) -> str:
        """Return "B"."""
        return "B"


@register
class FedSVD(FFA):
    """Like ``ffa``, but every round starts from an A that is orthonormal and fits the product.

    FedSVD, NeurIPS 2025, https://arxiv.org/abs/2505.12805 (as two readers of it report): after B
    was averaged, ``U Σ Vᵀ = svd(B A)``, ``A = Vᵀ`` and ``B = U Σ``, so that the product stays and A
    follows what was learned. Clients of smaller rank get the leading, largest terms (this project's
    decision); where the product has less rank than the adapter, the spare rows of A are those of
    before, made orthogonal, and their columns of B zero.
    """

    name = "fedsvd"
    unbiased = symmetric = True

    def divided(
        self, state: FactorState, modules: Sequence[str]
    ) -> Iterable[tuple[str, tuple[Tensor, Tensor]]]:
        """Return the new factors of modules, decomposed on as many cores as there are."""
        found = in_parallel(lambda module: self.divide(state, module), modules)
        return zip(modules, found, strict=True)

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return ``Vᵀ`` and ``U Σ`` of the mean B times the current A."""
        A, B = super().divide(state, module)
        old = state.current.pairs[module].with_rank(len(A))
        product = ProductSum.like(A, B)
        product.add(A, B, 1.0)
        rank = min(len(A), product.m, product.n)
        svd = product.svd(rank)
        rows = complete(svd.Vh, old.A.float().flatten(1), rank)
        new = shaped_like(old, resize(rows, 0, len(A)), resize(svd.U * svd.S, 1, len(A)))
        new = new.to(torch.float32)
        return new.A, new.B


@register
class RoLoRA(OneFactor):
    """Odd rounds train and average B with A fixed, even rounds A with B fixed.

    RoLoRA, https://arxiv.org/abs/2409.02346 (rule as published; for unequal ranks the
    leading slice, this project's decision). Exact, and half the bytes come back.
    """

    name = "rolora"
    unbiased = linear = symmetric = mean_of_all = entrywise = True

    def trained(self) -> str:
        """Return "B" in odd rounds and "A" in even ones."""
        return "B" if self.server_round % 2 else "A"


@register
class FedSA(HolderMean):
    """A is averaged and shared; every client keeps a B of its own, which never leaves it.

    FedSA-LoRA, ICLR 2025, https://arxiv.org/abs/2410.01463 (rule as published; for unequal
    ranks each entry of A is averaged over the clients that hold it, this project's
    decision). The server has no B: its own test set sees the frozen model and the shared
    head only; judge this rule by the clients' own evaluation.
    """

    name = "fedsa"
    unbiased = linear = symmetric = entrywise = late = True
    supports_dora = False

    def check(self, adapter: Adapter) -> None:
        """Refuse what ``Aggregator.check`` does, and modules whose A is zero."""
        super().check(adapter)
        refuse_zero_factors(self.name, adapter)

    def uploaded(self) -> str:
        """Return "A"; B is trained but stays."""
        return "A"

    def downloaded(self) -> str:
        """Return "A"."""
        return "A"

    def divide(self, state: FactorState, module: str) -> tuple[Tensor, Tensor]:
        """Return the holders' mean of A and the current B."""
        A, B = super().divide(state, module)
        return A, state.current.pairs[module].with_rank(B.shape[1]).B
