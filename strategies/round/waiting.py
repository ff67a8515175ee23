"""For whom a round waits, how long, and what becomes of who is later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from strategies.aggregation import Aggregator
from strategies.aggregation.late import refuse_late as refuse_by_rule
from strategies.sampling import Sampler

Mode = Literal["synchronous", "buffered", "asynchronous"]

#: The discount of a late reply unless it is said: FedBuff's 1/√(1+s).
STALENESS = 0.5


@dataclass(frozen=True)
class Waiting:
    """For whom a round waits, how long, and what becomes of who is later.

    Seconds and order are those of the run's clock: real ones, or a simulated clock's.

    Parameters
    ----------
    quorum : float (default: 1.0)
        Up to 1 the share of those asked, above 1 the number of good replies with which a round is
        over; 1: everybody's.
    deadline : float or "auto" (default: 0.0)
        Seconds after which a round is over. "auto": twice what the slowest of those asked is
        expected to need, from what was measured, once it was. 0: nobody is cut off but who is
        silent for ten times as long, and a minute at least, and who the SuperLink says is gone.
    over_selection : float (default: 0.0)
        So many more are asked, as a share of those the sampler chooses; the round is over with as
        many good replies as it would have had without, or with ``quorum`` of these.
    staleness : float, "auto" or "drop" (default: "auto")
        A reply that comes s rounds late counts ``(1 + s)^-a`` of its weight, a being this; 0: all
        of it. "drop": it does not count. "auto": a = 0.5 where the rule and the run can take late
        replies, else they are dropped.
    mode : "synchronous", "buffered" or "asynchronous" (default: "synchronous")
        Buffered (FedBuff, https://arxiv.org/abs/2106.06639, as published, without its noise): a
        new model, which is a round, after every ``buffer`` replies, while ``busy`` clients are
        kept busy. Asynchronous (FedAsync, https://arxiv.org/abs/1903.03934: its polynomial
        discount): after every reply; as in FedBuff with a buffer of 1, the model moves by what a
        client has changed, times its discount (this project's decision).
    buffer : int (default: 10)
        K of the buffered mode; with fewer clients than that, all who are there.
    busy : int (default: 0)
        How many clients train at a time; 0: as many as the sampler chooses for a round.

    Raises
    ------
    TypeError, ValueError
        With all that is wrong.
    """

    quorum: float = 1.0
    deadline: float | Literal["auto"] = 0.0
    over_selection: float = 0.0
    staleness: float | Literal["auto", "drop"] = "auto"
    mode: Mode = "synchronous"
    buffer: int = 10
    busy: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected {said}, got {value!r}"
            for name, value, fits, said in (
                ("quorum", self.quorum, _above(self.quorum, 0), "a share up to 1 or a number"),
                ("deadline", self.deadline,
                 self.deadline == "auto" or _above(self.deadline, 0, or_at=True),
                 "seconds, 0 (none) or 'auto'"),
                ("over_selection", self.over_selection,
                 _above(self.over_selection, 0, or_at=True), "0 (nobody more) or a share"),
                ("staleness", self.staleness,
                 self.staleness in ("auto", "drop") or _above(self.staleness, 0, or_at=True),
                 "0 or more, 'auto' or 'drop'"),
                ("mode", self.mode, self.mode in get_args(Mode), f"one of {get_args(Mode)}"),
                ("buffer", self.buffer, _whole(self.buffer, 1), "a whole number from 1"),
                ("busy", self.busy, _whole(self.busy, 0), "a whole number from 0"),
            )
            if not fits
        ]  # fmt: skip
        if not problems and self.quorum > 1 and self.quorum != int(self.quorum):
            problems.append(f"quorum: above 1 it is a number of replies, got {self.quorum!r}")
        if not problems and self.overlaps:
            for name, value in (("quorum", self.quorum != 1), ("deadline", self.deadline != 0),
                                ("over_selection", self.over_selection)):  # fmt: skip
                if value:
                    problems.append(
                        f"{name} ends a synchronous round, and mode = {self.mode!r} has none; "
                        "leave it out"
                    )
            if self.staleness == "drop":
                problems.append(
                    f"staleness: in mode = {self.mode!r} nearly every reply is of an older model; "
                    "give a number, not 'drop'"
                )
        if problems:
            raise ValueError("waiting: " + "; ".join(problems))

    @property
    def overlaps(self) -> bool:
        """Whether clients are asked anew as they answer, not round by round."""
        return self.mode != "synchronous"

    @property
    def closes(self) -> bool:
        """Whether a round may be over before everybody who is alive has answered."""
        return self.overlaps or bool(self.quorum != 1 or self.deadline or self.over_selection)

    def needed(self, chosen: int) -> float:
        """Return with how many good replies a round is over, of so many without over-selection."""
        if self.overlaps:
            return 1 if self.mode == "asynchronous" else self.buffer
        if self.quorum > 1:
            return self.quorum
        if self.quorum == 1 and not self.over_selection:
            return math.inf
        return math.ceil(self.quorum * chosen - 1e-9)

    def more_than(self, chosen: int) -> int:
        """Return how many more are asked than so many."""
        return math.ceil(self.over_selection * chosen - 1e-9)

    def discount(self, staleness: int) -> float:
        """Return what a reply counts that is so many rounds late, as a share of its weight."""
        a = STALENESS if isinstance(self.staleness, str) else self.staleness
        return float((1 + staleness) ** -a)

    def summary(self) -> str:
        """Return the settings in one line."""
        parts: list[str] = [self.mode]
        if self.mode == "buffered":
            parts.append(f"a model after {self.buffer} replies")
        if self.overlaps:
            parts.append(f"{self.busy or 'as many as are sampled'} busy")
        if self.quorum != 1:
            parts.append(f"quorum {self.quorum:g}")
        if self.deadline:
            parts.append(
                f"deadline {self.deadline if self.deadline == 'auto' else f'{self.deadline:g} s'}"
            )
        if self.over_selection:
            parts.append(f"{self.over_selection:.0%} more are asked")
        return ", ".join(parts)


def refuse_waiting(
    waiting: Waiting,
    rule: Aggregator[Any],
    sampler: Sampler,
    *,
    private: bool = False,
    noised_outside: bool = False,
) -> list[str]:
    """Return why a run cannot wait so, each with what to do instead; nothing: it can.

    Parameters
    ----------
    waiting : Waiting
    rule : Aggregator
    sampler : Sampler
    private : bool (default: False)
        Whether clients add noise of their own.
    noised_outside : bool (default: False)
        Whether a strategy around this one does.
    """
    w, problems = waiting, []
    coins = sampler.probabilities([]) is not None
    why = refuse_late(rule, private=private, noised_outside=noised_outside)
    if w.overlaps:
        if why:
            problems.append(f"mode = {w.mode!r} lives on replies to older models, and {why}; use "
                            "mode = 'synchronous'")  # fmt: skip
        if coins:
            problems.append(
                f"mode = {w.mode!r} has no rounds that all could join, and sampling "
                f"{sampler.name!r} has every client join a round by a coin of its own; use "
                "sampling 'fraction'"
            )
    elif why and not isinstance(w.staleness, str):
        problems.append(f"staleness = {w.staleness:g} counts replies to older models, and {why}; "
                        "use staleness = 'drop'")  # fmt: skip
    if w.over_selection and coins:
        problems.append(
            f"over_selection asks for more clients than chosen, and with sampling {sampler.name!r} "
            "each joins by its own probability, by which it is weighed; raise the probabilities, "
            "or use sampling 'fraction'"
        )
    if w.over_selection and private:
        problems.append(
            "over_selection: the privacy that sampling adds is counted for the clients chosen, not "
            "for more; have the sampler choose more"
        )
    if w.closes and noised_outside:
        problems.append(
            "a strategy around this one adds noise for a mean of all that were asked, and a round "
            "that is over early lacks some; leave quorum, deadline, over_selection and mode out"
        )
    return problems


def refuse_late(rule: Aggregator[Any], *, private: bool, noised_outside: bool) -> str:
    """Return why late replies cannot count in a run; empty: they can."""
    if private:
        return (
            "a private run's noise is counted for the replies of one round (what a late one gave "
            "away is counted when it is asked)"
        )
    if noised_outside:
        return "the noise of the strategy around this one is for the replies of one round"
    return refuse_by_rule(rule)


def _above(value: object, low: float, *, or_at: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return False
    return float(value) > low or (or_at and float(value) == low)


def _whole(value: object, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low
