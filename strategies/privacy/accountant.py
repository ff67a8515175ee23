"""The ledger of a run: what each client has given away so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any

from strategies.privacy.accounting import (
    Fixed,
    Gaussian,
    Poisson,
    Release,
    check_delta,
    check_release,
    epsilon,
)


class PrivacyAccountant:
    """Keep what a run has spent: one ledger a client, and one for what the models tell.

    Parameters
    ----------
    noise_multiplier : float
        ``z`` of the clients from now on; what was spent before keeps its own.
    delta : float
        In (0, 1); well below one over the number of those to be protected.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, noise_multiplier: float, delta: float) -> None:
        check_release(Gaussian(noise_multiplier))
        check_delta(delta)
        self.noise_multiplier = noise_multiplier
        self.delta = delta
        self._asked: dict[int, Counter[Release]] = {}
        self._shared: Counter[Release] = Counter()  # the same for every client
        self._own: dict[int, Counter[Release]] = {}

    def record(self, asked: Iterable[int]) -> None:
        """Note who was asked in a round; also if no good reply came, for one was sent."""
        for index in asked:
            self._asked.setdefault(index, Counter())[Gaussian(self.noise_multiplier / 2)] += 1

    def record_fixed(
        self, clients: int, sample: int, answered: int, *, summed: bool, amplified: bool
    ) -> None:
        """Note a round of fixed size, for the guarantee by the models alone.

        Parameters
        ----------
        clients, sample, answered : int
            How many there were, were asked and are in the aggregate. Unless all that were
            asked are, secrecy of who joined counts for nothing in this round: those that are
            missing say who is there (this project's decision).
        summed : bool
            Whether the rule is linear in the updates, so that their noises add up.
        amplified : bool
            Whether ``refuse_amplification`` had nothing to say and all ranks were equal.
        """
        noises = max(1, answered) if summed and amplified else 1
        multiplier = self.noise_multiplier * math.sqrt(noises) / 2
        hidden = amplified and answered == sample < clients
        release = Fixed(multiplier, clients, sample) if hidden else Gaussian(multiplier)
        check_release(release)
        self._shared[release] += 1

    def record_poisson(
        self, rates: Mapping[int, float], weights: Mapping[int, float], total_over_clip: float
    ) -> None:
        """Note a round of independent coins whose noise ``top_up`` made the same for any draw.

        Parameters
        ----------
        rates, weights : Mapping[int, float]
            ``q_n`` and ``w_n = a_n / q_n`` of every client, by index.
        total_over_clip : float
            ``total_std / C``.
        """
        for index, rate in rates.items():
            release = Poisson(total_over_clip / weights[index], rate)
            check_release(release)
            self._own.setdefault(index, Counter())[release] += 1

    def local_epsilon(self, client: int | None = None) -> float:
        """Return ε against the server (default: the worst client's)."""
        none: Counter[Release] = Counter()
        ledgers = self._asked.values() if client is None else [self._asked.get(client, none)]
        distinct = {frozenset(ledger.items()) for ledger in ledgers}
        return max((epsilon(dict(ledger), self.delta) for ledger in distinct), default=0.0)

    def central_epsilon(self, client: int | None = None) -> float:
        """Return ε against those who see the models only (default: the worst client's).

        The worst is not always the one asked most: who is asked rarely weighs ``a / q``. It is
        never more than ``local_epsilon``, which holds against everybody.
        """
        none: Counter[Release] = Counter()
        ledgers = list(self._own.values()) if client is None else [self._own.get(client, none)]
        distinct = {frozenset((self._shared + own).items()) for own in ledgers or [none]}
        hidden = max(epsilon(dict(ledger), self.delta) for ledger in distinct)
        return min(hidden, self.local_epsilon(client))

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent, as JSON can hold it."""
        return {
            "asked": {str(i): _listed(ledger) for i, ledger in sorted(self._asked.items())},
            "shared": _listed(self._shared),
            "own": {str(i): _listed(ledger) for i, ledger in sorted(self._own.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._asked = {int(i): _counted(ledger) for i, ledger in state["asked"].items()}
        self._shared = _counted(state["shared"])
        self._own = {int(i): _counted(ledger) for i, ledger in state["own"].items()}


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Gaussian, Fixed, Poisson)}


def _listed(ledger: Mapping[Release, int]) -> list[list[Any]]:
    return [[type(release).__name__, *astuple(release), n] for release, n in ledger.items()]


def _counted(listed: Iterable[list[Any]]) -> Counter[Release]:
    return Counter({_KINDS[kind](*values): int(n) for kind, *values, n in listed})
