"""Fine-tune a language model on conversations, instructions or plain texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data import packaged
from fedlora_app.data.categories import KEY, Kinds, kinds_of
from fedlora_app.data.columns import groups_of
from fedlora_app.data.conversations import (
    TEXT,
    Fail,
    Turns,
    format_of,
    marked_chat,
    marks_answers,
    messages_of,
    plain_chat,
    taken_columns,
    templated_chat,
    turns_of,
)
from fedlora_app.data.kept import fingerprint
from fedlora_app.data.tables import Table
from fedlora_app.discretion import LOG, DataError
from fedlora_app.tasks.answers import AnswersAlone, takes_few_logits, takes_parts
from fedlora_app.tasks.base import (
    About,
    Inputs,
    Origin,
    Rows,
    Sample,
    Score,
    Sums,
    Task,
    register_task,
)
from fedlora_app.tasks.generation import generation_problems, scorer_of, tried
from fedlora_app.tasks.packing import Packed, packing_problem
from fedlora_app.tasks.sequences import IGNORED, Sequences, trained_tokens
from fedlora_app.tasks.writing import Writing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedlora_app.config.keys import RunConfig

SHOWN = 400  # characters of the example
KINDS = 50  # orders of turns that are tried out at the door


@register_task
class CausalLM(Writing, Task):
    """The next token: of an assistant's answers, or of everything (``data.train-on``).

    The loss is in nats a trained token. AutoRank's profile takes a row's loss as the mean over its
    trained tokens, and its two label measures are of categories, or else of trained tokens [D].
    """

    name = "causal-lm"
    peft_type = "CAUSAL_LM"
    units: ClassVar[tuple[str, ...]] = ("rows", "clients", "trained-tokens")
    reads: ClassVar[frozenset[str]] = frozenset(
        {"data.train-on", "data.packing", "evaluate.generate"}
    )
    quantizable = True
    _few_logits = _parts = False
    scores: tuple[Score, ...] = (
        Score("perplexity", "perplexity", higher_is_better=False, top=None, digits=2),
    )

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.scorer = scorer_of(config)
        if self.scorer is not None:
            self.scores = (*self.scores, self.scorer.as_score)

    # ----- rows

    def rows(self, table: Table, about: About | None, place: str) -> Rows:
        """Read the conversations; leave out those with nothing to learn from, and count them."""
        kind, columns = taken_columns(table, self.config.data.text_column)
        what = "a text" if kind.columns == (TEXT,) else "an answer"
        return self._read(
            table, about, place, columns, partial(turns_of, kind), what, f"read as {kind.name}"
        )

    def _read(
        self,
        table: Table,
        about: About | None,
        place: str,
        columns: dict[str, str],
        read: Callable[[Mapping[str, Any], Fail], Any],
        what: str,
        note: str,
    ) -> Rows:
        """Read the rows of some columns by role; ``read`` gives None where one lacks ``what``."""
        values = {role: table.columns[column][:] for role, column in columns.items()}
        items: list[Any] = []
        kept: list[int] = []

        def fail(row: int, kind: str, got: str = "", remedy: str = "") -> NoReturn:
            path, line = table.place(row)
            raise DataError(path if table.parts else place, kind, got, remedy, line)

        count = len(next(iter(values.values()), ()))
        for row in range(count):
            one = {role: column[row] for role, column in values.items()}
            item = read(one, partial(fail, row))
            if item is not None:
                items.append(item)
                kept.append(row)
        if not items:
            path, _ = table.place(None)
            raise DataError(
                path, f"expected rows with {what}", f"{count} without", "set data.text-column"
            )
        groups = groups_of(table, self.config.data, kept)
        kinds = kinds_of(
            table,
            self.config.data.label_column,
            kept,
            [self._characters(item) for item in items],
            taken=tuple(columns.values()),
            about=about,
        )
        if kinds is not None and kinds.column:
            columns["category"] = kinds.column
        if groups is not None:
            columns["client"] = self.config.data.partition_column
        origin = Origin(
            tuple(str(part.path) for part in table.parts),
            columns,
            tuple(name for name in table.columns if name not in columns.values()),
            count - len(kept),
            (*table.notes, note),
        )
        none = Kinds(np.zeros(len(items), np.int64), {})
        return Rows(items, (kinds or none).ids, (kinds or none).about, groups, origin)

    def _characters(self, item: Any) -> int:
        return sum(len(text) for _, text in item)

    def conversations(self, rows: Rows) -> Sequence[Turns]:
        """Return the turns of each row, with the answer that is wanted."""
        return rows.items

    def knows(self, table: Table) -> bool:
        """Tell whether the columns are those of a known format."""
        wanted = self.config.data.text_column
        names = [part.strip() for part in wanted.split(",")]
        return format_of(table) is not None if wanted == "auto" else {*names} <= {*table.columns}

    def strata(self, rows: Rows) -> NDArray[np.int64] | None:
        """Return the categories of the rows, by a column or by length, if they have any."""
        return rows.targets if KEY in rows.about else None

    def strata_names(self, about: About) -> Sequence[str]:
        """Return the names of the categories."""
        return tuple(about.get(KEY, ()))

    def mix(self, inputs: Inputs, strata: NDArray[np.int64]) -> NDArray[Any]:
        """Return the categories of rows, or else all their trained tokens [D]."""
        return strata if len(strata) else trained_tokens(inputs)

    def look_at(self, rows: Rows) -> None:
        """Write out a row of each order of turns: a template may refuse a system's, or several."""
        kinds: dict[tuple[str, ...], Turns] = {}
        for turns in self.conversations(rows):
            kinds.setdefault(tuple(role for role, _ in turns), turns)
        for turns in list(kinds.values())[:KINDS]:
            self._rendered(turns)

    def show(self, rows: Rows) -> list[str]:
        """Return the first row as its tokens say it, what is trained between ⟦ and ⟧."""
        if not len(rows):
            return []
        encoded: Sequences = CausalLM.encode(self, rows.take([0]))
        ids, trained = encoded.ids[0], encoded.labels[0] != IGNORED
        text = ""
        for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1):
            said = self.tokenizer.decode(ids[part], clean_up_tokenization_spaces=False)
            text += f"⟦{said}⟧" if trained[part].any() else said
        plain = rows.items[0][0][0] != TEXT and not self.tokenizer.chat_template
        lines = ["  the model has no chat template: '### User:' and the like"] if plain else []
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        shown = ("    " + line for line in text.splitlines())
        return [*lines, "  first, what is trained in ⟦⟧:", *shown]

    # ----- the model

    @property
    def _most(self) -> int:
        """Tokens of a row, at most."""
        return int(min(self.config.data.max_length, self.tokenizer.model_max_length))

    def _rendered(self, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
        """Return a row as the model reads it, and the parts that are trained."""
        end = self.tokenizer.eos_token or ""
        spans: list[tuple[int, int]] = []
        if turns[0][0] == TEXT:
            text = turns[0][1] + end
            return text, [(0, len(text))]
        if self.tokenizer.chat_template:
            render = partial(self.tokenizer.apply_chat_template, tokenize=False)
            try:
                if self.config.data.train_on == "all":  # no answer has to be found
                    text = str(render(messages_of(turns)))
                elif marks_answers(self.tokenizer.chat_template):
                    text, spans = marked_chat(turns, self.tokenizer)
                else:
                    text, spans = templated_chat(turns, render)
            except Exception as error:  # it is a program of the model's, and may raise anything
                roles = ", ".join(role for role, _ in turns[:4])
                raise ValueError(
                    f"model.name = {self.config.model.name!r}: its chat template fails on turns of "
                    f"{roles}{', …' if len(turns) > 4 else ''}: {type(error).__name__}: {error}; "
                    "take such rows out, or name a model whose template takes them"
                ) from error
        else:
            text, spans = plain_chat(turns)
            if spans and spans[-1][1] == len(text):
                text, spans[-1] = text + end, (spans[-1][0], len(text) + len(end))
        return text, [(0, len(text))] if self.config.data.train_on == "all" else spans

    def encode(self, rows: Rows) -> Any:
        """Return token ids and what of them is trained, at most ``data.max-length`` each.

        A row that is too long keeps the beginning of its first answer: the start of its prompt
        goes first.
        """
        most = self._most
        ids, labels = [], []
        for turns in rows.items:
            text, spans = self._rendered(turns)
            read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            found = np.array(read["input_ids"], dtype=np.int32)
            starts = np.array([start for start, _ in read["offset_mapping"]], dtype=np.int64)
            trained = np.zeros(len(found), dtype=bool)
            for start, end in spans:
                trained |= (starts >= start) & (starts < end)
            trained[:1] = False  # nothing comes before it that could predict it
            first = int(np.argmax(trained)) if trained.any() else 0
            cut = max(0, first - most // 2) if first >= most - 1 else 0
            kept = slice(cut, cut + most)
            ids.append(found[kept])
            labels.append(np.where(trained[kept], found[kept], IGNORED).astype(np.int32))
        empty = [i for i, row in enumerate(labels) if not (row != IGNORED).any()]
        if empty:  # they stay, so that rows keep their places, and have no loss and no gradient
            LOG.warning("%s of %s rows have no token to train on and teach nothing, the first "
                        "is row %s", len(empty), len(labels), empty[0])  # fmt: skip
        return Sequences(ids, labels, int(self.tokenizer.pad_token_id))

    def fingerprint(self, rows: Rows) -> bytes | None:
        """Return the rows and the state of the tokenizer's files."""
        return fingerprint(rows, packaged.tokenizer_name(self.config.model.name))

    def restored(self, fields: Mapping[str, Any]) -> Sequences:
        """Return token ids that ``encode`` returned before."""
        return Sequences(**fields)

    def model(
        self, about: About, *, seed: int, precision: str = "float32", shapes_only: bool = False
    ) -> nn.Module:
        """Return the language model; nothing of it is new, so no seed matters."""
        from fedlora_app.models.language import build_language_model

        model = build_language_model(
            self.config.model, precision=precision, shapes_only=shapes_only
        )
        model.config.use_cache = False  # type: ignore[union-attr]  # nothing is written here
        self._few_logits = takes_few_logits(model)
        self._parts = self._few_logits and takes_parts(model)
        return model

    def problems(self, model: nn.Module, rows: Rows) -> list[str]:
        """Return what of tokenizer, template, lengths and model does not go together."""
        name, wanted = self.config.model.name, self.config.data.max_length
        found = []
        embedding: Any = model
        known = embedding.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > known:
            found.append(
                f"model.name = {name!r}: its tokenizer knows {len(self.tokenizer)} tokens, and its "
                f"embedding has {known} rows; take the tokenizer the model was trained with"
            )
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and wanted > most:
            found.append(
                f"data.max-length: {wanted} tokens, but model.name = {name!r} has {most} "
                f"positions; set data.max-length={most}"
            )
        if self.config.data.packing and (problem := packing_problem(model)):
            found.append(
                f"data.packing: model.name = {name!r}: {problem}; set data.packing = false"
            )
        some = self.encode(rows.take(range(min(50, len(rows)))))
        if not any((row != IGNORED).any() for row in some.labels):
            found.append(
                "none of the first rows has a token to train on: their answers are empty, or "
                "data.max-length cuts them away; raise it"
            )
        first = self.conversations(rows)[:50]
        return found + generation_problems(self.config.evaluate, self.tokenizer, model, first)

    def for_training(self, inputs: Inputs) -> Inputs:
        """Return rows that share sequences, where ``data.packing`` says so.

        Logits are computed of what is trained alone, once ``model`` has seen that it takes that;
        clients that share a batch train different places of it, so there all are.
        """
        if not isinstance(inputs, Sequences):
            return inputs
        rows: Inputs = Packed(inputs, self._most) if self.config.data.packing else inputs
        shared = self.config.simulate.clients_per_process > 1
        return AnswersAlone(rows, self._parts) if self._few_logits and not shared else rows

    def size(self, inputs: Inputs) -> int:
        """Return what ``weight-by`` counts, the tokens that are trained among it."""
        if self.config.weight_by == "trained-tokens":
            return trained_tokens(inputs).size
        return super().size(inputs)

    def fill(self) -> dict[str, int]:
        """Return the padding of ids, mask and labels."""
        pad = int(self.tokenizer.pad_token_id)
        return {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}

    # ----- how good it is

    def losses(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over each row's trained tokens, in nats; 0 where there are none."""
        nats, trained = _nats(logits, batch)
        return nats.sum(1) / trained.sum(1).clamp(min=1)

    def training_loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over all trained tokens of the batch."""
        nats, trained = _nats(logits, batch)
        return nats.sum() / trained.sum().clamp(min=1)

    def judge(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
        """Return the nats of all trained tokens, and how many there are."""
        nats, trained = _nats(logits, batch)
        return {"tokens": np.array([float(nats.double().sum()), float(trained.sum())])}

    def summary(self, sums: Sums) -> dict[str, float]:
        """Return the loss by trained token and its perplexity."""
        total, weight = sums["tokens"]
        loss = float(total / max(weight, 1.0))
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}

    def try_out(self, model: nn.Module, rows: Rows) -> tuple[Mapping[str, float], Sequence[Sample]]:
        """Return how good generated answers are, where ``evaluate.generate`` asks for some."""
        if self.scorer is None:
            return {}, ()
        return tried(model, self.tokenizer, self.scorer, self.config, self.conversations(rows))

    def quality(self, scores: Mapping[str, float]) -> float:
        """Return the geometric mean of the probabilities of the trained tokens."""
        return max(1.0 / scores["perplexity"], 1e-6)


def _nats(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss of each predicted token, 0 where it is not trained, and which are."""
    from torch.nn import functional

    labels = batch["labels"][:, 1:]
    each = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return each.view(labels.shape), labels != IGNORED
