"""When the last of many replies is there, none of which comes exactly when it is expected [D].

A round waits for its latest reply, and of many that are expected together one is late: the latest
of their expected times is too soon. So what earlier replies took beside what was expected of each
is kept, and each reply of the next round is as likely to be late by any of it. If replies err
independently, and as before, half of all rounds take longer than is said and half are over sooner;
one reply that is very late moves it little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MEMORY = 32  # replies, of all clients together
FEWEST = 4  # with fewer, errors count for nothing
_HALVINGS = 50


class Forecasts:
    """What replies took beside what was expected of each."""

    def __init__(self) -> None:
        self._expected: dict[int, float] = {}
        self._errors: deque[float] = deque(maxlen=MEMORY)

    def expect(self, seconds: Mapping[int, float]) -> None:
        """Note when the replies of a round are expected, by client."""
        self._expected = dict(seconds)

    def learn(self, client: int, seconds: float) -> None:
        """Note when one was there; nothing, if it was not expected."""
        if client in self._expected:
            self._errors.append(seconds - self._expected.pop(client))

    def latest(self, guesses: Sequence[Array]) -> float:
        """Return the seconds after which all of a round's replies are as likely there as not.

        Parameters
        ----------
        guesses : Sequence[ndarray, shape (any,)]
            Of each reply, at least one: the seconds that are expected of it. Where nothing is
            known of its client there are several, each as likely.
        """
        errors = np.sort(self._errors) if len(self._errors) >= FEWEST else np.zeros(1)
        low = max(float(own.min()) for own in guesses) + float(errors[0])
        high = max(float(own.max()) for own in guesses) + float(errors[-1])
        flat, sizes = np.concatenate(guesses), np.array([len(own) for own in guesses])
        starts = np.cumsum(sizes) - sizes
        for _ in range(_HALVINGS if low < high else 0):
            middle = (low + high) / 2
            there = np.searchsorted(errors, middle - flat, side="right") / len(errors)
            all_there = float(np.prod(np.add.reduceat(there, starts) / sizes))
            low, high = (low, middle) if all_there >= 0.5 else (middle, high)
        return max(high, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return it, as JSON can hold it."""
        return {"errors": list(self._errors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._expected = {}
        self._errors = deque((float(error) for error in state["errors"]), maxlen=MEMORY)
