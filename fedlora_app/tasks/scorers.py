"""How good a generated answer is beside the one that was wanted: ready scorers, and one's own.

A scorer of one's own is a subclass with a ``name``, registered with ``register_scorer`` in a module
that ``plugins`` names. Needs no torch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from decimal import Decimal
from typing import ClassVar

from strategies.naming import Registry
from strategies.scores import Score

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
MARK = "####"  # after it, GSM8K's answers end with their number
# "(B)", "B.", "answer is B": a letter of its own, not the article of "A train".
LETTER = re.compile(r"(?<![A-Za-z])\(?([A-J])\)?(?=[).:,;]|\s*$)", re.MULTILINE)
SAID = re.compile(r"\b(?:answer|choice|option)(?:\s+is)?\s*:?\s*\**\(?([A-J])\b", re.IGNORECASE)


class Scorer(ABC):
    """Says how good one generated answer is, from 0 to 1; the score of a run is the mean."""

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    """For people, on axes and in tables (default: the name)."""

    @abstractmethod
    def score(self, given: str, wanted: str) -> float:
        """Return how good an answer is.

        Parameters
        ----------
        given : str
            What the model wrote, without its end of turn.
        wanted : str
            The answer of the data.
        """

    @property
    def as_score(self) -> Score:
        """The score that records and pages know it by."""
        return Score(self.name.replace("-", "_"), self.label or self.name)


SCORERS: Registry[type[Scorer]] = Registry()


def register_scorer(cls: type[Scorer]) -> type[Scorer]:
    """Make a scorer available by its ``name``, for the key ``evaluate.scorer``.

    Raises
    ------
    ValueError
        If it has no name, or another scorer has it.
    """
    return SCORERS.register(cls)


@register_scorer
class Exact(Scorer):
    """The same words: blanks around and between them do not count."""

    name = "exact"
    label = "exact answers"

    def score(self, given: str, wanted: str) -> float:
        """Return 1 or 0."""
        return float(given.split() == wanted.split())


@register_scorer
class FinalNumber(Scorer):
    """The same number at the end, as GSM8K is scored: after ``####``, or else the last there is.

    ``1,234``, ``$1234`` and ``1234.0`` are one number.
    """

    name = "number"
    label = "right numbers"

    def score(self, given: str, wanted: str) -> float:
        """Return 1 or 0; 0 where either has no number."""
        right, found = final_number(wanted), final_number(given)
        return float(right is not None and found == right)


@register_scorer
class Choice(Scorer):
    """The same letter, A to J: ``answer is B``, or else the first that stands by itself."""

    name = "choice"
    label = "right choices"

    def score(self, given: str, wanted: str) -> float:
        """Return 1 or 0; 0 where either has no letter."""
        right, found = choice_letter(wanted), choice_letter(given)
        return float(right is not None and found == right)


def final_number(text: str) -> Decimal | None:
    """Return the number a text ends with, or None."""
    _, mark, after = text.rpartition(MARK)
    found = NUMBER.findall(after)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).replace(",", ""))


def choice_letter(text: str) -> str | None:
    """Return the letter a text chooses, or None."""
    found = SAID.search(text) or LETTER.search(text)
    return found[1].upper() if found else None
