"""Clocks, and who is there when, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from strategies.naming import Registry
from strategies.wallclock.availability import AVAILABILITIES, Availability
from strategies.wallclock.channel import PROFILES, devices_from_csv
from strategies.wallclock.clock import Clock
from strategies.wallclock.intervals import Intervals
from strategies.wallclock.measured import MeasuredClock
from strategies.wallclock.simulated import SimulatedClock

CLOCKS: Registry[Callable[..., Clock]] = Registry(
    {
        MeasuredClock.name: MeasuredClock,
        **{profile: partial(SimulatedClock, profile) for profile in PROFILES},
    }
)


def make_clock(name: str | Path, **options: Any) -> Clock:
    """Return a clock by its name.

    Parameters
    ----------
    name : str or Path
        "measured", the name of a channel profile, or a CSV file of devices (``*.csv``, see
        `devices_from_csv`).
    **options
        Of `MeasuredClock` or `SimulatedClock`; with a CSV file also ``profile``, the
        surroundings of its devices. (default: "campus")

    Raises
    ------
    ValueError
        If there is no such clock, or an option or the file is not as it should be.
    OSError
        If the file cannot be read.
    """
    if str(name).lower().endswith(".csv"):
        devices = devices_from_csv(name, options.pop("profile", "campus"))
        return SimulatedClock(devices, **options)
    return CLOCKS.make(str(name), **options)


def make_availability(
    name: str | Path, *, rng: np.random.Generator, **options: Any
) -> Availability:
    """Return an availability model by its name.

    Parameters
    ----------
    name : str or Path
        "always", "diurnal", "exponential", or a CSV file of intervals (``*.csv``, see
        `Intervals.from_csv`).
    rng : numpy.random.Generator
        Source of all chance; one number is drawn.
    **options
        Of the model.

    Raises
    ------
    ValueError
        If there is no such model, or an option or the file is not as it should be.
    OSError
        If the file cannot be read.
    """
    if str(name).lower().endswith(".csv"):
        return Intervals.from_csv(name, **options)
    return AVAILABILITIES.make(str(name), rng=rng, **options)
