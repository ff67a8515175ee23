"""An adapter of a lower rank that computes as nearly the same as any of that rank can."""

from __future__ import annotations

from strategies.lora.adapter import Adapter
from strategies.lora.lowrank import compact_svd, in_parallel
from strategies.lora.pair import LoraPair


def cut(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """Return the adapter with every module of at most a rank, and the share of energy it keeps.

    Each module's ``s·B A`` is cut by its singular value decomposition, which loses least of all
    matrices of that rank in the Frobenius norm (Eckart and Young, Psychometrika 1936). A
    module of that rank or less stays as it is.

    Parameters
    ----------
    adapter : Adapter
    rank : int
        At least 1.

    Returns
    -------
    Adapter
        Scales and dense tensors are those of ``adapter``.
    float
        Of ``Σ ‖s·B A‖²`` over modules, the part that is left: 1 where nothing is lost.

    Raises
    ------
    ValueError
        If the rank is below 1, or the adapter has no LoRA modules.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if not adapter.pairs:
        raise ValueError("expected an adapter with LoRA modules to cut, got none")
    cut_pairs = in_parallel(lambda pair: _cut(pair, rank), list(adapter.pairs.values()))
    pairs = dict(zip(adapter.pairs, cut_pairs, strict=True))
    total, kept = (
        sum(pair.norm() ** 2 for pair in some.values()) for some in (adapter.pairs, pairs)
    )
    return Adapter(pairs, adapter.dense), min(1.0, kept / total) if total else 1.0


def _cut(pair: LoraPair, rank: int) -> LoraPair:
    if pair.rank <= rank:
        return pair
    A, B = compact_svd(pair.A.flatten(1), pair.B.flatten(1), rank).balanced()
    if not len(A):  # a product of zeros has no singular values; one entry of zeros stands for it
        A, B = pair.A.flatten(1)[:1] * 0, pair.B.flatten(1)[:, :1] * 0
    shape_A = (len(A), *pair.A.shape[1:])
    shape_B = (len(B), B.shape[1], *pair.B.shape[2:])
    return LoraPair(A.reshape(shape_A), B.reshape(shape_B), pair.scale, embedding=pair.embedding)
