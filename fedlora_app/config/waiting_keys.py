"""The keys of waiting: when a round is over, and what becomes of who is later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from fedlora_app.config.fields import option

if TYPE_CHECKING:  # torch comes with it, and who reads keys needs none
    from strategies.round.waiting import Waiting


@dataclass(frozen=True)
class RoundConfig:
    """For whom a round waits."""

    mode: str = option(
        "synchronous",
        "synchronous (rounds), buffered (a new model after every round.buffer replies, while "
        "round.busy clients train) or asynchronous (after every reply); auto: rounds, rounds with "
        "a deadline or buffered, whichever is promised to end soonest (with sampling.policy = "
        "planned and a simulated clock)",
        choices=("synchronous", "buffered", "asynchronous", "auto"),
        on_resume="fatal",
    )
    quorum: float = option(
        1.0,
        "a round is over with so many good replies: up to 1 a share of those asked, above 1 their "
        "number; 1: everybody's",
        above=0,
    )
    deadline: str = option(
        "0",
        "seconds of the run's clock after which a round is over; auto: twice what the slowest is "
        "expected to need, once that was measured; 0: only who is silent for ten times as long, or "
        "gone by the SuperLink's word, is not waited for",
        or_number=True,
    )
    over_selection: float = option(
        0.0, "so many more clients are asked, as a share, and the first replies taken", low=0
    )
    staleness: str = option(
        "auto",
        "a reply that comes s rounds late counts (1 + s)^-a, a being this; 0: in full; drop: not "
        "at all; auto: 0.5 where rule and privacy allow it, else drop",
        or_number=True,
    )
    buffer: int = option(10, "buffered: replies to a new model", low=1)
    busy: int = option(
        0,
        "buffered, asynchronous: clients that train at a time; 0: as many as sampling chooses",
        low=0,
    )

    def waiting(self) -> Waiting:
        """Return what the keys mean."""
        from strategies.round.waiting import Mode, Waiting

        return Waiting(
            quorum=self.quorum,
            deadline=_number_or(self.deadline, "deadline", "auto"),
            over_selection=self.over_selection,
            staleness=_number_or(self.staleness, "staleness", "auto", "drop"),
            mode=cast(Mode, "synchronous" if self.mode == "auto" else self.mode),
            buffer=self.buffer,
            busy=self.busy,
        )


def _number_or(text: str, key: str, *words: str) -> Any:
    if text in words:
        return cast(Literal["auto"], text)
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{key}: expected a number or {' or '.join(words)}, got {text!r}"
        ) from None
