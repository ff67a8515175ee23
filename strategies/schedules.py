"""Learning-rate schedules: what the rate is multiplied by at each step of a client's training."""

from __future__ import annotations

import math
from collections.abc import Callable

#: The factor at a step (0 is the first) of so many.
Schedule = Callable[[int, int], float]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: 1.0 - step / steps,
    "cosine": lambda step, steps: 0.5 * (1.0 + math.cos(math.pi * (step / steps))),
}


def make_schedule(schedule: str | Schedule) -> Schedule:
    """Return a schedule by its name, or the one that was given.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule: expected {', '.join(SCHEDULES)} or a function of step and steps, got "
            f"{schedule!r}"
        )
    return SCHEDULES[schedule]


def anew(schedule: str | Schedule, times: int, decay: float = 1.0) -> Schedule:
    """Return a schedule that starts anew in each of ``times`` shares of the steps.

    So the rates of a training in one go are those of as many rounds: what a client that trains
    alone is to be compared with.

    Parameters
    ----------
    schedule : str or callable
        Of one share.
    times : int
        At least 1; with fewer steps than that, each step is a share.
    decay : float (default: 1.0)
        The factor on the rates from one share to the next.
    """
    if times < 1:
        raise ValueError(f"times: expected at least 1, got {times}")
    one = make_schedule(schedule)

    def factor(step: int, steps: int) -> float:
        shares = min(times, steps)
        over = step * shares // steps
        first, following = (-(-n * steps // shares) for n in (over, over + 1))
        return float(decay**over) * one(step - first, following - first)

    return factor
