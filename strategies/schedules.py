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
