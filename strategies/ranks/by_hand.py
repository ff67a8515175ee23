"""Ranks to compare with: a staircase by volume set by hand, and ranks by chance."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.clients import Client
from strategies.ranks.base import Explanation, RankPolicy, at_least_one, mean_between
from strategies.ranks.holders import caps_of, divided, whole_budget
from strategies.seeding import stream


class StaircaseRank(RankPolicy):
    """The more rows a client has, the higher its step of a staircase that is set by hand.

    The clients in the order of their numbers of rows are cut into as many groups of equal size as
    there are steps, and the group with the fewest rows gets the lowest. The AutoRank authors'
    records of their own runs have such an arm, and AutoRank loses to it with 30 clients [reported
    by a reader]; the groups of equal size are this project's decision. Clients say how many rows
    they have. One that does not counts as one with the median; ties go to the lower client index.
    One that joins, or says another number, may move the step of others.

    Parameters
    ----------
    ranks : Sequence[int]
        The steps, in any order; their mean is the clients' where their number divides by that of
        the steps.

    Raises
    ------
    ValueError
        If there is no step, or one is below 1.
    """

    name = "staircase"
    needs_counts = True

    def __init__(self, ranks: Sequence[int]) -> None:
        if not ranks:
            raise ValueError("ranks: expected at least one step, got none")
        self.steps = sorted(at_least_one("ranks", rank) for rank in ranks)
        self._rows: dict[int, int] = {}  # by client index

    @property
    def max_rank(self) -> int:
        """The highest step."""
        return self.steps[-1]

    @property
    def may_differ(self) -> bool:
        """Whether the steps differ."""
        return len(set(self.steps)) > 1

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the step of each client."""
        self._rows = {c.index: c.num_examples for c in clients if c.num_examples}
        known = sorted(self._rows.values())
        median = known[len(known) // 2] if known else 0
        order = sorted(clients, key=lambda c: (self._rows.get(c.index, median), c.index))
        step = {c.index: self.steps[i * len(self.steps) // len(order)] for i, c in enumerate(order)}
        return [step[client.index] for client in clients]

    def explain(self) -> Explanation:
        """Return the rows, which the record has anyway, where they are not known."""
        return Explanation(notes=() if self._rows else ("nobody said how many rows it has",))

    def summary(self) -> str:
        """Return the steps in one line."""
        return f"{self.name} ({', '.join(map(str, self.steps))})"


class RandomRank(RankPolicy):
    """Ranks by chance, with a given mean: what a policy that looks at clients has to beat.

    Each client draws a number from [0, 1) once, whoever else is there, and the sum of ranks is
    divided in these proportions.

    Parameters
    ----------
    mean : float (default: 8)
        Of the connected clients.
    min_rank, max_rank : int (default: 4, 32)
    seed : int (default: 42)

    Raises
    ------
    ValueError
        If the limits are out of order, or the mean is not between them.
    """

    name = "random"
    divides_budget = True

    def __init__(
        self, mean: float = 8, min_rank: int = 4, max_rank: int = 32, *, seed: int = 42
    ) -> None:
        self.min_rank, self._max_rank = at_least_one("min_rank", min_rank), max_rank
        self.mean, self.seed = mean_between(mean, min_rank, max_rank), seed
        self._notes: list[str] = []

    @property
    def max_rank(self) -> int:
        """The largest rank a client can draw."""
        return self._max_rank

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the rank of each client."""
        total, rest = whole_budget(self.mean, len(clients))
        draws = [stream(self.seed, "random-rank", c.index).random() for c in clients]
        caps = caps_of(clients, self.max_rank)
        ranks, note = divided(draws, total, self.min_rank, self.max_rank, caps)
        self._notes = [text for text in (rest, note) if text]
        return [int(rank) for rank in ranks]

    def explain(self) -> Explanation:
        """Return what the limits did not allow."""
        return Explanation(notes=self._notes)

    def summary(self) -> str:
        """Return the settings in one line."""
        return f"{self.name} ({self.min_rank} to {self.max_rank}, mean {self.mean:g})"
