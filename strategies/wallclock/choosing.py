"""Rounds that wait for everybody, rounds with a deadline, or no rounds: which ends soonest [D]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from strategies.wallclock.buffered import BufferedTime, buffered_time
from strategies.wallclock.conditions import Conditions
from strategies.wallclock.objective import Array, ClientProfiles, Objective, Phi
from strategies.wallclock.planner import Plan, plan

Way = Literal["synchronous", "deadline", "buffered"]

_SETS = 64
# Deadlines worth a try, in mean rounds of the plan without one.
_DEADLINES = (0.3, 0.5, 0.8, 1.2)
# Clients that are busy, in those of a round of that plan; and replies to a model, in these.
_BUSY, _BUFFERS = (1.0, 2.0, 4.0), (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Choice:
    """Which way a run takes, and what the others would.

    Parameters
    ----------
    way : "synchronous", "deadline" or "buffered"
    plan : Plan
        Whom to ask how often, for how much rank, in rounds; for "buffered" the plan without a
        deadline, whose ranks each is to train where `buffered` is at its own.
    deadline : float
        Seconds, for "deadline"; else 0.
    buffered : BufferedTime, optional
        With K and C; None where no buffered mode reaches the target.
    k : ndarray, shape (n,)
        The rank each trains.
    total_seconds : float
    alternatives : dict of str to float
        Predicted seconds of the best of each way; inf where the target is out of reach.
    """

    way: Way
    plan: Plan
    deadline: float
    buffered: BufferedTime | None
    k: Array
    total_seconds: float
    alternatives: dict[str, float]

    def summary(self) -> str:
        """Return the choice as a few lines of text."""
        what = {
            "synchronous": self.plan.summary(),
            "deadline": f"a deadline of {self.deadline:.4g} s; {self.plan.summary()}",
            "buffered": "" if self.buffered is None else self.buffered.summary(),
        }[self.way]
        return "\n".join(
            [f"{self.way}: {what}"]
            + [f"  {name}: {seconds:.4g} s" for name, seconds in self.alternatives.items()]
        )


def choose_way(
    profiles: ClientProfiles,
    alpha: float,
    beta: float,
    *,
    rng: np.random.Generator,
    phi: Phi | None = None,
    q_min: float = 0.01,
    idle_seconds: float = 0.0,
    staleness: float = 0.5,
    deadlines: Sequence[float] | None = None,
    buffers: Sequence[tuple[int, int]] | None = None,
    largest: bool = False,
) -> Choice:
    """Predict each way, and return the one that ends soonest.

    A deadline under which somebody's data could never count is not considered: it would be fast
    since it learns something else. Of late replies only the discount is known to cost anything, so
    that the buffered mode is promised too much where it is very late; `alternatives` says by how
    little or much it is ahead.

    Parameters
    ----------
    profiles, alpha, beta, rng, phi, q_min, idle_seconds
        As of ``plan``.
    staleness : float
        As of ``buffered_time``. (default: 0.5)
    deadlines : Sequence[float], optional
        Seconds to try; empty: none. (default: 0.3 to 1.2 mean rounds without one)
    buffers : Sequence of (int, int), optional
        K and C to try; empty: none. (default: C of one to four times the clients of a round
        without a deadline, K of a quarter of these to all)
    largest : bool
        Whether clients train their largest rank where there are no rounds, else perhaps those of
        the plan. (default: False)

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        As ``plan`` does.
    """
    usual = plan(profiles, alpha, beta, rng=rng, phi=phi, q_min=q_min, idle_seconds=idle_seconds)
    best = Choice(
        "synchronous", usual, 0.0, None, usual.k.astype(np.float64), usual.total_seconds, {}
    )
    alternatives = {"synchronous": usual.total_seconds}
    if deadlines is None:
        deadlines = [share * usual.round_seconds for share in _DEADLINES]
    for deadline in deadlines:
        hurried = replace(
            profiles, conditions=replace(profiles.conditions or Conditions(), deadline=deadline)
        )
        if not _reaches_all(hurried):
            continue
        try:
            made = plan(
                hurried, alpha, beta, rng=rng, phi=phi, q_min=q_min, idle_seconds=idle_seconds
            )
        except ValueError:  # out of reach
            continue
        total = made.total_seconds
        alternatives["deadline"] = min(alternatives.get("deadline", np.inf), total)
        if total < best.total_seconds:
            best = Choice("deadline", made, deadline, None, made.k.astype(np.float64), total, {})
    for k in _ranks(profiles, usual, largest):
        for buffer, busy in _sizes(len(profiles), usual) if buffers is None else buffers:
            found = buffered_time(
                profiles, k, buffer=buffer, busy=busy,
                alpha=alpha, beta=beta, phi=phi, staleness=staleness,
            )  # fmt: skip
            total = found.total_seconds
            alternatives["buffered"] = min(alternatives.get("buffered", np.inf), total)
            if total < best.total_seconds:
                best = Choice("buffered", usual, 0.0, found, k, total, {})
    return replace(best, alternatives=alternatives)


def _reaches_all(profiles: ClientProfiles) -> bool:
    rng = np.random.default_rng(0)
    return bool(Objective(profiles, 1.0, 1.0, None, 0.0, _SETS, rng).reachable.all())


def _ranks(profiles: ClientProfiles, usual: Plan, largest: bool) -> Iterator[Array]:
    """Yield ranks to train without rounds: the largest, and those of the plan."""
    most = profiles.options()[:, -1]
    yield most
    if not largest and (most != usual.k).any():
        yield usual.k.astype(np.float64)


def _sizes(n: int, usual: Plan) -> Iterator[tuple[int, int]]:
    """Yield K and C worth a try, each pair once."""
    joined = float(usual.q.sum())
    seen = set()
    for busy in (min(n, max(1, round(share * joined))) for share in _BUSY):
        seen |= {(max(1, round(share * busy)), busy) for share in _BUFFERS}
    yield from sorted(seen)
