"""Who takes part in a round, how much each update counts, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from strategies.aggregation import Aggregator, Population
from strategies.clients import Client
from strategies.flower import is_network
from strategies.guard import Guard
from strategies.sampling import Outlook, Sampler
from strategies.sampling.base import Array
from strategies.wallclock.clock import Clock, RoundTime, Work
from strategies.wallclock.conditions import MOST_MADE_UP
from strategies.watch import Watch

UploadCost = Callable[[], tuple[float, float]]
Extend = Callable[[Sequence[Client], Sequence[Client], np.random.Generator], list[Client]]


class Participation:
    """The sampler and the clock of a run, and the book of who answers.

    Under independent sampling an update weighs ``η a / (q p)`` with ``p`` the share of times
    that its client answered when it was asked, counted as if it had once answered before.
    So the estimate stays consistent when replies are lost or late by chance; a client that
    never answers is never counted. Where clients come and go on the clock, ``p`` is that share
    times the share of the time that a client is there, and who is away is not asked. ``1/p`` ends
    at 5: who answers more rarely than one time in five is counted too little (this project's
    decisions).

    Parameters
    ----------
    sampler : Sampler
    clock : Clock
    rule : Aggregator
    """

    def __init__(self, sampler: Sampler, clock: Clock, rule: Aggregator[Any]) -> None:
        self.sampler = sampler
        self.clock = clock
        self.rule = rule
        self.guard = Guard()
        self.watch = Watch()
        self.seconds = 0.0  # of all rounds so far
        self.population: Population | None = None
        self.weights: dict[int, float] = {}  # of this round, by client index
        self.trained: Mapping[int, int] = {}  # ranks of this round, by client index
        self._present: Sequence[Client] = ()
        self.chances: dict[int, float] = {}  # to join this round, by client index
        self._asked: dict[int, int] = {}
        self._answered: dict[int, float] = {}  # late ones by what they count

    @property
    def independent(self) -> bool:
        """Whether clients join by their own probability."""
        return self.sampler.probabilities([]) is not None

    @property
    def ratio(self) -> bool:
        """Whether sums are divided by the participants' weight instead of everybody's."""
        estimator = self.sampler.estimator
        return self.rule.default_ratio if estimator == "auto" else estimator == "ratio"

    def check(self) -> None:
        """Refuse a rule and a sampler that do not go together.

        Raises
        ------
        ValueError
            With the reason.
        """
        if self.independent and (refusal := self.rule.refuse_coins()):
            raise ValueError(
                f"aggregation {self.rule.name!r} cannot be used with sampling "
                f"{self.sampler.name!r}: {refusal}"
            )
        if self.independent and self.ratio and self.sampler.server_rate != 1:
            raise ValueError(
                f"server_rate = {self.sampler.server_rate:g} scales a displacement, but "
                f"{self.rule.name!r} takes a mean over the participants; use estimator = 'unbiased'"
            )
        if self.sampler.needs_cost and getattr(self.rule, "ratio", 1.0) != 1:
            raise ValueError(
                f"sampling {self.sampler.name!r} chooses itself how much of its adapter a client "
                f"sends; leave the ratio of {self.rule.name!r} at 1"
            )
        if self.sampler.wants_loss and set(self.rule.trained()) - set(self.rule.uploaded()):
            raise ValueError(
                f"sampling {self.sampler.name!r} starts its pilots from one model, but aggregation "
                f"{self.rule.name!r} keeps a part of it on the clients; give alpha and beta, or "
                "use another rule"
            )

    def choose(
        self,
        server_round: int,
        clients: Sequence[Client],
        ranks: Sequence[int],
        upload_cost: UploadCost,
        full_rank: int,
        rng: np.random.Generator,
        *,
        busy: Collection[int] = (),
        extend: Extend | None = None,
    ) -> list[tuple[Client, int]]:
        """Return who trains in this round, each with the rank it is to train.

        Parameters
        ----------
        server_round : int
        clients : Sequence[Client]
            Everyone present, in a lasting order.
        ranks : Sequence[int]
            What the rank policy gives each of them.
        upload_cost : callable
            Returns ``(fixed, per_rank)`` bytes of an upload.
        full_rank : int
            Rank of the global adapter.
        rng : numpy.random.Generator
            Of this round.
        busy : Collection[int]
            Nodes that are still at an earlier order. A coin may fall for them all the same, which
            they do not answer.
        extend : callable, optional
            Returns whom to ask, from those chosen, those that could be, and a generator.
        """
        sampler = self.sampler
        a = data_weights(clients)
        outlook = Outlook(
            server_round, clients, a, ranks, self.clock,
            upload_cost() if sampler.needs_cost else (0.0, 0.0),
            # Without LoRA modules (full_rank = 0) there is nothing to sketch.
            sketches=self.rule.sketches and full_rank > 0,
            full_rank=max(full_rank, *ranks, 1),
            sketches_cost=self.rule.sketch_adds_variance,
        )  # fmt: skip
        sampler.prepare(outlook)
        trained = dict(zip((c.index for c in clients), sampler.ranks(clients, ranks), strict=True))
        self.trained, self._present = trained, clients
        there = self._there(clients, wait=not busy)
        idle = [client for client in there if client.node_id not in busy]
        can = there if self.independent else idle
        chosen = sampler.sample(can, server_round, rng) if can or not clients else []
        if extend is not None:
            chosen = extend(chosen, idle, rng)
        self._weigh(clients, a, trained, sampler.probabilities(clients))
        for client in chosen:
            self.asked(client)
        return [(c, trained[c.index]) for c in chosen if c.node_id not in busy]

    def asked(self, client: Client) -> None:
        """Note that a client is asked to train."""
        self._asked[client.index] = self._asked.get(client.index, 0) + 1

    def here(self) -> Sequence[Client]:
        """Return who of this round's clients is there by now, be it nobody."""
        return self._there(self._present, wait=False)

    def _there(self, clients: Sequence[Client], *, wait: bool) -> Sequence[Client]:
        """Return who is there by the clock; where that is nobody, wait for the first to come."""
        indices = [client.index for client in clients]
        present = self.clock.availability.look(indices, self.clock.now)
        if wait and clients and not present.here.any():
            back = float(present.until.min())
            if math.isinf(back):
                raise ValueError(
                    f"after {self.clock.now:g} s of the clock none of {len(clients)} clients is "
                    "there, nor comes back; give them more times to be there, or repeat these"
                )
            self.seconds += back - self.clock.now
            self.clock.now = back
            present = self.clock.availability.look(indices, back)
        return [client for client, here in zip(clients, present.here, strict=True) if here]

    def _weigh(
        self, clients: Sequence[Client], a: Array, trained: Mapping[int, int], q: Array | None
    ) -> None:
        self.weights, self.chances, self.population = {}, {}, None
        if q is None:
            return
        masses: dict[int, float] = {}
        time_there = self.clock.availability.share([client.index for client in clients])
        for client, share, probability, there in zip(clients, a, q, time_there, strict=True):
            i = client.index
            masses[trained[i]] = masses.get(trained[i], 0.0) + float(share)
            rate = (self._answered.get(i, 0) + 1) / (self._asked.get(i, 0) + 1)
            rate = max(rate * there, 1 / MOST_MADE_UP)
            self.chances[i] = float(probability)
            self.weights[i] = self.sampler.server_rate * float(share) / (probability * rate)
        self.population = Population(masses, self.ratio)

    def weight(self, client: Client, reported: float) -> float:
        """Return how much a client's update counts; ``reported`` without independent sampling."""
        return self.weights.get(client.index, reported)

    def answered(self, client: Client, part: float = 1) -> None:
        """Note that a client sent a good reply, of which a part counts if it is late."""
        self._answered[client.index] = self._answered.get(client.index, 0) + part

    @property
    def anyone_answered(self) -> bool:
        """Whether there was ever a good reply."""
        return bool(self._answered)

    def never_answered(self) -> list[int]:
        """Return the indices of those who were asked, and never sent a good reply in time."""
        return sorted(self._asked.keys() - self._answered.keys())

    def begin(
        self, works: Sequence[Work], server_round: int, grid: Grid, empty: Sequence[float]
    ) -> RoundTime:
        """Return the time of a round before it is run; ``empty`` as in ``Clock.begin``."""
        network = is_network(grid)
        return self.clock.begin(works, server_round, network=network, empty=empty)

    def finish(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of a round that is over and add it to ``seconds``."""
        time = self.clock.finish(works, server_round)
        self.seconds += time.seconds
        self.clock.now = self.seconds
        return time

    def pass_to(self, seconds: float) -> None:
        """Set the clock, at the end of a round that it did not time by itself."""
        self.seconds = self.clock.now = seconds

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, as JSON can hold it."""
        return {
            "seconds": self.seconds,
            "guard": self.guard.state_dict(),
            "watch": self.watch.state_dict(),
            "asked": {str(i): n for i, n in self._asked.items()},
            "answered": {str(i): n for i, n in self._answered.items()},
            "sampler": self.sampler.state_dict(),
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.seconds = state["seconds"]
        self.guard.load_state_dict(state.get("guard", {}))
        self.watch.load_state_dict(state.get("watch", {}))
        self._asked = {int(i): n for i, n in state["asked"].items()}
        self._answered = {int(i): n for i, n in state["answered"].items()}
        self.sampler.load_state_dict(state["sampler"])
        self.clock.load_state_dict(state["clock"])
        self.clock.now = self.seconds


def data_weights(clients: Sequence[Client]) -> Array:
    """Return each client's share of all examples, shape (n,), sum 1.

    A client whose number of examples is not known counts as the mean of the known ones.
    """
    known = [c.num_examples for c in clients if c.num_examples]
    mean = float(np.mean(known)) if known else 1.0
    counts = np.array([c.num_examples or mean for c in clients], dtype=np.float64)
    shares: Array = counts / max(counts.sum(), 1.0)
    return shares
