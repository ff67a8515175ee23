"""Singular values of sums of LoRA products, without the products.

A sum ``Σ w_k B_k A_k`` over clients is one product ``B̂ Â`` of stacked factors, ``B̂`` ``(m, ρ)``
and ``Â`` ``(ρ, n)`` with ``ρ = Σ r_k``. Its SVD follows from the two ρ×ρ Gram matrices, so the
m×n matrix is only formed where ρ comes near ``min(m, n)`` and forming it is cheaper.

Why Gram matrices and not QR: in float64, the Gram matrices of float32 factors carry singular values
down to about 1e-8 of the largest, which is below what float32 factors mean at all. Measured on
two cores (4096×4096, ρ = 248, rank 64): Gram with ``eigh`` 20 ms, error 4e-8 of the norm; QR in
float32 40 ms, 2e-5; QR in float64 57 ms, 4e-8; CholeskyQR2 in float32 23 ms, 1e-5, and it
fails on stacks that repeat a row. ``benchmarks/aggregation.py`` repeats the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

_EPS = torch.finfo(torch.float32).eps
# Flops of a symmetric eigendecomposition of size k, in k³, at the speed of a matrix product.
_EIGH = 25
# Rank entries that are gathered before they are added to a dense sum in one product.
_BLOCK = 256
# Decompositions at a time; each may hold a few float64 copies of its module.
_WORKERS = 16


class SVD(NamedTuple):
    """A truncated singular value decomposition ``U diag(S) Vh``.

    Singular values fall; those that rounding of the float32 input alone can produce are left out,
    so ``len(S)`` is at most the numerical rank, and 0 for a zero matrix. The entry of largest
    magnitude of every column of ``U`` is positive, whatever LAPACK chose.
    """

    U: Tensor  # (m, r)
    S: Tensor  # (r,), float64
    Vh: Tensor  # (r, n)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Return float32 factors ``A = √S Vh`` ``(r, n)`` and ``B = U √S`` ``(m, r)``."""
        root = self.S.sqrt()
        return (root[:, None] * self.Vh).float(), (self.U * root).float()


def compact_svd(
    A: Tensor,
    B: Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    floor: float = 0.0,
) -> SVD:
    """Return the truncated SVD of ``B A``.

    Parameters
    ----------
    A : Tensor
        ``(ρ, n)``.
    B : Tensor
        ``(m, ρ)``.
    rank : int, optional (default: the numerical rank)
        Keep at most this many singular values.
    energy : float, optional
        Keep the fewest leading values whose squares sum to this part of all squares.
    floor : float (default: 0.0)
        Leave out singular values up to this one.

    Notes
    -----
    With ``A Aᵀ = L Lᵀ`` the eigenvectors ``P`` of ``Lᵀ Bᵀ B L`` give ``U = B L P / σ``, and
    ``Vh = Uᵀ B A / σ``. The result is therefore ``U Uᵀ`` times the input: an error in ``U`` costs
    only in second order.
    """
    if cheaper_dense(B.shape[0], A.shape[1], A.shape[0]):
        return dense_svd(B @ A, rank, energy=energy, floor=floor)
    a, b = A.double(), B.double()
    gram_A, gram_B = a @ a.T, b.T @ b
    # Rows of A and columns of B of one length: a big factor beside a small one costs no digits.
    norm_A, norm_B = gram_A.diagonal().sqrt(), gram_B.diagonal().sqrt()
    live = (norm_A > 0) & (norm_B > 0)
    on_A = torch.where(live, (norm_B / norm_A).sqrt(), 0.0)
    on_B = torch.where(live, (norm_A / norm_B).sqrt(), 0.0)
    gram_A, gram_B = on_A[:, None] * gram_A * on_A, on_B[:, None] * gram_B * on_B
    lengths, axes = torch.linalg.eigh(gram_A)
    L = axes * lengths.clamp_min(0).sqrt()
    right = gram_B @ L
    # No singular value below this is more than rounding of the factors.
    noise = _EPS * math.sqrt(max(float(lengths[-1]), 0.0) * float(gram_B.norm()))
    S, P = _leading(torch.linalg.eigh(L.T @ right), rank, energy, max(noise, floor))
    U = b @ (on_B[:, None] * (L @ (P / S)))
    Vh = (on_A[:, None] * (right @ (P / S**2))).T @ a
    return _signed(U, S, Vh)


def dense_svd(
    D: Tensor, rank: int | None = None, *, energy: float | None = None, floor: float = 0.0
) -> SVD:
    """Return the truncated SVD of a matrix ``(m, n)``; options as in ``compact_svd``."""
    if D.shape[0] > D.shape[1]:
        flipped = dense_svd(D.T, rank, energy=energy, floor=floor)
        return _signed(flipped.Vh.T, flipped.S, flipped.U.T)
    d = D.double()
    S, U = _leading(torch.linalg.eigh(d @ d.T), rank, energy, floor)
    return _signed(U, S, (U / S).T @ d)


def cheaper_dense(m: int, n: int, rho: int) -> bool:
    """Tell whether the m×n product costs less than its factors of rank ``rho``.

    Counted in multiplications of the Gram matrices, the eigendecompositions (two of size ρ, or
    one of size ``min(m, n)``) and, for the dense form, of the product itself. For a square matrix
    the border is ρ ≈ 0.8 of its size, where the factors take 1.6 times its memory.
    """
    k = min(m, n)
    compact = rho**2 * (m + n) + 2 * _EIGH * rho**3
    dense = m * n * rho + k * m * n + _EIGH * k**3
    return dense < compact


class ProductSum:
    """A running sum ``Σ w_k B_k A_k`` of one module, exact, in bounded memory.

    Factors are stacked; once the dense sum is cheaper they go into it, so memory stays below about
    ``2 m n`` numbers however many clients there are.

    Parameters
    ----------
    m, n : int
        Shape of the sum.
    lossless : bool (default: False)
        Stack up to rank ``min(m, n)`` in any case: what was added can then be sent as it is.
    """

    def __init__(self, m: int, n: int, *, lossless: bool = False) -> None:
        self.m, self.n, self.lossless = m, n, lossless
        self._A: list[Tensor] = []
        self._B: list[Tensor] = []
        self._dense: Tensor | None = None
        self.rank = 0  # of what is stacked

    @classmethod
    def like(cls, A: Tensor, B: Tensor, *, lossless: bool = False) -> ProductSum:
        """Return an empty sum for factors of these shapes, a convolution's flattened."""
        return cls(B.shape[0], A[0].numel(), lossless=lossless)

    def add(self, A: Tensor, B: Tensor, weight: float | Tensor) -> None:
        """Add ``weight · B A``; copies, so the caller may change its tensors afterwards.

        Parameters
        ----------
        A, B : Tensor
            ``(r, n)`` or ``(r, in, *kernel)``, and ``(m, r)`` or ``(m, r, 1, …)``.
        weight : float or Tensor
            One weight, or one per rank entry ``(r,)``.
        """
        w = weight[:, None].float() if isinstance(weight, Tensor) else weight
        self._A.append(A.flatten(1).float() * w)
        self._B.append(B.flatten(1).to(torch.float32, copy=True))
        self.rank += A.shape[0]
        if self._dense is not None:
            full = self.rank >= _BLOCK
        elif self.lossless:
            full = self.rank > min(self.m, self.n)
        else:
            full = cheaper_dense(self.m, self.n, self.rank)
        if full:
            self._into_dense()

    def copy(self) -> ProductSum:
        """Return a sum that can be added to without changing this one."""
        out = ProductSum(self.m, self.n, lossless=self.lossless)
        out._A, out._B, out.rank = list(self._A), list(self._B), self.rank
        out._dense = None if self._dense is None else self._dense.clone()
        return out

    def svd(
        self, rank: int | None = None, *, energy: float | None = None, floor: float = 0.0
    ) -> SVD:
        """Return the truncated SVD of the sum; options as in ``compact_svd``."""
        if self._dense is not None:
            return dense_svd(self._into_dense(), rank, energy=energy, floor=floor)
        return compact_svd(*self.stacked(), rank, energy=energy, floor=floor)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A``, ``B`` with ``B A`` the sum: the stack, or an SVD of the dense sum."""
        return self.stacked() if self._dense is None else self.svd().balanced()

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return ``Â`` ``(ρ, n)``, with the weights in it, and ``B̂`` ``(m, ρ)``."""
        return torch.cat(self._A), torch.cat(self._B, dim=1)

    def _into_dense(self) -> Tensor:
        """Add what is stacked to the dense sum, and return it."""
        if self._A:
            A, B = self.stacked()
            if self._dense is None:
                self._dense = B @ A
            else:
                self._dense.addmm_(B, A)
            self._A, self._B, self.rank = [], [], 0
        return self._dense if self._dense is not None else torch.zeros(self.m, self.n)


def complete(A: Tensor, like: Tensor, rank: int) -> Tensor:
    """Return ``A`` ``(r, n)`` with rows added up to ``rank``, orthogonal to those it has.

    The new rows are those of ``like`` at the same places, made orthogonal to ``A`` and to each
    other, so that each opens an input direction the others lack. They get length ``1/√3``, which is
    what a row of PEFT's Kaiming-uniform start has. Beside columns of zeros in ``B`` they change
    nothing, and they can be trained, while zeros in both never get a gradient.

    Parameters
    ----------
    A : Tensor
        ``(r, n)`` of independent rows; r may be 0.
    like : Tensor
        ``(any, n)``; rows it lacks count as zeros. Householder's QR completes the basis even then.
    rank : int
        At most n.
    """
    have = A.shape[0]
    if have >= rank:
        return A
    wanted = A.new_zeros(rank - have, A.shape[1], dtype=torch.float64)
    rows = like[have:rank]
    wanted[: len(rows)] = rows
    Q, R = torch.linalg.qr(torch.cat([A.double(), wanted]).T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    new = (Q * sign)[:, have:].T / math.sqrt(3)
    return torch.cat([A, new.to(A.dtype)])


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return ``[work(item) for item in items]``, as many at a time as torch has threads.

    A small ``eigh`` gains nothing from a second thread, and where the cores are busy, as in a
    simulation, its threads wait for each other: measured 25 ms on one thread against 0.1 to 4 s
    on two. So the items are spread over the threads, not the work of one; on idle cores that
    is 1.4 times as fast. The thread count is torch's global one; it is put back at the end.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items), _WORKERS)
    if workers <= 1:
        return [work(item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


def _leading(
    eigen: tuple[Tensor, Tensor], rank: int | None, energy: float | None, floor: float
) -> tuple[Tensor, Tensor]:
    """Return the kept singular values, falling, and their vectors, from ``eigh``'s output."""
    squares, vectors = eigen[0].flip(0).clamp_min(0), eigen[1].flip(1)
    S = squares.sqrt()
    floor = max(floor, 4 * _EPS * float(S[0]))
    keep = int((floor < S).sum())
    if energy is not None:
        part = squares.cumsum(0) / squares.sum()
        keep = min(keep, int((part < energy).sum()) + 1)
    if rank is not None:
        keep = min(keep, rank)
    return S[:keep], vectors[:, :keep]


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> SVD:
    """Turn every singular pair so that the largest entry of its left vector is positive."""
    if len(S) == 0:
        return SVD(U, S, Vh)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True))[0].sign()
    return SVD(U * sign, S, Vh * sign[:, None])
