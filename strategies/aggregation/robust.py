"""What keeps liars among the clients from the result of a rule.

A rule may be protected in two ways. By entry: each client's numbers are replaced by the median, or
a trimmed mean, of all who hold the same entry, so that a rule that takes means of them gets that
centre. By client: whole updates are left out, for what they change in the model. Both need all
updates of a round at once: memory grows with the sum of their sizes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.aggregation.update import Update
from strategies.lora import Adapter, LoraPair
from strategies.lora.lowrank import in_parallel
from strategies.naming import Registry

#: Numbers of each client that are sorted at a time: what stays in a core's cache.
_BLOCK = 16384

Sifted = tuple[list[Update], list[int]]


class Robust(ABC):
    """Base of what makes a rule robust."""

    name: ClassVar[str] = ""
    #: Whether it takes the place of the mean of each number, instead of leaving out clients.
    by_entry: ClassVar[bool] = False

    @abstractmethod
    def sift(self, current: Adapter, updates: Sequence[Update]) -> Sifted:
        """Return the updates to put into the rule instead, and the places of those left out.

        Parameters
        ----------
        current : Adapter
            The global adapter that the round started from.
        updates : sequence of Update
            All of the round, at least one.
        """


ROBUST: Registry[type[Robust]] = Registry()


def make_robust(robust: Robust | str) -> Robust | None:
    """Return what is registered by a name; None for "none".

    Raises
    ------
    ValueError
        If there is no such name; the message lists those that exist.
    """
    if isinstance(robust, Robust):
        return robust
    if robust == "none":
        return None
    return ROBUST.make(robust)


# ----- by entry --------------------------------------------------------------------------------


class Centre(Robust):
    """Base of what gives all holders of an entry the same number, between the extremes."""

    by_entry = True

    @abstractmethod
    def cut(self, holders: int) -> int:
        """Return how many of the largest numbers, and of the smallest, are left out."""

    def sift(self, current: Adapter, updates: Sequence[Update]) -> Sifted:
        """Return the same updates with the centre of their entries; nobody is left out."""
        pairs: list[dict[str, LoraPair]] = [{} for _ in updates]
        dense: list[dict[str, Tensor]] = [{} for _ in updates]

        def put(module: str) -> None:
            have = [k for k, u in enumerate(updates) if module in u.adapter.pairs]
            each = [updates[k].adapter.pairs[module] for k in have]
            at = [_entries(updates[k], module, p.rank) for k, p in zip(have, each, strict=True)]
            A = self._over_holders([p.A for p in each], at, 0)
            B = self._over_holders([p.B for p in each], at, 1)
            for i, k in enumerate(have):
                own = _taken(A, at[i], 0), _taken(B, at[i], 1)
                found[module][k] = replace(each[i], A=own[0], B=own[1])

        found: dict[str, dict[int, LoraPair]] = {module: {} for module in current.pairs}
        in_parallel(put, list(found))
        for module, own in found.items():
            for k, pair in own.items():
                pairs[k][module] = pair
        for key in current.dense:
            have = [k for k, u in enumerate(updates) if key in u.adapter.dense]
            if have:
                centre = self._centre([updates[k].adapter.dense[key] for k in have])
                dense = [d | ({key: centre} if k in have else {}) for k, d in enumerate(dense)]
        parts = zip(updates, pairs, dense, strict=True)
        return [replace(u, adapter=Adapter(p, d)) for u, p, d in parts], []

    def _over_holders(
        self, factors: Sequence[Tensor], at: Sequence[NDArray[np.int64]], axis: int
    ) -> Tensor:
        """Return the centre of every entry that somebody holds, the others zero."""
        if not factors:
            return torch.zeros(0)
        rank = 1 + max(int(index[-1]) for index in at)
        holds = np.zeros((rank, len(at)), bool)
        for k, index in enumerate(at):
            holds[index, k] = True
        shape = list(factors[0].shape)
        shape[axis] = rank
        out = torch.zeros(shape)
        kinds, kind = np.unique(holds, axis=0, return_inverse=True)
        for i, who in enumerate(kinds):
            if who.any():  # entries with the same holders at once
                entries = np.flatnonzero(kind.reshape(-1) == i)
                held = [
                    _taken(factors[int(k)], np.searchsorted(at[int(k)], entries), axis)
                    for k in np.flatnonzero(who)
                ]
                out.index_copy_(axis, torch.from_numpy(entries), self._centre(held))
        return out

    def _centre(self, values: Sequence[Tensor]) -> Tensor:
        """Return the mean of equal places without the largest and the smallest, float32."""
        cut = self.cut(len(values))
        flat = [value.float().flatten() for value in values]
        out = torch.empty_like(flat[0])
        for start in range(0, len(out), _BLOCK):
            rows = [row[start : start + _BLOCK].clone() for row in flat]
            out[start : start + _BLOCK] = _trimmed(rows, cut)
        return out.reshape(values[0].shape)


class Median(Centre):
    """The median of each number over those who hold it; of an even number, between the middle two.

    Coordinate-wise median, Yin et al. 2018, https://arxiv.org/abs/1803.01498 (as published, every
    client counting the same); that it is over the holders of each entry is this project's decision.
    An entry of h holders bears fewer than h/2 liars among them: none of one or two, one of three or
    four, two of five.
    """

    name = "median"

    def cut(self, holders: int) -> int:
        """Return all but the middle one or two."""
        return (holders - 1) // 2


class TrimmedMean(Centre):
    """The mean of each number over those who hold it, without the largest and the smallest ones.

    Yin et al. 2018, https://arxiv.org/abs/1803.01498 (as published, every client counting the
    same); that it is over the holders of each entry, and that the number left out at each end is
    rounded up, is this project's decision. An entry of h holders bears ``⌈liars · h⌉`` liars among
    them, but fewer than h/2.

    Parameters
    ----------
    liars : float (default: 0.2)
        Share of the holders left out at each end, at least 0 and below 0.5.

    Raises
    ------
    ValueError
        If it is outside.
    """

    name = "trimmed-mean"

    def __init__(self, *, liars: float = 0.2) -> None:
        self.liars = _share(liars)

    def cut(self, holders: int) -> int:
        """Return the share of the holders, below half."""
        return min(_some(self.liars, holders), (holders - 1) // 2)


def _trimmed(rows: list[Tensor], cut: int) -> Tensor:
    """Return the mean over rows without the ``cut`` largest and smallest at each place; in place.

    The largest is pushed to one end and the smallest to the other, ``cut`` times: many times as
    fast as a sort along an axis of ten.
    """
    low, high, spare = 0, len(rows), torch.empty_like(rows[0])
    for _ in range(cut):
        for i in range(low, high - 1):
            torch.minimum(rows[i], rows[i + 1], out=spare)
            torch.maximum(rows[i], rows[i + 1], out=rows[i + 1])
            rows[i], spare = spare, rows[i]
        high -= 1
        for i in range(high - 1, low, -1):
            torch.maximum(rows[i], rows[i - 1], out=spare)
            torch.minimum(rows[i], rows[i - 1], out=rows[i - 1])
            rows[i], spare = spare, rows[i]
        low += 1
    total = rows[low]
    for row in rows[low + 1 : high]:
        total.add_(row)
    return total.div_(high - low)


def _entries(update: Update, module: str, rank: int) -> NDArray[np.int64]:
    """Return which entries of the global rank axis an update has, rising."""
    named: Mapping[str, Tensor] = (update.sent.entries if update.sent else None) or {}
    if module not in named:
        return np.arange(rank)
    found: NDArray[np.int64] = named[module].numpy()
    if len(found) != rank:
        raise ValueError(
            f"{module!r} came with rank {rank}, and was sent with {len(found)} drawn entries"
        )
    return found


def _taken(x: Tensor, index: NDArray[np.int64], axis: int) -> Tensor:
    """Return entries of an axis; a view where they follow one another."""
    first = int(index[0])
    if int(index[-1]) - first == len(index) - 1:
        return x.narrow(axis, first, len(index))
    return x.index_select(axis, torch.from_numpy(index))


# ----- by client -------------------------------------------------------------------------------


class NormFilter(Robust):
    """Leave out clients that change the model by far more than the others.

    This project's decision: the change is that of the products, ``s (B_k A_k - B_0 A_0)`` from what
    the client was sent, over all modules, and of all other tensors, in one Euclidean norm. It
    catches scaled updates and loud noise, and no update of usual size, such as one with its
    sign turned round. Fewer than half of the clients may lie, and of two none is ever left out.

    Parameters
    ----------
    factor : float (default: 3.0)
        So many times the median of all norms is the largest that is taken; at least 1. Clients of
        large rank may change more than those of small rank.

    Raises
    ------
    ValueError
        If it is below 1.
    """

    name = "norm-filter"

    def __init__(self, *, factor: float = 3.0) -> None:
        if not (factor >= 1 and math.isfinite(factor)):
            raise ValueError(f"factor: expected a number of at least 1, got {factor!r}")
        self.factor = factor

    def sift(self, current: Adapter, updates: Sequence[Update]) -> Sifted:
        """Return those whose change is not too large."""
        squares = [changes_gram(current, [update]).item() for update in updates]
        norms = np.sqrt(np.maximum(squares, 0.0))
        return _split(updates, norms <= self.factor * np.median(norms))


class Krum(Robust):
    """Leave out the clients whose change of the model is farthest from that of most others.

    Multi-Krum, Blanchard et al., NeurIPS 2017, https://arxiv.org/abs/1703.02757 (as published):
    with f liars among K, each client is given the sum of the squared distances to its ``K - f - 2``
    nearest, and the ``K - f`` of the least sum are averaged. Distances are between changes of the
    products and of all other tensors, as in ``NormFilter``, so that clients of different
    rank can be compared (this project's decision). It always leaves out f, honest ones where nobody
    lies, and it takes clients whose data are unlike all others' for liars.

    Parameters
    ----------
    liars : float (default: 0.2)
        ``f = ⌈liars · K⌉``, at most ``(K - 3) / 2``; at least 0 and below 0.5.

    Raises
    ------
    ValueError
        If it is outside.
    """

    name = "krum"

    def __init__(self, *, liars: float = 0.2) -> None:
        self.liars = _share(liars)

    def sift(self, current: Adapter, updates: Sequence[Update]) -> Sifted:
        """Return those that have most others near them."""
        count = len(updates)
        liars = min(_some(self.liars, count), (count - 3) // 2)
        if liars < 1:
            return list(updates), []
        gram = changes_gram(current, updates)
        norms = np.diagonal(gram)
        distances = np.maximum(norms[:, None] + norms - 2 * gram, 0.0)
        np.fill_diagonal(distances, np.inf)
        sums = np.sort(distances, axis=1)[:, : count - liars - 2].sum(axis=1)
        kept = np.zeros(count, bool)
        kept[np.argsort(sums, kind="stable")[: count - liars]] = True
        return _split(updates, kept)


def changes_gram(current: Adapter, updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return the inner products of what clients change in the model, ``(K, K)``.

    A change is that of all products, ``s (B_k A_k - B_0 A_0)``, and of all other tensors; what a
    client did not send has not changed.
    """

    def of(module: str) -> tuple[list[int], Tensor]:
        have = [k for k, u in enumerate(updates) if module in u.adapter.pairs]
        moved = [_moved(updates[k], current, module) for k in have]
        return have, _product_gram(moved) if moved else torch.zeros(0, 0)

    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for have, gram in in_parallel(of, list(current.pairs)):
        total[np.ix_(have, have)] += gram
    for key, old in current.dense.items():
        have = [k for k, u in enumerate(updates) if key in u.adapter.dense]
        if have:
            start = [_sent(updates[k], current).dense.get(key, old).double() for k in have]
            rows = torch.stack([
                (updates[k].adapter.dense[key].double() - x).flatten()
                for k, x in zip(have, start, strict=True)
            ])  # fmt: skip
            total[np.ix_(have, have)] += rows @ rows.T
    found: NDArray[np.float64] = total.numpy()
    return found


def _moved(update: Update, current: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """Return matrices ``L`` ``(m, 2r)`` and ``R`` ``(2r, n)`` whose product is the change.

    No two of its terms are large and nearly cancel, so that float32 does.
    """
    pair = update.adapter.pairs[module]
    start = _sent(update, current).pairs[module].with_rank(pair.rank).with_scale(pair.scale)
    A, B = pair.A.float().flatten(1), pair.B.float().flatten(1)
    A0, B0 = start.A.float().flatten(1), start.B.float().flatten(1)
    return pair.scale * torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0])


def _sent(update: Update, current: Adapter) -> Adapter:
    return current if update.sent is None else update.sent.adapter


def _product_gram(moved: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the inner products of products ``L R``, formed or not, whichever is less work."""
    ranks = [len(R) for _, R in moved]
    m, n, rank = len(moved[0][0]), moved[0][1].shape[1], sum(ranks)
    # A product that is formed is written and read again: three times the time of its sums.
    if 3 * m * n * (rank + len(ranks) ** 2) < rank**2 * (m + n):
        rows = torch.stack([(L @ R).flatten() for L, R in moved])
        return rows @ rows.T
    L, R = torch.cat([L for L, _ in moved], dim=1), torch.cat([R for _, R in moved])
    each = (L.T @ L).double() * (R @ R.T).double()
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    sums = torch.zeros(len(ranks), rank, dtype=each.dtype).index_add_(0, owner, each)
    return torch.zeros(len(ranks), len(ranks), dtype=each.dtype).index_add_(1, owner, sums)


def _split(updates: Sequence[Update], kept: NDArray[np.bool_]) -> Sifted:
    """Return the updates that are kept, and the places of the others."""
    taken = [update for update, keep in zip(updates, kept, strict=True) if keep]
    return taken, np.flatnonzero(~kept).tolist()


def _share(liars: float) -> float:
    if not 0 <= liars < 0.5:
        raise ValueError(f"liars: expected a share from 0, below 0.5, got {liars!r}")
    return liars


def _some(share: float, count: int) -> int:
    """Return a share of so many, rounded up; what is above by rounding alone is not."""
    return math.ceil(round(share * count, 9))


for _kind in (Median, TrimmedMean, NormFilter, Krum):
    ROBUST.register(_kind)
