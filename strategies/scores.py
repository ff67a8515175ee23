"""How good a model is, in numbers that say themselves how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FEW = 4  # numbers of which only the name is known, in a line of the log


@dataclass(frozen=True)
class Score:
    """One number that says how good a model is.

    Parameters
    ----------
    name : str
        Its key in records and files: ``macro_f1``.
    label : str
        Its name for people, on axes and in tables: ``macro-F1``.
    higher_is_better : bool (default: True)
    top : float, optional
        The best there can be, the end of an axis (default: 1.0; None: there is none).
    digits : int (default: 3)
        Decimals for people.
    short : str, optional
        Its name in the log, where a round is one line (default: the label).
    """

    name: str
    label: str
    higher_is_better: bool = True
    top: float | None = 1.0
    digits: int = 3
    short: str = ""

    def text(self, value: float | None) -> str:
        """Return a value for people; a dash where there is none."""
        return "–" if value is None else f"{value:.{self.digits}f}"

    def best(self, values: Sequence[float]) -> float:
        """Return the best of some values."""
        return max(values) if self.higher_is_better else min(values)

    def worst(self, values: Sequence[float]) -> float:
        """Return the worst of some values."""
        return min(values) if self.higher_is_better else max(values)

    def reached(self, value: float, target: float) -> bool:
        """Tell whether a value is as good as the target."""
        return value >= target if self.higher_is_better else value <= target


LOSS = Score("loss", "loss", higher_is_better=False, top=None, short="test loss")
"""Every task has it: the mean over rows of what is minimised, in nats where it is a likelihood."""


def undeclared(name: str) -> Score:
    """Return what is taken for granted of a number of which only the name is known."""
    return LOSS if name == LOSS.name else Score(name, name, top=None)


def shown(scores: Sequence[Score], metrics: Mapping[str, float]) -> str:
    """Return the declared scores for the log; where none is, some of what there is."""
    known = [score for score in scores if score.name in metrics]
    if not known:
        names = [name for name in metrics if not _derived(name, metrics)]
        known = [undeclared(name) for name in names if name != LOSS.name][:FEW]
        known = known or [undeclared(name) for name in names]
    return " ".join(f"{s.short or s.label} {s.text(metrics[s.name])}" for s in known)


def _derived(name: str, metrics: Mapping[str, float]) -> bool:
    """Tell whether it is the worst or the spread of another one, as ``rounds.spread`` adds."""
    ends = ("_worst", "_spread")
    return any(name.endswith(end) and name.removesuffix(end) in metrics for end in ends)
