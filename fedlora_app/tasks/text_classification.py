"""Fine-tune a language model to classify texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app import packaged
from fedlora_app.columns import TEXT_COLUMNS, has_column, text_column
from fedlora_app.labels import Fail
from fedlora_app.tables import Table
from fedlora_app.tasks.base import About, Indices, Rows, register_task
from fedlora_app.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor, nn

LOOKED_AT = 200  # texts that show whether the tokenizer knows their words
UNKNOWN = 0.5  # of their tokens: more, and it is the tokenizer of another model


@register_task
class TextClassification(Classification):
    """Texts by their label: ``AutoModelForSequenceClassification``, or a mean-pool head."""

    name = "text-classification"
    peft_type = "SEQ_CLS"
    key = "data.text-column"

    # ----- rows

    def item_columns(self, table: Table, label: str) -> dict[str, str]:
        """Return the column of the texts."""
        return {"text": text_column(table, self.config.data, label)}

    def knows_items(self, table: Table) -> bool:
        """Tell whether there is a column of texts."""
        return has_column(table, self.config.data.text_column, TEXT_COLUMNS)

    def item(self, values: Mapping[str, Any], fail: Fail) -> str:
        """Return the text; refuse what is none."""
        ((column, text),) = values.items()
        if not isinstance(text, str):
            fail("expected a text", f"{text!r} in column {column!r}", "write it as a string")
        if not text.isascii() and not _encodes(text):
            fail(
                "expected a text, but it holds half a character (a lone surrogate)",
                remedy="remove it, or write U+FFFD for it",
            )
        return text

    def test_rows(self, about: About | None = None) -> Rows:
        """Return the test rows; of 20 Newsgroups without the seven posts that trained."""
        rows = super().test_rows(about)
        if self.config.data.name != packaged.PREFIX + "20newsgroups":
            return rows
        known = set(self.train_rows(about).items)
        return rows.take([i for i, text in enumerate(rows.items) if text not in known])

    def show(self, rows: Rows) -> list[str]:
        """Return the first text and its label, and how long the longest is."""
        if not len(rows):
            return []
        first = " ".join(rows.items[0].split())
        first = first[:60] + "…" if len(first) > 60 else first
        longest = max(rows.items, key=len)
        return [
            f"  first: {first!r} → {rows.about['labels'][rows.targets[0]]}",
            f"  longest text: {len(longest.split())} words, {len(longest)} characters",
        ]

    # ----- the model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, with a padding token."""
        from fedlora_app.models import build_tokenizer

        return build_tokenizer(self.config.model)

    def encode(self, rows: Rows) -> Tokens:
        """Return token ids, at most ``data.max-length`` (and what the model takes) each."""
        return tokenize(rows, self.tokenizer, self.config.data.max_length)

    def fill(self) -> dict[str, int]:
        """Return the padding token, behind a mask of zeros."""
        return {"input_ids": int(self.tokenizer.pad_token_id), "attention_mask": 0}

    def model(
        self, about: About, *, seed: int, precision: str = "float32", shapes_only: bool = False
    ) -> nn.Module:
        """Return a sequence classifier; see ``models.build_model``."""
        from fedlora_app.models import build_model

        return build_model(
            self.config.model,
            num_labels=len(about["labels"]),
            seed=seed,
            precision=precision,
            shapes_only=shapes_only,
        )

    def problems(self, model: nn.Module, rows: Rows) -> list[str]:
        """Return what of tokenizer, texts, lengths and model does not go together."""
        from fedlora_app.models import positions

        name, wanted = self.config.model.name, self.config.data.max_length
        found = self._foreign_tokens(model, rows.items[:LOOKED_AT])
        if (most := positions(model)) is not None and wanted > most:
            found.append(
                f"data.max-length: {wanted} tokens, but model.name = {name!r} has {most} "
                f"positions; set data.max-length={most}"
            )
        return found

    def _foreign_tokens(self, model: nn.Module, texts: Sequence[str]) -> list[str]:
        name, tokenizer = self.config.model.name, self.tokenizer
        embedding: Any = getattr(model, "encoder", model)
        rows = embedding.get_input_embeddings().num_embeddings
        words = tokenizer.get_vocab()
        last = max(words, key=words.__getitem__)
        if words[last] >= rows:
            more = sum(number >= rows for number in words.values())
            return [
                f"model.name = {name!r}: the tokenizer knows {more} tokens more than the model, "
                f"whose embedding has {rows} rows (such as {last!r}, number {words[last]}); take "
                "the tokenizer the model was trained with, or resize its embedding and save it"
            ]
        unknown = tokenizer.unk_token_id
        if not texts or unknown is None:
            return []
        ids = [
            token
            for row in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            for token in row
        ]
        share = ids.count(unknown) / len(ids) if ids else 1.0
        if share > UNKNOWN:
            return [
                f"model.name = {name!r}: {share:.0%} of the tokens of the first {len(texts)} texts "
                "are unknown to its tokenizer; take the tokenizer's files that the model was "
                "trained with, and a model for the language of the texts"
            ]
        return []


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, padded on the right to the longest of them.

    Parameters
    ----------
    input_ids : int32 Tensor, shape (n, longest)
        Token ids.
    sizes : ndarray of int64, shape (n,)
        Tokens of each text before the padding.
    labels : ndarray of int64, shape (n,)
        Label ids.
    """

    input_ids: Tensor
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | Indices) -> Tokens:
        """Return the rows at ``indices``, in that order."""
        import torch

        chosen = np.asarray(indices, dtype=np.int64)
        ids = self.input_ids[torch.from_numpy(chosen)]
        return Tokens(ids, self.sizes[chosen], self.labels[chosen])

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some rows, padded to the longest of them; int64 tensors."""
        import torch

        chosen = np.asarray(indices, dtype=np.int64)
        sizes = self.sizes[chosen]
        # Few distinct widths, in steps of 8, suit both the matrix kernels and the allocator.
        width = min(-(-int(sizes.max()) // 8) * 8, self.input_ids.shape[1])
        ids = self.input_ids[torch.from_numpy(chosen), :width].long()
        mask = torch.arange(width) < torch.from_numpy(sizes)[:, None]
        labels = torch.from_numpy(self.labels[chosen])
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def tokenize(rows: Rows, tokenizer: Any, max_length: int) -> Tokens:
    """Turn texts into token ids, at most ``max_length`` (and what the model takes) each."""
    import torch

    labels: NDArray[np.int64] = rows.targets
    if not len(rows):
        return Tokens(torch.zeros(0, 0, dtype=torch.int32), labels, labels)
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(list(rows.items), truncation=True, max_length=limit)["input_ids"]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    padded = np.full((len(rows), lengths.max()), tokenizer.pad_token_id, dtype=np.int32)
    # One assignment through a mask: a loop over rows takes several times as long.
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(encoded)
    return Tokens(torch.from_numpy(padded), lengths, labels)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
