"""Which models a run may go back to, and how many rounds made the one at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flwr.app import ArrayRecord


@dataclass
class Progress:
    """The model a run started from, one put aside, and their ages.

    Parameters
    ----------
    initial : ArrayRecord, optional
        The model of round 0.
    rounds : int
        How many rounds made the model at hand.
    aside : ArrayRecord, optional
        A model put aside, to come back to.
    aside_rounds : int
        How many rounds made that one.
    """

    initial: ArrayRecord | None = None
    rounds: int = 0
    aside: ArrayRecord | None = None
    aside_rounds: int = 0

    def go(self, where: Literal["start", "back"] | None, arrays: ArrayRecord) -> ArrayRecord:
        """Return the model to go on with, and put ``arrays``, the one at hand, aside.

        Parameters
        ----------
        where : "start", "back" or None
            To the initial model (``arrays`` is put aside), to the one put aside, or nowhere.
        arrays : ArrayRecord
            The model at hand.
        """
        if where == "start" and self.initial is not None:
            self.aside, self.aside_rounds, self.rounds = arrays, self.rounds, 0
            return self.initial
        if where == "back" and self.aside is not None:
            found, self.aside, self.rounds = self.aside, None, self.aside_rounds
            return found
        return arrays
