"""Noise that a strategy around this one adds to the model, as Flower's wrappers for privacy do.

``DifferentialPrivacyClientSideFixedClipping(FedLoRA(…), …)`` and its three sisters add noise to
what ``FedLoRA`` returns. How much rests on one thing: that one of m clients moves the model by
no more than 1/m of the bound to which its update was clipped. That is so for a plain mean
alone, and the wrapper has no way to ask. So the strategy, which knows, refuses what would get
too little noise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from strategies.aggregation import Aggregator
from strategies.promises import declares

#: In a config: the bound of Flower's clipping mods, which its wrappers on the client's side set.
CLIPPING_NORM = "clipping_norm"
# Wire types in which the numbers of an update are numbers; the others are codes.
_CLIPPED = ("float32", "float16")


class OutsideNoise:
    """Whether a strategy around this one adds noise for privacy, and what it would fall short of.

    Parameters
    ----------
    told : bool, optional
        Whether one does. (default: that is seen, by ``clipping_norm`` in the config of a loop
        that is not ours, or by a model that comes back changed)
    """

    def __init__(self, told: bool | None) -> None:
        if told not in (True, False, None):
            raise TypeError(f"noised_outside: expected True, False or None, got {told!r}")
        #: Whether noise is known to be added: then every client counts the same, and a round
        #: in which one is missing leaves the model as it was.
        self.expected = told is True
        self._watching = told is None
        self._returned: ArrayRecord | None = None
        self._problems: list[str] = []

    def look_at(self, config: Mapping[str, Any]) -> None:
        """Take it from the config of another's loop that noise is to be expected."""
        if self._watching and CLIPPING_NORM in config:
            self.expected = True

    def check(self, problems: Collection[str]) -> None:
        """Refuse noise that is known to be too little, before anything is sent.

        Raises
        ------
        ValueError
            With every reason.
        """
        if self.expected and problems:
            raise ValueError(_refusal(
                "a strategy around this one adds noise for privacy, or clips for it", problems,
                "to clip alone, give FedLoRA(clip_norm=…) or noised_outside=False",
            ))  # fmt: skip

    def returned(self, arrays: ArrayRecord, problems: Collection[str]) -> None:
        """Remember what was returned, and why noise on it would be too little."""
        if self._watching:
            self._returned, self._problems = arrays, list(problems)

    def came_back(self, arrays: ArrayRecord) -> None:
        """See whether the model that was returned has been changed since.

        Raises
        ------
        ValueError
            If it has, and the change would be too little if it were noise for privacy.
        """
        before, self._returned = self._returned, None
        if before is None or _same(before, arrays):
            return
        self.expected = True
        if self._problems:
            raise ValueError(_refusal(
                "the model came back changed: if that is noise for privacy", self._problems,
                "if it is no such noise, say noised_outside=False",
            ))  # fmt: skip


def short_of_noise(
    rule: Aggregator[Any], wire_dtype: str, *, independent: bool, ranks_differ: bool
) -> list[str]:
    """Return why one of m clients may move the model by more than 1/m of its bound.

    Parameters
    ----------
    rule : Aggregator
    wire_dtype : str
        How numbers travel.
    independent : bool
        Whether clients join by coins of their own.
    ranks_differ : bool
        Whether clients have different ranks, or may have.
    """
    problems = []
    if not declares(rule, "linear"):
        problems.append(
            f"aggregation {rule.name!r} is no mean of the updates, and nobody knows how far one "
            "client moves it; use aggregation='zero-padding', or 'replication' with one rank for "
            "all"
        )
    elif ranks_differ and not declares(rule, "mean_of_all"):
        problems.append(
            f"aggregation {rule.name!r} averages a number over the clients that hold it, and "
            "ranks differ: who holds one alone moves it by the whole bound; use one rank for all "
            "(UniformRank), or aggregation='zero-padding'"
        )
    if independent:
        problems.append(
            "clients join by coins, as many as it happens to be, and weigh by their chances; use "
            "FractionSampling(clients=m)"
        )
    if wire_dtype not in _CLIPPED:
        problems.append(
            f"with wire_dtype={wire_dtype!r} an update travels as codes, which nobody can clip; "
            "use 'float32'"
        )
    return problems


def short_in_this_round(weights: Collection[float], asked: int) -> list[str]:
    """Return the same of a round that is over.

    Parameters
    ----------
    weights : Collection[float]
        Of the updates in the aggregate.
    asked : int
        How many clients were asked.
    """
    problems = []
    if weights and max(weights) > (1 + 1e-6) * min(weights):
        problems.append(
            f"clients count by num-examples, from {min(weights):g} to {max(weights):g}, and one "
            f"moves the model by {max(weights) / sum(weights):.2g} of the bound instead of "
            f"1/{len(weights)}; say noised_outside=True, and everyone counts the same"
        )
    if len(weights) < asked:
        problems.append(
            f"{asked - len(weights)} of {asked} replies were left out, which the one that adds "
            "noise did not see; say noised_outside=True, and such a round changes nothing"
        )
    return problems


def _refusal(seen: str, problems: Collection[str], way_out: str) -> str:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"{seen}, it presumes that one of m clients moves the model by at most 1/m of the bound "
        f"of its update, and would be too little here:\n{lines}\nFedLoRA(privacy=…) has an "
        f"accountant of its own that knows all rules; {way_out}"
    )


def _same(one: ArrayRecord, other: ArrayRecord) -> bool:
    """Tell whether two records hold the same numbers."""
    if one is other:
        return True
    return list(one) == list(other) and all(
        a.data == b.data or np.array_equal(a.numpy(), b.numpy())
        for a, b in zip(one.values(), other.values(), strict=True)
    )
