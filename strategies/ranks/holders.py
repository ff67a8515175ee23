"""Ranks under which no entry of the rank axis is left to a few clients [D].

Rules that average an entry over its holders keep what one client alone trained as large as what
all trained. So the largest rank is given to several: with at least h holders of every entry the
h largest ranks are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.clients import Client
from strategies.ranks.mcda import ranks_for_budget

Array = NDArray[np.float64]
Ranks = NDArray[np.int64]


def pooled_scores(scores: ArrayLike, holders: int) -> Array:
    """Return scores in which the `holders` highest are their mean; ties go to the first client.

    Parameters
    ----------
    scores : array_like, shape (n_clients,)
    holders : int
        With as many as clients, or more, all scores are the same.
    """
    values = np.array(scores, dtype=np.float64)
    if holders > 1 and values.size:
        top = np.lexsort((np.arange(values.size), -values))[:holders]
        values[top] = values[top].mean()
    return values


def with_holders(
    ranks: ArrayLike, scores: ArrayLike, holders: int, high: ArrayLike, least: int = 1
) -> Ranks:
    """Return the ranks with each entry held by at least `holders` clients.

    What is above the `holders`-th largest rank is taken away, and goes to those below it, one entry
    each, the highest scores first, until all are as high.

    Parameters
    ----------
    ranks : array_like of int, shape (n_clients,)
    scores : array_like, shape (n_clients,)
    holders : int
    high : array_like of int, shape (n_clients,)
        What each may have at most.
    least : int (default: 1)
        What everybody has whose device can: these entries are not taken away where weak devices
        lack them.

    Returns
    -------
    ndarray of int, shape (n_clients,)
        Their sum is that of `ranks`, or less where the rest does not make another entry with
        enough holders.
    """
    given: Ranks = np.array(ranks, dtype=np.int64)
    if holders <= 1 or given.size == 0:
        return given
    level = max(least, int(np.sort(given)[-min(holders, given.size)]))
    left = int((given - level).clip(0).sum())
    given = np.minimum(given, level)
    limit = np.minimum(np.asarray(high), level)
    order = np.lexsort((np.arange(given.size), -np.asarray(scores, np.float64)))
    while left and (room := [i for i in order if given[i] < limit[i]]):
        given[room[:left]] += 1
        left -= min(left, len(room))
    return given


def divided(
    scores: Sequence[float],
    total: int,
    min_rank: int,
    max_rank: int,
    caps: ArrayLike,
    holders: int = 1,
) -> tuple[Ranks, str]:
    """Divide a sum of ranks by score; one that the limits do not allow, as near as can be.

    Parameters
    ----------
    scores : Sequence[float]
        One a client, ≥ 0.
    total : int
    min_rank, max_rank : int
    caps : array_like of int
        What each device can hold.
    holders : int (default: 1)
        Every entry is to be held by so many.

    Returns
    -------
    (ndarray of int, str)
        Ranks, and what could not be done as asked; empty: nothing.
    """
    values = np.array(scores)
    high = np.minimum(max_rank, np.asarray(caps))
    low, most = int(np.minimum(min_rank, high).sum()), int(high.sum())
    note = ""
    if total < low:
        note = (
            f"the budget leaves {total} ranks for {len(values)} clients, but min_rank = "
            f"{min_rank} needs {low}: every one gets its minimum"
        )
    elif total > most:
        note = (
            f"the budget has {total} ranks for {len(values)} clients, but max_rank and their "
            f"devices hold {most}: every one gets its maximum"
        )
    total = min(max(total, low), most)
    values = pooled_scores(values, holders)
    ranks = ranks_for_budget(values, total, min_rank, max_rank, high)
    return with_holders(ranks, values, holders, high, min_rank), note


def whole_budget(mean: float, clients: int) -> tuple[int, str]:
    """Return the sum of ranks that a mean allows, and a note where it is not whole."""
    exact = mean * clients
    total = math.floor(exact + 1e-9)
    if abs(exact - total) <= 1e-9:
        return total, ""
    return total, (
        f"a mean rank of {mean:g} over {clients} clients is {exact:g}; "
        f"ranks are whole, so {total} are divided"
    )


def number_of_holders(share: float, clients: int) -> int:
    """Return how many clients a share of them is, rounded up; at least one."""
    return max(1, math.ceil(share * clients - 1e-9))


def caps_of(clients: Sequence[Client], max_rank: int) -> Ranks:
    """Return what each client can have: ``max_rank``, or less where its device says so."""
    return np.array([min(max_rank, client.max_rank or max_rank) for client in clients], np.int64)
