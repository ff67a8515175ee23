"""The planner's two searches: exact for a few clients, with sampled sets for many [D].

Both use that ``E[T]`` is linear in each single ``q``: with ``c`` the marginal cost of a client
(the seconds it adds to a round, ``E[T(S ∪ n) − T(S ∖ n)]``) and ``v = a² φ``, the total is
``(A + c q) / (β' − v / q)`` in its probability alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.wallclock.bandwidth import batch_round_seconds
from strategies.wallclock.objective import Choice, Objective

Array = NDArray[np.float64]
Point = tuple[Array, Choice]

_TOLERANCE = 1e-10
_MAX_SWEEPS = 200
_SCALES = (0.4, 0.75, 1.0, 1.3, 2.2)
_MAX_ROUNDS = 20
_MIN_STRIDE = 0.1
_DEADLINES = (0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.995)
_WORTHWHILE = 1e-4
_LEAST_UPLOAD = 1e-7  # beside computing


def coordinate_search(objective: Objective, q: Array, choice: Choice, q_min: float) -> Point:
    """Improve one client after the other, probability and rank together, until nothing changes.

    In one probability the total has a single minimum,
    ``q = v/β' + √((v/β')² + A v / (c β'))``, clipped to ``[q_min, 1]`` [derived, checked]; each
    rank is tried with its own. For the exact objective only: it enumerates all sets.
    """
    q, choice = q.copy(), choice.copy()
    n = objective.n
    sets = objective.sets(q)[0]
    absent = [np.flatnonzero(~sets[:, i]) for i in range(n)]
    cache: dict[tuple[int, bytes], tuple[Array, Array]] = {}
    best = objective.total(q, choice)
    for _ in range(_MAX_SWEEPS):
        for i in range(n):
            others = np.arange(n) != i
            key = (i, choice[others].tobytes())
            if key not in cache:
                cache[key] = _with_and_without(objective, choice, i, sets[absent[i]])
            without, along = cache[key]
            probability = np.where(sets[absent[i]], q, 1 - q)[:, others].prod(axis=1)
            base = probability @ without
            cost = probability @ along - base
            variance = objective.variance[i]
            left = objective.bracket(q, choice) + variance[choice[i]] / q[i]
            candidates = _minimum(base, cost, variance, left, q_min)
            bracket = left - variance / candidates
            usable = np.where(bracket > 0, bracket, 1.0)
            totals = np.where(bracket > 0, (base + cost * candidates) / usable, np.inf)
            rank = int(totals.argmin())
            if np.isfinite(totals[rank]):
                q[i], choice[i] = candidates[rank], rank
        total = objective.total(q, choice)
        if not total < best * (1 - _TOLERANCE):
            total, target, option = deadline_move(objective, q, choice, q_min)
            if not total < best * (1 - _TOLERANCE):
                break
            q, choice = target.copy(), option.copy()
        best = total
    return q, choice


def _with_and_without(
    objective: Objective, choice: Choice, client: int, sets: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Return the times of `sets` without a client (sets,), and with it (sets, options)."""
    without = objective.set_seconds(sets, choice)
    joined = sets.copy()
    joined[:, client] = True
    columns = []
    for option in range(objective.options.shape[1]):
        choice = choice.copy()
        choice[client] = option
        columns.append(objective.set_seconds(joined, choice))
    return without, np.column_stack(columns)


def _minimum(base: float, cost: Array, variance: Array, left: float, q_min: float) -> Array:
    """Minimise ``(base + cost q) / (left − variance / q)`` over ``[q_min, 1]``."""
    if left <= 0:
        return np.ones_like(cost)
    # With a long idle time a client may make rounds shorter: then always ask it.
    helps = cost <= 0
    ratio = variance / left
    square = ratio**2 + base * ratio / np.where(helps, 1.0, cost)
    q: Array = np.where(helps, 1.0, np.clip(ratio + np.sqrt(square), q_min, 1.0))
    return q


def marginal_search(objective: Objective, q: Array, choice: Choice, q_min: float) -> Point:
    """Move all clients at once along their marginal costs, as long as the score improves.

    With ``E[T]`` replaced by its tangent each client minimises ``c q / λ + v / q`` over its
    probability and ranks, so ``q = √(λ v / c)``; the score itself chooses the level ``λ`` about
    its first-order value ``E[T] / (β − Σ v / q)``. For many clients: a step costs about as much
    as some ten scores.
    """
    best, stride = objective.total(q, choice), 1.0
    for _ in range(_MAX_ROUNDS):
        objective.look(q, choice)
        if objective.luck is not None:  # what it is worth, with what is lost now
            best = objective.total(q, choice)
            if not np.isfinite(best):
                break
        cost = marginal_seconds(objective, q, choice)
        level = objective.round_seconds(q, choice) / objective.bracket(q, choice)
        steps = []
        for scale in _SCALES:
            with np.errstate(over="ignore"):  # of what costs nothing
                wanted = np.sqrt(scale * level * objective.variance / cost)
            candidates = np.clip(wanted, q_min, 1.0)
            worth = cost * candidates / (scale * level) + objective.variance / candidates
            option = worth.argmin(axis=1)
            if stride < 1:
                # All at once went too far: change the ranks only where it matters most.
                gain = objective.at(worth, choice) - objective.at(worth, option)
                option = np.where(gain >= np.quantile(gain, 1 - stride), option, choice)
            target = objective.at(candidates, option) ** stride * q ** (1 - stride)
            target = np.clip(target, q_min, 1.0)
            steps.append((objective.total(target, option), target, option))
        total, target, option = min(steps, key=lambda step: step[0])
        gained = 1 - total / best
        if total < best:
            best, q, choice = total, target, option
        if gained < _WORTHWHILE:
            stride /= 2
            if stride < _MIN_STRIDE:
                total, target, option = deadline_move(objective, q, choice, q_min)
                if total >= best * (1 - _WORTHWHILE):
                    break
                best, q, choice, stride = total, target, option, 1.0
    return q, choice


def deadline_move(
    objective: Objective, q: Array, choice: Choice, q_min: float
) -> tuple[float, Array, Choice]:
    """Return the best point, with its total, at which the slowest clients speed up together.

    Where the slowest bound each other no single one of them gains from a smaller rank, nor from
    joining less often. So a deadline is set to all computing: who misses it takes a smaller
    rank, and who cannot, either stays or joins as rarely as allowed.
    """
    tau = objective.at(objective.tau, choice)
    moves = []
    for deadline in np.unique(np.quantile(tau, _DEADLINES, method="lower")):
        fitting = np.maximum((objective.tau <= deadline).sum(axis=1) - 1, 0)
        late = objective.tau[:, 0] > deadline
        for option in (np.minimum(choice, fitting), fitting):
            for target in (q, np.where(late, q_min, q)):
                moves.append((objective.total(target, option), target, option))
    return min(moves, key=lambda move: move[0])


def marginal_seconds(objective: Objective, q: Array, choice: Choice) -> Array:
    """Estimate the seconds each client would add to a round at each rank, shape (n, options).

    Where a set's own time ``T`` is known, the others in it look from there like one client that
    uploads ``w`` seconds after ``θ``, matched in the sum ``h`` of their shares and its slope:
    ``T − θ = h / |h'|``, ``w = h² / |h'|``. Then the time with one more client is the root of a
    quadratic equation. The estimate only guides the search; scores never use it.
    """
    masks, _ = objective.sets(q)
    masks = masks[: max(8, 48_000 // masks.shape[1])]
    tau, upload = objective.at(objective.tau, choice), objective.at(objective.upload, choice)
    # On lines of their own nobody takes from a band, and shares of it would be lost in rounding.
    upload = np.maximum(upload, _LEAST_UPLOAD * tau.max())
    slower: Array | float = 1.0
    if objective.luck is not None:
        slower = objective.luck.fades(len(masks))
        upload = upload * slower
        if objective.luck.conditions.bandwidth == "equal":
            return _floored(_equal_costs(objective, tau, upload, slower, masks))
    latest = objective.latest
    seconds = batch_round_seconds(tau, upload, masks, idle_seconds=objective.idle_seconds)[:, None]
    gap = np.where(masks, seconds - tau, 1.0)
    share = np.where(masks, upload, 0.0) / gap
    steep = share / gap
    # What is left of h = 1 and of its slope without the client in question.
    share = share.sum(axis=1, keepdims=True) - share
    steep = steep.sum(axis=1, keepdims=True) - steep
    alone = share < 1e-9
    reach = np.where(alone, 0.0, share / np.where(alone, 1.0, steep))
    work = reach * np.where(alone, 0.0, share)
    start = np.where(alone, 0.0, seconds - reach)
    before = np.where(alone, objective.idle_seconds, start + work)
    cost = np.empty_like(objective.tau)
    for option in range(cost.shape[1]):
        lag = objective.tau[:, option] - start
        extra = objective.upload[:, option] * slower
        root = np.sqrt((lag + extra - work) ** 2 + 4 * work * extra)
        after = np.minimum(start + (lag + work + extra + root) / 2, latest)
        cost[:, option] = (after - np.minimum(before, latest)).mean(axis=0)
    return _floored(cost)


def _equal_costs(
    objective: Objective, tau: Array, upload: Array, slower: Array, masks: NDArray[np.bool_]
) -> Array:
    """Return the same under equal shares: a client takes from everybody's, and may be the last."""
    others = masks.sum(axis=1)[:, None] - masks
    cost = np.empty_like(objective.tau)
    idle, latest = objective.idle_seconds, objective.latest

    def last_of_others(shares: Array) -> Array:
        # Everybody is the last but for the last one, without whom it is the second.
        done = np.where(masks, tau + upload * shares, 0.0)
        top = (
            np.sort(done, axis=1)[:, -2:] if masks.shape[1] > 1 else np.pad(done, ((0, 0), (1, 0)))
        )
        return np.where(done == top[:, -1:], top[:, :1], top[:, -1:])

    # Nearly right: the set's size with and without the client is taken for all sets alike.
    before = np.where(others > 0, last_of_others(np.maximum(others, 1.0)), idle)
    along = last_of_others(others + 1.0)
    for option in range(cost.shape[1]):
        mine = objective.tau[:, option] + objective.upload[:, option] * slower * (others + 1)
        after = np.minimum(np.maximum(along, mine), latest)
        cost[:, option] = (after - np.minimum(before, latest)).mean(axis=0)
    return cost


def _floored(cost: Array) -> Array:
    """Return costs above 0: sampling noise or a long idle time may call a client free."""
    floor = 1e-9 * max(float(cost.max()), np.finfo(np.float64).tiny)
    return np.maximum(cost, floor)
