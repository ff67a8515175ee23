"""What one client may do to a model: how far a reply may move it, and how much it may count.

Nobody has published such bounds for clients of different rank; all of this is this project's
decision. They are wide, so that no client of good will meets them, whatever its data: they keep
out what would ruin a model at a stroke. ``clip_norm`` bounds what is left more tightly.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message

from strategies.claims import ReplyError
from strategies.counts import Counts
from strategies.lora import Adapter

#: A change may be so many times the median of the last ones.
NORM_FACTOR = 100.0
#: So many changes make that median; and it is none with fewer clients than the second.
REMEMBERED, FEWEST = 64, 3
#: So many counts are looked at ahead while none are known, that two false ones are no majority.
AHEAD = 5
#: A node's number of examples may be so many times its first, or that part of it.
COUNT_FACTOR = 10.0
#: And in an evaluation so many times what it trains on.
EVALUATION_FACTOR = 100.0
#: Nobody counts more than so many times the median of the others: one site may have a thousand
#: times the data of another, but no single one is the whole model.
OTHERS_FACTOR = 1000.0
#: And with nobody to compare with, no more than this.
MOST_ALONE = 1e9


class Guard:
    """Bounds on what a reply may be, learned from the replies before it.

    A change is compared with the median norm of those of earlier rounds, one for each client.
    Before there are three, it is compared with the adapter that was sent: nobody moves every number
    by a hundred times its size, or by a hundred. Counts are compared with a node's own first count,
    which is why a node cannot go up, or down, step by step, and with the median of the others',
    which is why it cannot begin at the top; in the first round of a run, with some still to come.
    """

    def __init__(self) -> None:
        # Clients and their norms; those of the round in progress wait, so that whoever is first in
        # it does not judge the others.
        self._norms: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._fresh: list[tuple[int, float]] = []
        self._usual: float | None = None  # median of those; None: too few, or not looked for yet
        self._first: dict[int, float] = {}  # count of the first good reply, by client index
        # What a count is compared with: the first ones, and those of this round, some of which are
        # seen beforehand.
        self._counts = Counts()
        self._lasting = True

    def check_norm(self, norm: float, sent: Adapter, noise: float = 0.0) -> None:
        """Refuse a change of a norm that cannot be training's.

        Parameters
        ----------
        norm : float
            L2 norm of everything that moved.
        sent : Adapter
            What the client started from.
        noise : float (default: 0.0)
            Standard deviation of the noise that a private client adds to every number.

        Raises
        ------
        ReplyError
            With the bound.
        """
        bound = NORM_FACTOR * math.sqrt(sent.num_parameters) * (1 + noise)
        if not norm <= bound:  # only then is it worth a pass over all that was sent
            squares = sum(float(t.double().square().sum()) for t in sent.tensors())
            bound += NORM_FACTOR * math.sqrt(squares)
        if self._usual is None:
            self._usual = self._usual_norm()
        if self._usual is not None:
            # Noise is no part of a bad will, and it may be all there is.
            least = noise * math.sqrt(sent.num_parameters)
            bound = min(bound, NORM_FACTOR * max(self._usual, least))
        if not norm <= bound:
            raise ReplyError(
                f"its change has the norm {norm:.3g}, {NORM_FACTOR:g} times what others send is "
                f"{bound:.3g}; lower its learning rate, or see who it is"
            )

    def look_ahead(
        self,
        replies: Iterable[Message],
        count_of: Callable[[Message], tuple[int, float] | None],
        *,
        lasting: bool = True,
    ) -> Iterator[Message]:
        """Pass replies on in their order, seeing the counts of a few beforehand if none are known.

        Parameters
        ----------
        replies : Iterable[Message]
        count_of : callable
            Returns the client index and the count of a reply, if it has one.
        lasting : bool (default: True)
            Whether counts are comparable with those of other rounds, as numbers of examples are.
        """
        self._settle()
        self._counts, self._lasting = Counts(self._first if lasting else None), lasting
        rest, held = iter(replies), []
        while len(self._counts) < AHEAD:
            if (message := next(rest, None)) is None:
                break
            held.append(message)
            if (found := count_of(message)) is not None:
                self._see(*found)
        held.reverse()
        while held:  # not kept here longer than by the caller
            yield held.pop()
        yield from rest

    def check_share(self, index: int, count: float, what: str = "num-examples") -> None:
        """Refuse a count that would make one client the whole model.

        Raises
        ------
        ReplyError
            With what others report.
        """
        most, than = MOST_ALONE, "is believed"
        if (others := self._counts.median_of_others(index)) is not None:
            most = OTHERS_FACTOR * others
            than = f"{OTHERS_FACTOR:g} times what others report ({others:g})"
        if count > most:
            raise ReplyError(
                f"{what} is {count:g}, more than {than}; if it has so much more, let it report "
                f"{most:g} at most"
            )

    def check_count(self, index: int, count: float) -> None:
        """Refuse a number of examples far from the node's first: it would outweigh everybody.

        Only replies are compared with replies: what a node says of itself in a query may be in
        another unit, rows against batches.

        Raises
        ------
        ReplyError
            With both numbers.
        """
        first = self._first.get(index)
        if first is not None and not first / COUNT_FACTOR <= count <= first * COUNT_FACTOR:
            raise ReplyError(
                f"num-examples is {count:g}, but this node reported {first:g} before, in its first "
                "reply (batches in one, rows in the other?); if its data have really changed so "
                "much, let it join the next run instead"
            )

    def check_evaluation(self, index: int, count: float) -> None:
        """Refuse a number of evaluation examples that has nothing to do with those of training.

        Raises
        ------
        ReplyError
            With both numbers.
        """
        first = self._first.get(index)
        if first is None:
            self.check_share(index, count)
        elif count > EVALUATION_FACTOR * first:
            raise ReplyError(
                f"num-examples is {count:g}, but this node trains on {first:g}; more than "
                f"{EVALUATION_FACTOR:g} times as many are not believed"
            )

    def accept(self, index: int, norm: float, count: float) -> None:
        """Remember a reply that was good in every respect."""
        if norm > 0:
            self._fresh.append((index, norm))
        self._first.setdefault(index, count)
        self._see(index, count)

    def _see(self, index: int, count: float) -> None:
        """Have later counts compared with this one, or with the client's first where that lasts."""
        self._counts.set(index, self._first.get(index, count) if self._lasting else count)

    def _settle(self) -> None:
        if self._fresh:
            self._norms.extend(self._fresh)
            self._fresh, self._usual = [], None

    def _usual_norm(self) -> float | None:
        each: dict[int, list[float]] = {}
        for index, one in self._norms:
            each.setdefault(index, []).append(one)
        if len(each) < FEWEST:
            return None
        return _median([_median(norms) for norms in each.values()])

    def forget(self, index: int) -> None:
        """Forget a client's first count: the place is another's now, and so are its rows."""
        self._first.pop(index, None)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned in the rounds so far, as JSON can hold it."""
        self._settle()
        return {
            "changes": [list(change) for change in self._norms],
            "first": {str(index): count for index, count in self._first.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned; nothing is known to an older checkpoint."""
        changes = ((index, norm) for index, norm in state.get("changes", ()))
        self._norms, self._usual = deque(changes, maxlen=REMEMBERED), None
        self._first = {int(index): count for index, count in state.get("first", {}).items()}
        self._counts = Counts(self._first)


def believed_counts(counts: Mapping[int, float]) -> dict[int, float]:
    """Return those of the counts that no other contradicts: see ``OTHERS_FACTOR``."""
    everyone, good = Counts(counts), {}
    for key, count in counts.items():
        others = everyone.median_of_others(key)
        if count <= (MOST_ALONE if others is None else OTHERS_FACTOR * others):
            good[key] = count
    return good


def _median(numbers: Sequence[float]) -> float:
    return float(np.median(numbers))
