"""The ledger of a run: what each client has given away so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from functools import reduce
from typing import TYPE_CHECKING, Any

from strategies.privacy.releases import (
    Fixed,
    Gaussian,
    Poisson,
    Release,
    check_delta,
    check_release,
)
from strategies.privacy.spent import NOTHING, Spent, total

if TYPE_CHECKING:
    from strategies.clients import Client


class PrivacyAccountant:
    """Keep what a run has spent: one ledger a client, and one for what the models tell.

    Ledgers go by the clients' indices. Who names its partition has one index, whatever its node
    id; who names none may be anybody, and ``meet`` sees to it that no ledger is less than that of
    the client it may belong to.

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
        self._own: dict[int, Spent] = {}
        self._here: dict[int, int] = {}  # index of each node that was there the last time
        self._unnamed: set[int] = set()  # indices that nodes without a name have had

    def meet(self, clients: Iterable[Client]) -> list[int]:
        """Note who is there, before any of them is asked.

        A node that names no partition and was not there the last time, or not under this index,
        may be any client that ever was, under another id, also one whose old id is still
        listed: its ledger begins with the most that any has spent. One that names its partition
        may at worst have been a nameless one in between.

        Returns
        -------
        list of int
            Indices whose ledgers were raised.
        """
        here = {client.node_id: client for client in clients}
        news = [c for n, c in here.items() if self._here.get(n) != c.index]
        everybody, nameless = self._worst(), self._worst(self._unnamed)
        raised = [c.index for c in news if self._raise(c.index, nameless if c.named else everybody)]
        self._here = {node_id: client.index for node_id, client in here.items()}
        self._unnamed |= {client.index for client in here.values() if not client.named}
        return raised

    def _worst(self, among: Iterable[int] | None = None) -> tuple[Counter[Release], Spent]:
        """Return bounds on all ledgers, or on some: what was asked, and what models tell."""
        chosen = (self._asked.keys() | self._own.keys()) if among is None else set(among)
        asked = [self._asked.get(i, Counter()) for i in chosen]
        own = [self._own.get(i, NOTHING) for i in chosen]
        return max(asked, key=_information, default=Counter()), reduce(Spent.or_else, own, NOTHING)

    def _raise(self, index: int, worst: tuple[Counter[Release], Spent]) -> bool:
        """Make a client's ledgers no less than ``worst``; tell whether they were."""
        asked, own = worst
        mine = self._own.get(index, NOTHING)
        more = bool((own.renyi > mine.renyi).any()) or own.information > mine.information
        if more:
            self._own[index] = mine.or_else(own)
        if _information(asked) > _information(self._asked.get(index, Counter())):
            self._asked[index] = Counter(asked)
            more = True
        return more

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
            self._own[index] = self._own.get(index, NOTHING) + total({release: 1})

    def local_epsilon(self, client: int | None = None) -> float:
        """Return ε against the server (default: the worst client's)."""
        ledgers = self._asked.values() if client is None else [self._asked.get(client, Counter())]
        # Without sampling more information is more ε, so one of them is enough.
        worst: Counter[Release] = max(ledgers, key=_information, default=Counter())
        return total(worst).epsilon(self.delta)

    def central_epsilon(self, client: int | None = None) -> float:
        """Return ε against those who see the models only (default: the worst client's).

        The worst is not always the one asked most: who is asked rarely weighs ``a / q``. It is
        never more than ``local_epsilon``, which holds against everybody.
        """
        own = list(self._own.values()) if client is None else [self._own.get(client, NOTHING)]
        shared = total(self._shared)
        local = self.local_epsilon(client)
        spent = {_key(each): each for each in (shared + one for one in own or [NOTHING])}
        if any(len(each.hidden) > 1 for each in spent.values()):
            return local  # both kinds of neighbours: nothing is known to add up
        return min(max(each.epsilon(self.delta) for each in spent.values()), local)

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent, as JSON can hold it."""
        return {
            "asked": {str(i): _listed(ledger) for i, ledger in sorted(self._asked.items())},
            "shared": _listed(self._shared),
            "own": {str(i): spent.state_dict() for i, spent in sorted(self._own.items())},
            "here": {str(node_id): index for node_id, index in self._here.items()},
            "unnamed": sorted(self._unnamed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._asked = {int(i): _counted(ledger) for i, ledger in state["asked"].items()}
        self._shared = _counted(state["shared"])
        self._own = {int(i): _spent(own) for i, own in state["own"].items()}
        # An older ledger does not say who named itself, so nobody is taken to have done.
        self._here = {int(n): int(i) for n, i in state.get("here", {}).items()}
        self._unnamed = set(map(int, state.get("unnamed", [*state["asked"], *state["own"]])))


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Gaussian, Fixed, Poisson)}


def _listed(ledger: Mapping[Release, int]) -> list[list[Any]]:
    return [[type(release).__name__, *astuple(release), n] for release, n in ledger.items()]


def _counted(listed: Iterable[list[Any]]) -> Counter[Release]:
    return Counter({_KINDS[kind](*values): int(n) for kind, *values, n in listed})


def _spent(own: Any) -> Spent:
    """Return what a client has spent; an older ledger lists every release."""
    return Spent.from_state_dict(own) if isinstance(own, Mapping) else total(_counted(own))


def _information(ledger: Mapping[Release, int]) -> float:
    return math.fsum(
        n / r.multiplier**2 if r.multiplier else math.inf for r, n in ledger.items() if n
    )


def _key(spent: Spent) -> tuple[float, bytes]:
    return spent.information, spent.renyi.tobytes()
