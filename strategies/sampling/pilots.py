"""Two short runs with different sampling, from which α and β are fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.common import log

from strategies.records import PilotsRecord
from strategies.sampling.base import Restart
from strategies.wallclock.convergence import ConvergenceEstimate, Pilot, estimate_convergence


class Pilots:
    """The book of two pilots: the first in rounds 1 to P, the second in P + 1 to 2 P.

    Losses may be missing for some rounds (the model is not evaluated after each, or nobody
    joined): they are interpolated. Without a loss of round 0 the losses are taken for those of
    the models that the rounds began with, as mean training losses are, so that a pilot of P
    rounds gives a curve of P − 1 [D].

    Parameters
    ----------
    rounds : int
        ``P``, at least 2.
    fractions : Sequence[float]
        Probability of every client to join a round of either pilot: two different numbers in
        (0, 1].

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, rounds: int, fractions: Sequence[float]) -> None:
        if rounds < 2:
            raise ValueError(f"pilot_rounds: expected at least 2, got {rounds!r}")
        if len(fractions) != 2 or not all(0 < f <= 1 for f in fractions):
            raise ValueError(f"pilot_fractions: expected two in (0, 1], got {fractions!r}")
        if fractions[0] == fractions[1]:
            raise ValueError(
                f"pilot_fractions: expected two different numbers, got {fractions[0]!r} twice; "
                "alpha and beta are fitted to the difference, the larger the better"
            )
        self.rounds = rounds
        self.fractions = [float(f) for f in fractions]
        self.losses: dict[int, float] = {}
        self._variances: dict[int, float] = {}

    def running(self, server_round: int) -> int | None:
        """Return which pilot a round belongs to, 0 or 1; None after both."""
        pilot = (server_round - 1) // self.rounds
        return pilot if pilot < 2 else None

    def learn_variance(self, server_round: int, variance: float) -> None:
        """Take ``Σ a² φ / q`` of a round; it changes when clients come and go."""
        self._variances[server_round] = variance

    def learn_loss(self, server_round: int, loss: float) -> None:
        """Take the global loss after a round, or at the start; ignored after both pilots."""
        if server_round <= 2 * self.rounds and np.isfinite(loss):
            self.losses[server_round] = float(loss)

    def restart(self, server_round: int) -> Restart | None:
        """Return "start" before the second pilot, "back" after it if the first got further."""
        if server_round == self.rounds + 1:
            return "start"
        if server_round == 2 * self.rounds + 1 and self.better() == 0:
            return "back"
        return None

    def better(self) -> int:
        """Return the pilot whose last known loss is lower; where that is open, the second."""
        first, second = (self._known(pilot) for pilot in (0, 1))
        if not first or not second:
            return 1
        return int(first[max(first)] >= second[max(second)])

    def curve(self, pilot: int) -> list[float]:
        """Return a pilot's loss at its start and after each round; empty if none is known."""
        known = self._known(pilot)
        if not known:
            return []
        last = self.rounds
        if 0 in self.losses:
            known[0] = self.losses[0]
        else:
            known, last = {place - 1: loss for place, loss in known.items()}, last - 1
        places = sorted(known)
        losses = [known[place] for place in places]
        curve: list[float] = np.interp(np.arange(last + 1), places, losses).tolist()
        return curve

    def variance(self, pilot: int) -> float:
        """Return the mean ``Σ a² φ / q`` of a pilot's rounds."""
        return float(np.mean([self._variances[r] for r in self._span(pilot, self._variances)]))

    def estimate(self) -> ConvergenceEstimate:
        """Fit α and β.

        Raises
        ------
        ValueError
            If the pilots say nothing of them; the message says why.
        """
        for pilot in (0, 1):
            if not self._known(pilot):
                raise ValueError(
                    f"no loss was reported in pilot {pilot + 1}; evaluate the global model on the "
                    "server, or let clients report their loss"
                )
            if not self._span(pilot, self._variances):
                raise ValueError(f"pilot {pilot + 1} did not run; start at round 1")
        return estimate_convergence([Pilot(self.variance(p), self.curve(p)) for p in (0, 1)])

    def conclude(self, server_round: int) -> tuple[tuple[float, float] | None, PilotsRecord]:
        """Return α and β, None if the pilots say nothing of them, and what to tell of it."""
        told: PilotsRecord = {
            "kind": "pilots",
            "round": server_round,
            "losses": [self.curve(pilot) for pilot in (0, 1)],
            "continued": self.better() + 1,
            "alpha": None,
            "beta": None,
            "reliable": False,
            "reason": "",
            "variances": None,
            "spread": None,
            "residual": None,
        }
        try:
            found = self.estimate()
        except ValueError as error:
            reason = f"{error}; sampling stays uniform with q = {max(self.fractions):g}"
            log(WARNING, "pilots: no estimate of alpha and beta: %s", reason)
            return None, {**told, "reason": reason}
        log(INFO if found.reliable else WARNING, "pilots: %s", found.summary())
        spread, residual = (x if np.isfinite(x) else None for x in (found.spread, found.residual))
        told |= {"alpha": found.alpha, "beta": found.beta, "reliable": found.reliable}
        told |= {"reason": found.reason, "variances": [self.variance(p) for p in (0, 1)]}
        told |= {"spread": spread, "residual": residual}
        return (found.alpha, found.beta), told

    def _span(self, pilot: int, values: Mapping[int, float]) -> list[int]:
        first = pilot * self.rounds + 1
        return [r for r in range(first, first + self.rounds) if r in values]

    def _known(self, pilot: int) -> dict[int, float]:
        """Return a pilot's losses by round, counted from its own start."""
        before = pilot * self.rounds
        return {r - before: self.losses[r] for r in self._span(pilot, self.losses)}

    def state_dict(self) -> dict[str, Any]:
        """Return losses and variances, by round."""
        return {
            "losses": {str(r): loss for r, loss in sorted(self.losses.items())},
            "variances": {str(r): s for r, s in sorted(self._variances.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.losses = {int(r): float(loss) for r, loss in state["losses"].items()}
        self._variances = {int(r): float(s) for r, s in state["variances"].items()}
