"""Logits where something is trained, a part of them at a time, and not of prompts and padding.

A large vocabulary makes the last layer a good part of a step, and its logits most of the memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.tasks.base import Indices, Inputs
from fedlora_app.tasks.packing import small_twin
from fedlora_app.tasks.sequences import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class AnswersAlone:
    """Rows with batches that ask the model for logits where one of them is trained; same loss.

    Parameters
    ----------
    rows : Sequences or Packed
    parts : bool (default: False)
        Whether the model is such that ``loss_in_parts`` gives the same loss.
    """

    rows: Inputs
    parts: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self.rows.sizes

    def take(self, indices: Sequence[int] | Indices) -> AnswersAlone:
        """Return the rows at ``indices``, in that order."""
        return AnswersAlone(self.rows.take(indices), self.parts)

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some rows, with which of the logits are computed and what they predict."""
        return with_few_logits(self.rows.batch(indices))

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Have a model that is trained on these rows compute its loss in parts, where it can."""
        from fedlora_app.tasks.loss_in_parts import loss_in_parts

        base: Any = getattr(model, "get_base_model", lambda: model)()
        moves = any(p.requires_grad for p in base.get_output_embeddings().parameters())
        if not self.parts or moves:
            yield
            return
        with loss_in_parts(base):
            yield


def with_few_logits(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with ``logits_to_keep`` and what these are to predict."""
    from torch.nn import functional

    after = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    kept = (after != IGNORED).any(0).nonzero().squeeze(1)
    if not len(kept):
        return batch
    return {**batch, "logits_to_keep": kept, "shift_labels": after[:, kept]}


def takes_few_logits(model: nn.Module) -> bool:
    """Return whether a model of this kind computes the same loss from a part of the logits.

    Tried on one layer of each kind with random weights.
    """
    return _same_loss(model, nullcontext)


def takes_parts(model: nn.Module) -> bool:
    """Return whether it does so from what ``loss_in_parts`` makes of them; tried likewise."""
    from fedlora_app.tasks.loss_in_parts import loss_in_parts

    return _same_loss(model, loss_in_parts)


def _same_loss(model: nn.Module, inside: Callable[[Any], AbstractContextManager[Any]]) -> bool:
    import torch

    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        return False
    try:
        with small_twin(model) as small:
            ids = torch.randint(4, 60, (2, 9))
            labels = ids.masked_fill(torch.arange(9) < torch.tensor([[3], [5]]), IGNORED)
            batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
            whole = small(**batch)
            with inside(small):
                part = small(**with_few_logits(batch))
    except Exception:  # code of any model's, which may raise anything: then all are computed
        return False
    return part.logits.shape[1] == 6 and bool(torch.isclose(whole.loss, part.loss, rtol=1e-4))
