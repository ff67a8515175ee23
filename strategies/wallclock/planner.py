"""Which clients to ask how often, and for how much rank, so that a run ends soonest.

The objective is that of the seed (heterogeneous wireless networks) with the number of rounds of
`strategies.wallclock.convergence`. The closed form for a given sum of times is derived and
checked; that it selects too few clients, so that candidates are scored by the mean of the true
round time, and the search itself, are [D].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.wallclock.baselines import statistical_q, uniform_q, weighted_q
from strategies.wallclock.expectation import Expectation
from strategies.wallclock.objective import Array, Choice, ClientProfiles, Objective, Phi
from strategies.wallclock.search import coordinate_search, marginal_search
from strategies.wallclock.waterfill import water_fill

__all__ = [
    "ClientProfiles",
    "Plan",
    "expected_seconds",
    "plan",
    "statistical_q",
    "uniform_q",
    "weighted_q",
]

_EXACT_CLIENTS = 10
_MIN_SETS, _MAX_SETS, _CELLS = 32, 2048, 32_000
_GRID = 4
_ENUMERATED_RANKS = 100

Candidate = tuple[str, Array, Choice]


@dataclass(frozen=True)
class Plan:
    """Whom to ask how often, for which rank, and what that promises.

    Parameters
    ----------
    q : ndarray, shape (n,)
        Probability of each client to join a round.
    k : ndarray of int, shape (n,)
        Rank each client trains and sends.
    round_seconds : float
        Expected time of a round.
    rounds : float
        Expected rounds to the target.
    total_seconds : float
        Their product: what was minimised.
    exact : bool
        Whether the expectation is over all sets of participants, or a sample of them.
    alternatives : dict of str to float
        Total seconds of the simpler plans it was compared with, each with its best ranks and
        number of participants; inf where the target is out of reach.
    """

    q: Array
    k: NDArray[np.int64]
    round_seconds: float
    rounds: float
    total_seconds: float
    exact: bool
    alternatives: dict[str, float]

    def summary(self) -> str:
        """Return the plan as a few lines of text."""
        lines = [
            f"{self.q.sum():.1f} of {self.q.size} clients a round (q {self.q.min():.3g} to "
            f"{self.q.max():.3g}), ranks {self.k.min()} to {self.k.max()}",
            f"{self.rounds:.1f} rounds of {self.round_seconds:.4g} s: {self.total_seconds:.4g} s "
            f"({'exact' if self.exact else 'sampled'} expectation)",
        ]
        for name, seconds in self.alternatives.items():
            lines.append(f"  {name}: {seconds:.4g} s, {seconds / self.total_seconds:.2f} x")
        return "\n".join(lines)


def plan(
    profiles: ClientProfiles,
    alpha: float,
    beta: float,
    *,
    rng: np.random.Generator,
    phi: Phi | None = None,
    q_min: float = 0.01,
    idle_seconds: float = 0.0,
    sets: int | None = None,
    warm_start: Plan | None = None,
) -> Plan:
    """Minimise the expected time to the target over probabilities and ranks.

    Full participation, uniform and data-weighted sampling and the closed form over a grid of
    ``M = Σ q T`` are scored for several assignments of ranks, by the mean of the optimal round
    time over sets of participants; the best are then refined, probabilities and ranks together,
    to a fixed point [D]. Up to 10 clients all sets are enumerated and the score is exact. Above
    that the search scores by a mean over common random numbers, and what it finds, and the best
    of the simple plans, are judged by `Expectation` on others, the same for every call. So the
    plan is never worse than any of them by what it promises.

    Where ``profiles.conditions`` say more of a round (equal shares, a deadline, fades, clients that
    go away), rounds are simulated under them, for few clients too, and the variance grows by what
    is lost of a client's replies.

    Parameters
    ----------
    profiles : ClientProfiles
        The clients.
    alpha, beta : float
        Constants of the number of rounds, from `estimate_convergence`.
    rng : numpy.random.Generator
        Source of the sampled sets.
    phi : callable, optional
        Maps an array of ranks to variance factors; ``np.ones_like`` where ranks are fixed and
        nothing is compressed. (default: ``full_rank / k``, as for sketching)
    q_min : float
        Least probability, in (0, 1]: keeps the variance of the unbiased update finite in
        practice. (default: 0.01)
    idle_seconds : float
        Time of a round in which nobody takes part. (default: 0)
    sets : int, optional
        How many sets of participants to search with. (default: all of them for up to 10
        clients, else 32 to 2048, fewer for more clients)
    warm_start : Plan, optional
        An earlier plan for as many clients, to start from as well.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If an argument is out of range, or the target is out of reach even when everybody takes
        part with the rank of least variance.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and > 0, got {value!r}")
    if not 0 < q_min <= 1:
        raise ValueError(f"q_min must lie in (0, 1], got {q_min!r}")
    if not (np.isfinite(idle_seconds) and idle_seconds >= 0):
        raise ValueError(f"idle_seconds must be finite and ≥ 0, got {idle_seconds!r}")
    if sets is not None and sets < 1:
        raise ValueError(f"sets must be ≥ 1, got {sets!r}")
    n = len(profiles)
    if sets is None and (n > _EXACT_CLIENTS or profiles.conditions is not None):
        sets = int(np.clip(_CELLS // n, _MIN_SETS, _MAX_SETS))
    objective = Objective(profiles, alpha, beta, phi, idle_seconds, sets, rng)
    least = float(objective.variance.min(axis=1).sum() + objective.lost.sum())
    if least >= beta:
        raise ValueError(
            f"the target is out of reach: even with everybody in every round Σ a² φ = {least:.6g} "
            f"is not below beta = {beta:.6g}; allow larger ranks or fit beta again"
        )
    candidates = list(_candidates(objective, q_min))
    scored = [(objective.score(q, choice), name, q, choice) for name, q, choice in candidates]
    if warm_start is not None:
        if warm_start.q.shape != (n,):
            raise ValueError(f"warm_start is for {warm_start.q.size} clients, not {n}")
        choice = np.abs(objective.options - warm_start.k[:, None]).argmin(axis=1)
        q = np.clip(warm_start.q, q_min, 1.0)
        scored.append((objective.score(q, choice), "warm start", q, choice))
    search = coordinate_search if objective.exact else marginal_search
    found = [("", *search(objective, *seed, q_min)) for seed in _seeds(scored, objective.exact)]
    best: dict[str, tuple[float, str, Array, Choice]] = {}
    for point in sorted(scored, key=lambda point: point[0], reverse=True):
        best[point[1]] = point
    found += [point[1:] for point in best.values()]
    seconds_of = objective.round_seconds if objective.exact else _judge(objective)
    points = []
    for name, q, choice in found:
        objective.look(q, choice)
        seconds, bracket = seconds_of(q, choice), objective.bracket(q, choice)
        rounds = alpha / bracket if bracket > 0 else np.inf
        points.append((seconds * rounds, seconds, rounds, name, q, choice))
    total, seconds, rounds, _, q, choice = min(points, key=lambda point: point[0])
    others = {name: total for total, _, _, name, _, _ in points if name not in ("", "warm start")}
    alternatives = {name: others[name] for name in dict.fromkeys(n for n, _, _ in candidates)}
    k = objective.at(objective.options, choice).astype(np.int64)
    return Plan(q, k, seconds, rounds, total, objective.exact, alternatives)


def expected_seconds(
    profiles: ClientProfiles, q: ArrayLike, k: ArrayLike, *, idle_seconds: float = 0.0
) -> float:
    """Return the expected time of a round under a plan, if clients are as ``profiles`` say.

    Parameters
    ----------
    profiles : ClientProfiles
        Maybe others than those the plan was made for; ``k`` must be among their ranks.
    q, k : array_like, shape (n,)
        Of the plan.
    idle_seconds : float
        Time of a round in which nobody takes part. (default: 0)
    """
    exact = len(profiles) <= _EXACT_CLIENTS and profiles.conditions is None
    rng = np.random.default_rng(0)  # of sets that _judge does not look at
    objective = Objective(profiles, 1.0, 1.0, np.ones_like, idle_seconds, None if exact else 1, rng)
    choice = np.abs(objective.options - np.asarray(k)[:, None]).argmin(axis=1)
    seconds_of = objective.round_seconds if exact else _judge(objective)
    return seconds_of(np.asarray(q, np.float64), choice)


def _judge(objective: Objective) -> Callable[[Array, Choice], float]:
    """Return what says the expected time of a round, by other sets than the search's.

    On its own sets a search finds whom they happen to miss.
    """
    expectation = Expectation(objective.n, objective.idle_seconds, objective.conditions)

    def seconds(q: Array, choice: Choice) -> float:
        tau, upload = objective.at(objective.tau, choice), objective.at(objective.upload, choice)
        return expectation.seconds(tau, upload, q * objective.there)

    return seconds


def _seeds(
    scored: list[tuple[float, str, Array, Choice]], exact: bool
) -> list[tuple[Array, Choice]]:
    """Return where to start the search: the best candidates that differ in their ranks.

    A few clients have few sets, but as many local minima (all of them always, or one at a time,
    or without the slowest), so they get more starts: of each kind, and crowded or not.
    """
    seeds: dict[tuple[object, ...], tuple[Array, Choice]] = {}
    n = scored[0][2].size
    for total, name, q, choice in sorted(scored, key=lambda item: item[0]):
        if np.isfinite(total):
            kind = (name, bool(q.sum() > n / 2)) if exact else ()
            seeds.setdefault((choice.tobytes(), *kind), (q, choice))
    count = max(2, 200 // n**2) if exact else 2
    return list(seeds.values())[:count]


def _candidates(objective: Objective, q_min: float) -> Iterator[Candidate]:
    """Yield the simple plans, for every assignment of ranks worth a start."""
    for choice in _rank_starts(objective):
        variance = objective.at(objective.variance, choice)
        a, n = objective.a, objective.n
        yield "full", np.ones(n), choice
        # Below this many participants the target is out of reach.
        for expected in _grid(n * variance.sum() / objective.beta, n):
            yield "uniform", np.clip(uniform_q(n, expected), q_min, 1.0), choice
        for expected in _grid(float((variance[a > 0] / a[a > 0]).sum()) / objective.beta, n):
            yield "weighted", np.clip(weighted_q(a, expected), q_min, 1.0), choice
        seconds = objective.at(objective.tau, choice) + objective.at(objective.upload, choice)
        spent = np.sqrt(variance * seconds)  # a √(φ T), q T up to the level
        for budget in _grid(spent.sum() ** 2 / objective.beta, seconds.sum()):
            filled = water_fill(spent, budget, q_min * seconds, seconds)
            yield "closed form", np.clip(filled / seconds, q_min, 1.0), choice


def _grid(least: float, most: float) -> Array:
    """Return amounts between the least that reaches the target and the most there is."""
    if 1.02 * least >= most:
        return np.array([most])
    # Twice the least is the optimum of the unclipped closed form.
    return np.unique(np.append(np.geomspace(1.02 * least, most, _GRID), min(2 * least, most)))


def _rank_starts(objective: Objective) -> list[Choice]:
    """Return assignments of ranks to start from: all, or one common rank or common deadline.

    A deadline matters where the slowest clients bound each other: no single one of them gains
    from a smaller rank alone.
    """
    counts = [len(np.unique(ranks)) for ranks in objective.options]
    if math.prod(counts) <= _ENUMERATED_RANKS:
        return [np.array(start) for start in itertools.product(*map(range, counts))]
    levels = np.unique(objective.options)
    deadlines = np.quantile(objective.tau[:, -1], (0.25, 0.5, 0.75))
    fits = [objective.options <= level for level in levels]
    fits += [objective.tau <= deadline for deadline in deadlines]
    # Of least variance: feasible if anything is.
    starts = [objective.variance.argmin(axis=1)]
    starts += [np.maximum(fit.sum(axis=1) - 1, 0) for fit in fits]
    unique = {start.tobytes(): start for start in starts}
    return list(unique.values())
