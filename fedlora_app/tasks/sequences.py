"""Token ids in memory, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora_app.tasks.base import Indices, Inputs

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label that models and losses leave out


def trained_tokens(inputs: Inputs) -> NDArray[np.int32]:
    """Return all tokens of some rows that are trained, in order."""
    labels: Sequence[NDArray[np.int32]] = getattr(inputs, "labels", ())
    return np.concatenate([np.zeros(0, np.int32), *(row[row != IGNORED] for row in labels)])


@dataclass(frozen=True)
class Sequences:
    """Token ids of n rows and what of them is trained; padded on the right, batch by batch.

    Parameters
    ----------
    ids : list of n ndarrays of int32, shape (tokens,)
    labels : list of n ndarrays of int32, shape (tokens,)
        The same, ``-100`` where a token is read and not trained.
    padding : int
        The token that fills up.
    """

    ids: list[NDArray[np.int32]]
    labels: list[NDArray[np.int32]]
    padding: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.array([len(row) for row in self.ids], dtype=np.int64)

    def take(self, indices: Sequence[int] | Indices) -> Sequences:
        """Return the rows at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        return Sequences(
            [self.ids[i] for i in chosen], [self.labels[i] for i in chosen], self.padding
        )

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some rows, padded to the longest of them; int64 tensors."""
        import torch

        chosen = [int(i) for i in indices]
        width = -(-max(len(self.ids[i]) for i in chosen) // 8) * 8
        ids = np.full((len(chosen), width), self.padding, dtype=np.int64)
        labels = np.full((len(chosen), width), IGNORED, dtype=np.int64)
        mask = np.zeros((len(chosen), width), dtype=np.int64)
        for row, i in enumerate(chosen):
            length = len(self.ids[i])
            ids[row, :length], labels[row, :length] = self.ids[i], self.labels[i]
            mask[row, :length] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
