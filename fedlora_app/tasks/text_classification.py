"""Fine-tune a language model to classify texts, or pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data import packaged
from fedlora_app.data.columns import has_texts, text_columns
from fedlora_app.data.kept import fingerprint
from fedlora_app.data.labels import Fail
from fedlora_app.data.tables import Table
from fedlora_app.discretion import DataError
from fedlora_app.tasks import snippets
from fedlora_app.tasks.base import About, Indices, Rows, register_task
from fedlora_app.tasks.classification import Classification
from fedlora_app.tasks.use import Asked, Tokenized

if TYPE_CHECKING:
    from torch import Tensor, nn

LOOKED_AT = 200  # texts that show whether the tokenizer knows their words
UNKNOWN = 0.5  # of their tokens: more, and it is the tokenizer of another model


@register_task
class TextClassification(Tokenized, Classification):
    """Texts by their label: ``AutoModelForSequenceClassification``, or a mean-pool head.

    An item is a text, or a tuple of two where the data hold pairs; ``about["pairs"]`` says so.
    """

    name = "text-classification"
    peft_type = "SEQ_CLS"
    pipeline = "text-classification"
    key = "data.text-column"

    # ----- rows

    def item_columns(self, table: Table, label: str) -> dict[str, str]:
        """Return the column of the texts, or the two of pairs."""
        return text_columns(table, self.config.data, label)

    def knows_items(self, table: Table) -> bool:
        """Tell whether there are columns of texts."""
        return has_texts(table, self.config.data.text_column)

    def item(self, values: Mapping[str, Any], fail: Fail) -> str | tuple[str, ...]:
        """Return the text, or the pair; refuse what is none."""
        for column, text in values.items():
            if not isinstance(text, str):
                fail("expected a text", f"{text!r} in column {column!r}", "write it as a string")
            if not text.isascii() and not _encodes(text):
                fail(
                    "expected a text, but it holds half a character (a lone surrogate)",
                    remedy="remove it, or write U+FFFD for it",
                )
        texts = tuple(values.values())
        return texts if len(texts) > 1 else texts[0]

    def rows(self, table: Table, about: About | None, place: str) -> Rows:
        """Return texts or pairs with their labels; of the other nodes' kind."""
        rows = super().rows(table, about, place)
        texts = ("text", "second text")  # beside them are the label, and whose a row is
        columns = [name for role, name in rows.origin.columns.items() if role in texts]
        pairs = len(columns) > 1
        if about is not None and pairs != about.get("pairs", False):
            kinds = ("single texts", "pairs of texts")
            raise DataError(
                table.place(None)[0] if table.parts else place,
                f"expected {kinds[not pairs]}, which the run trains on",
                f"{kinds[pairs]} in column {' and '.join(map(repr, columns))}",
                "name its columns alike everywhere, or set data.text-column",
            )
        return replace(rows, about={**rows.about, "pairs": True}) if pairs else rows

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
        firsts = [" ".join(text.split()) for text in _texts(rows.items[:1])]
        first = " + ".join(repr(f[:60] + "…" if len(f) > 60 else f) for f in firsts)
        longest = max(_texts(rows.items), key=len)
        return [
            f"  first: {first} → {rows.about['labels'][rows.targets[0]]}",
            f"  longest text: {len(longest.split())} words, {len(longest)} characters",
        ]

    # ----- the model

    def encode(self, rows: Rows) -> Tokens:
        """Return token ids, at most ``data.max-length`` (and what the model takes) each."""
        return tokenize(rows, self.tokenizer, self.config.data.max_length)

    def fingerprint(self, rows: Rows) -> bytes | None:
        """Return the rows and the state of the tokenizer's files."""
        return fingerprint(rows, packaged.tokenizer_name(self.config.model.name))

    def restored(self, fields: Mapping[str, Any]) -> Tokens:
        """Return token ids that ``encode`` returned before."""
        return Tokens(**fields)

    def fill(self) -> dict[str, int]:
        """Return the padding token, behind a mask of zeros."""
        pad = int(self.tokenizer.pad_token_id)
        return {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}

    def model(
        self, about: About, *, seed: int, precision: str = "float32", shapes_only: bool = False
    ) -> nn.Module:
        """Return a sequence classifier; see ``models.build_model``."""
        from fedlora_app.models.loading import build_model

        return build_model(
            self.config.model,
            num_labels=len(about["labels"]),
            seed=seed,
            precision=precision,
            shapes_only=shapes_only,
        )

    def asked(self, table: Table, columns: Mapping[str, str], about: About) -> Asked:
        """Return the texts or pairs of a table, of the kind that was trained."""
        found = super().asked(table, columns, about)
        first = next(iter(found.items.values()), None)
        if first is not None and isinstance(first, tuple) != about.get("pairs", False):
            kinds = ("single texts", "pairs of texts")
            raise DataError(
                table.place(None)[0],
                f"expected {kinds[about.get('pairs', False)]}, which the run was trained on",
                kinds[isinstance(first, tuple)],
                "set data.text-column",
            )
        return found

    def describe(self, model: nn.Module, about: About) -> None:
        """Write the names of the labels into the model's config, the length into the tokenizer."""
        super().describe(model, about)
        most = min(self.config.data.max_length, self.tokenizer.model_max_length)
        self.tokenizer.model_max_length = most

    def usage(self, merged: bool, about: About) -> str:
        """Return how to classify a text, or a pair."""
        from fedlora_app.models.loading import pools

        item = '{"text": "…", "text_pair": "…"}' if about.get("pairs") else '"…"'
        item += ", truncation=True"
        if pools(self.config.model):
            return snippets.mean_pool(merged)
        if merged:
            return snippets.PIPELINE.format(task=self.name, item=item)
        return snippets.CLASSIFIER.format(count=len(about["labels"]))

    def problems(self, model: nn.Module, rows: Rows) -> list[str]:
        """Return what of tokenizer, texts, lengths and model does not go together."""
        from fedlora_app.models.loading import positions

        name, wanted = self.config.model.name, self.config.data.max_length
        found = self._foreign_tokens(model, _texts(rows.items[:LOOKED_AT]))
        if rows.about.get("pairs"):
            found += self._pair_problems(model)
        if (most := positions(model)) is not None and wanted > most:
            found.append(
                f"data.max-length: {wanted} tokens, but model.name = {name!r} has {most} "
                f"positions; set data.max-length={most}"
            )
        return found

    def _pair_problems(self, model: nn.Module) -> list[str]:
        found, tokenizer, wanted = [], self.tokenizer, self.config.data.max_length
        least = tokenizer.num_special_tokens_to_add(pair=True) + 2
        if wanted < least:
            found.append(
                f"data.max-length: {wanted} tokens, but a pair of texts takes {least} at least: a "
                f"token of each, and what marks where they end; set data.max-length={least} or more"
            )
        known: Any = next(
            (m for name, m in model.named_modules() if name.endswith("token_type_embeddings")), None
        )
        takes = "token_type_ids" in signature(getattr(model, "encoder", model).forward).parameters
        if _marks(tokenizer) and not (takes and (known is None or known.num_embeddings > 1)):
            found.append(
                f"model.name = {self.config.model.name!r}: its tokenizer marks the second text of "
                "a pair by token_type_ids, which the model does not know; leave them out of "
                "model_input_names in its tokenizer_config.json"
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
    """Token ids of n texts or pairs, padded on the right to the longest of them.

    Parameters
    ----------
    input_ids : int32 Tensor, shape (n, longest)
        Token ids.
    sizes : ndarray of int64, shape (n,)
        Tokens of each text or pair before the padding.
    labels : ndarray of int64, shape (n,)
        Label ids.
    types : int8 Tensor, shape (n, longest), optional
        Of pairs, for models that know it: 1 for tokens of the second text.
    """

    input_ids: Tensor
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    types: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | Indices) -> Tokens:
        """Return the rows at ``indices``, in that order."""
        import torch

        chosen = np.asarray(indices, dtype=np.int64)
        rows = torch.from_numpy(chosen)
        types = None if self.types is None else self.types[rows]
        return Tokens(self.input_ids[rows], self.sizes[chosen], self.labels[chosen], types)

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some rows, padded to the longest of them; int64 tensors."""
        import torch

        chosen = np.asarray(indices, dtype=np.int64)
        sizes = self.sizes[chosen]
        # Few distinct widths, in steps of 8, suit both the matrix kernels and the allocator.
        width = min(-(-int(sizes.max()) // 8) * 8, self.input_ids.shape[1])
        rows = torch.from_numpy(chosen)
        mask = torch.arange(width) < torch.from_numpy(sizes)[:, None]
        batch = {"input_ids": self.input_ids[rows, :width].long(), "attention_mask": mask.long()}
        if self.types is not None:
            batch["token_type_ids"] = self.types[rows, :width].long()
        return {**batch, "labels": torch.from_numpy(self.labels[chosen])}


def tokenize(rows: Rows, tokenizer: Any, max_length: int) -> Tokens:
    """Turn texts into token ids, at most ``max_length`` (and what the model takes) each.

    Of a pair, the longer text is cut first.
    """
    import torch

    labels: NDArray[np.int64] = rows.targets
    if not len(rows):
        return Tokens(torch.zeros(0, 0, dtype=torch.int32), labels, labels)
    limit = min(max_length, tokenizer.model_max_length)
    texts, pairs = [list(rows.items)], isinstance(rows.items[0], tuple)
    if pairs:
        texts = [list(part) for part in zip(*rows.items, strict=True)]
        if not tokenizer.num_special_tokens_to_add(pair=True):  # else the texts run into each other
            texts[1] = [f"\n{text}" for text in texts[1]]
    found = tokenizer(*texts, truncation="longest_first", max_length=limit)
    lengths = np.array([len(ids) for ids in found["input_ids"]], dtype=np.int64)
    # One assignment through a mask: a loop over rows takes several times as long.
    held = np.arange(lengths.max()) < lengths[:, None]

    def padded(rows: list[list[int]], value: int, dtype: type) -> Tensor:
        filled: NDArray[Any] = np.full(held.shape, value, dtype=dtype)
        filled[held] = np.concatenate(rows)
        return torch.from_numpy(filled)

    ids = padded(found["input_ids"], tokenizer.pad_token_id, np.int32)
    # Of single texts all are zero, which is what models take where they are given none.
    marked = pairs and _marks(tokenizer)
    types = padded(found["token_type_ids"], 0, np.int8) if marked else None
    return Tokens(ids, lengths, labels, types)


def _marks(tokenizer: Any) -> bool:
    """Tell whether a tokenizer says of each token which text of a pair it is of."""
    return "token_type_ids" in tokenizer.model_input_names


def _texts(items: Sequence[str | tuple[str, ...]]) -> list[str]:
    """Return the texts of single texts or pairs, one after the other."""
    return [text for item in items for text in ((item,) if isinstance(item, str) else item)]


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
