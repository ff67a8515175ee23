"""Several rows in one sequence: less padding, and no row sees another.

Transformers' own way of packing: without a mask and without a cache (``config.use_cache``),
positions that start anew say where a row begins, and attention keeps to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.tasks.sequences import IGNORED, Sequences

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedlora_app.tasks.base import Indices


@dataclass(frozen=True)
class Packed:
    """Rows of which a batch holds several in a sequence; the sum of their losses is the same.

    Parameters
    ----------
    rows : Sequences
    most : int
        Tokens of a sequence, unless a row has more by itself.
    """

    rows: Sequences
    most: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self.rows.sizes

    def take(self, indices: Sequence[int] | Indices) -> Packed:
        """Return the rows at ``indices``, in that order."""
        return Packed(self.rows.take(indices), self.most)

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some rows in as few sequences as they fit in; ``position_ids`` tell them apart."""
        import torch

        chosen = [int(i) for i in indices]
        bins = fit([len(self.rows.ids[i]) for i in chosen], self.most)
        width = max(sum(len(self.rows.ids[chosen[i]]) for i in one) for one in bins)
        width = -(-width // 8) * 8
        ids = np.full((len(bins), width), self.rows.padding, dtype=np.int64)
        labels = np.full((len(bins), width), IGNORED, dtype=np.int64)
        places = np.zeros((len(bins), width), dtype=np.int64)  # padding: rows of one token each
        for line, one in enumerate(bins):
            start = 0
            for i in (chosen[j] for j in one):
                end = start + len(self.rows.ids[i])
                ids[line, start:end], labels[line, start:end] = (
                    self.rows.ids[i],
                    self.rows.labels[i],
                )
                labels[line, start] = IGNORED  # or the row before would predict it
                places[line, start:end] = np.arange(end - start)
                start = end
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(places),
            "labels": torch.from_numpy(labels),
        }


def fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Return which sizes go together so that none of the sums is above ``most``.

    The largest first, each into the first bin with room: at most 11/9 of the fewest bins, and one
    more. A size above ``most`` is alone.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((b for b, free in enumerate(room) if free >= sizes[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(most)
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins


def packing_problem(model: nn.Module) -> str:
    """Return why rows cannot share a sequence in a model of this kind; empty: they can.

    Tried on one layer of each kind with random weights: whether a row's logits behind another row
    are those it has alone. A list of names would be wrong with the next release of transformers.

    Parameters
    ----------
    model : nn.Module
        A causal model of transformers; its weights are not looked at.
    """
    import torch

    kind: Any = type(model)
    if getattr(kind, "_is_stateful", False):
        return f"{kind.__name__} carries a state from one row of a sequence into the next"
    try:
        with small_twin(model) as small:
            first, second = torch.randint(4, 60, (2, 1, 9))
            places = torch.arange(9).unsqueeze(0)
            alone = small(input_ids=second, position_ids=places).logits
            behind = small(
                input_ids=torch.cat([first, second], 1), position_ids=torch.cat([places] * 2, 1)
            ).logits[:, 9:]
    except Exception as error:  # code of any model's, which may raise anything
        return f"{kind.__name__} cannot be tried out with packed rows ({error})"
    if torch.allclose(alone, behind, rtol=0, atol=1e-4 * float(alone.abs().max())):
        return ""
    return f"in {kind.__name__} packed rows would see each other"


@contextmanager
def small_twin(model: nn.Module) -> Iterator[Any]:
    """Give a model of the same kind with few layers and tokens, to try something without gradients.

    Random numbers inside the block are the same each time, and the caller's stay as they are.
    """
    import torch

    from fedlora_app.models.loading import untouched_rng

    kind: Any = type(model)
    with untouched_rng(), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        yield kind(_small(model.config)).eval()


def _small(settings: Any) -> Any:
    """Return a configuration of one layer of each kind, at least two, and a few tokens."""
    small = copy.deepcopy(settings)
    kinds = getattr(small, "layer_types", None)
    if kinds:
        small.layer_types = [*dict.fromkeys(kinds), kinds[0]]
    small.num_hidden_layers = len(small.layer_types) if kinds else 2
    small.vocab_size, small.pad_token_id, small.use_cache = 64, None, False
    return small
