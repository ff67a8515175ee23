"""Fine-tune a language model on pairs of answers of which one was preferred: DPO.

Direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7). With
``log π(y|x)`` the sum of the log-probabilities of an answer's tokens and ``π_ref`` the model
without its adapter, the loss of a pair of a preferred answer w and a rejected one l is

    −ln σ(β [ln π(w|x)/π_ref(w|x) − ln π(l|x)/π_ref(l|x)])

The frozen base is the reference, with the adapter switched off: nothing more is loaded or sent.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data.conversations import ANSWERS, FORMATS, Fail, Turns, turns_of
from fedlora_app.data.tables import Table
from fedlora_app.discretion import DataError
from fedlora_app.tasks.base import About, Indices, Inputs, Rows, Score, Task, register_task
from fedlora_app.tasks.causal_lm import CausalLM
from fedlora_app.tasks.sequences import IGNORED, Sequences
from fedlora_app.tasks.use import Asked, read_asked

if TYPE_CHECKING:
    from torch import Tensor, nn

ROLES = ("chosen", "rejected", "prompt")


@register_task
class Preference(CausalLM):
    """Which of two answers is better (``prompt``, ``chosen``, ``rejected``).

    The loss is of pairs, in nats. At the start no pair is told from another, so AutoRank's
    entropy of losses is the logarithm of the number of rows there [D].
    """

    name = "preference"
    units = ("rows", "clients")
    reads = CausalLM.reads | {"train.beta"}
    keeps_base = True
    one_pass = False
    scores = (
        Score("preferred", "preferred answers", short="preferred"),
        Score("margin", "margin in nats", top=None, short="margin"),
    )

    # ----- rows

    def rows(self, table: Table, about: About | None, place: str) -> Rows:
        """Read the pairs; leave out those without two different answers, and count them."""
        columns = self._columns(table)
        return self._read(table, about, place, columns, _pair, "two answers", "read as preferences")

    def _columns(self, table: Table) -> dict[str, str]:
        """Return the columns by role; that of prompts may be missing."""
        wanted, place = self.config.data.text_column, table.place(None)[0]
        if wanted == "auto":
            by_name = {name.lower(): name for name in table.columns}
            found = {role: by_name[role] for role in ROLES if role in by_name}
        else:
            names = [part.strip() for part in wanted.split(",")]
            order = (*ROLES[2:], *ROLES[:2]) if len(names) == 3 else ROLES[:2]
            by_role = dict(zip(order, names, strict=False)) if len(names) in (2, 3) else {}
            found = {role: by_role[role] for role in ROLES if by_role.get(role) in table.columns}
            found = found if len(found) == len(names) == len({*names}) else {}
        if not found.keys() >= {"chosen", "rejected"}:
            raise DataError(
                place,
                "expected columns chosen and rejected, and prompt unless they are messages",
                ", ".join(table.columns),
                "rename them, or set data.text-column to prompt, chosen, rejected of yours; or "
                "set another task",
            )
        return found

    def knows(self, table: Table) -> bool:
        """Tell whether the columns are those of pairs."""
        try:
            self._columns(table)
        except DataError:
            return False
        return True

    def conversations(self, rows: Rows) -> Sequence[Turns]:
        """Return the turns of each row with the preferred answer."""
        return [chosen for chosen, _ in rows.items]

    def _characters(self, item: Any) -> int:
        return sum(map(super()._characters, item))

    def show(self, rows: Rows) -> list[str]:
        """Return both answers of the first row, what is trained between ⟦ and ⟧."""
        lines = []
        for side, role in enumerate(ROLES[:2]):
            lines += [f"  {role}:", *super().show(_side(rows, side))] if len(rows) else []
        return lines

    # ----- the model

    def encode(self, rows: Rows) -> Pairs:
        """Return the token ids of both answers of each row, each after its prompt."""
        return Pairs(*(super(Preference, self).encode(_side(rows, side)) for side in (0, 1)))

    def model(
        self, about: About, *, seed: int, precision: str = "float32", shapes_only: bool = False
    ) -> nn.Module:
        """Return the language model, which compares pairs where it is given them."""
        made = super().model(about, seed=seed, precision=precision, shapes_only=shapes_only)
        compares_pairs(made, self.config.train.beta)
        return made

    def problems(self, model: nn.Module, rows: Rows) -> list[str]:
        """Return what does not go together."""
        found = super().problems(model, rows)
        if self.config.data.packing:
            found.append("data.packing: pairs of answers are not packed; set it to false")
        return found

    def for_training(self, inputs: Inputs) -> Inputs:
        """Return the pairs as they are."""
        return inputs

    def fill(self) -> dict[str, int]:
        """Return the padding of ids, mask, and what is trained."""
        return {"input_ids": int(self.tokenizer.pad_token_id), "attention_mask": 0, "trained": 0}

    # ----- how good it is

    def losses(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each pair."""
        return _losses(logits)

    def judge(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
        """Return how often the preferred answer gained more than the other, and by how much."""
        margin = (logits[:, 0] - logits[:, 1]).double().cpu().numpy()
        better = float((margin > 0).sum()) + float((margin == 0).sum()) / 2
        return {
            "preferred": np.array([better, len(margin)]),
            "margin": np.array([margin.sum(), len(margin)]),
        }

    def summary(self, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return the means over pairs."""
        return Task.summary(self, sums)

    def quality(self, scores: Mapping[str, float]) -> float:
        """Return the share of the pairs that are told apart."""
        return Task.quality(self, scores)

    # ----- put to use

    def asked(self, table: Table, columns: Mapping[str, str], about: About) -> Asked:
        """Return pairs of answers to be told apart, or else what an answer is to be written to."""
        if not self.knows(table):
            prompts = {"prompt": columns.get("prompt", "")} if "prompt" in columns else {}
            return super().asked(table, prompts, about)
        found = self._columns(table)
        return read_asked(table, found, _pair, "two answers that differ")

    def answers(self, model: nn.Module, items: Sequence[Any], about: About) -> list[dict[str, Any]]:
        """Return which answer of each pair is preferred, and by how much; or one that is written.

        ``probability`` is that of the Bradley-Terry model which DPO fits.
        """
        from fedlora_app.evaluation import row_logits

        if not items or not _is_pair(items[0]):
            return super().answers(model, items, about)
        rows = Rows(items, np.zeros(len(items), np.int64), about)
        gains = row_logits(self, model, self.encode(rows)).double()
        found = []
        for margin in (gains[:, 0] - gains[:, 1]).tolist():
            chance = 1 / (1 + float(np.exp(-abs(margin))))
            side = ROLES[int(margin < 0)]
            found.append({"preferred": side, "probability": chance, "margin": abs(margin)})
        return found


def _is_pair(item: Any) -> bool:
    return not isinstance(item[0][0], str)


def _side(rows: Rows, side: int) -> Rows:
    return Rows([pair[side] for pair in rows.items], rows.targets, rows.about)


def _pair(values: Mapping[str, Any], fail: Fail) -> tuple[Turns, Turns] | None:
    """Return the turns of a row with either answer; None without two that differ."""
    prompt = values.get("prompt")
    pair = []
    for role in ROLES[:2]:
        turns = turns_of(FORMATS[0], {"messages": _messages(prompt, values[role], fail)}, fail)
        if turns is None or not turns[-1][1].strip():
            return None
        pair.append(turns)
    chosen, rejected = pair
    if chosen[:-1] != rejected[:-1]:
        fail(
            "expected the same turns before both answers",
            f"{len(chosen)} turns that end preferred, {len(rejected)} that end rejected",
            "give what is common as the prompt",
        )
    return None if chosen == rejected else (chosen, rejected)


def _messages(prompt: Any, answer: Any, fail: Fail) -> list[Any] | None:
    """Return prompt and answer, each a text or messages, as messages."""
    if answer is None or (isinstance(answer, float) and answer != answer):
        return None
    if isinstance(answer, list | tuple):
        roles = [m.get("role", m.get("from")) if isinstance(m, Mapping) else None for m in answer]
        whole = len(roles) > 1 or not prompt
        if whole and not isinstance(prompt, list | tuple):
            return list(answer)  # the prompt is in it
        after = list(answer)
    else:
        if not prompt:
            fail(
                "expected a prompt before the answers, or answers that are lists of messages",
                "none", "add a column prompt",
            )  # fmt: skip
        after = [{"role": ANSWERS, "content": answer}]
    before = list(prompt) if isinstance(prompt, list | tuple) else [
        {"role": "user", "content": prompt}
    ]  # fmt: skip
    return before + after


@dataclass(frozen=True)
class Pairs:
    """Token ids of two answers to each of n prompts.

    Parameters
    ----------
    chosen, rejected : Sequences
        Of n rows each.
    """

    chosen: Sequences
    rejected: Sequences

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of both."""
        return self.chosen.sizes + self.rejected.sizes

    @property
    def labels(self) -> list[NDArray[np.int32]]:
        """Which tokens of the preferred answers are trained; ``-100`` elsewhere."""
        return self.chosen.labels

    def take(self, indices: Sequence[int] | Indices) -> Pairs:
        """Return the rows at ``indices``, in that order."""
        return Pairs(self.chosen.take(indices), self.rejected.take(indices))

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some pairs: all preferred answers, then all rejected ones."""
        import torch

        chosen = [int(i) for i in indices]
        both = Sequences(
            [side.ids[i] for side in (self.chosen, self.rejected) for i in chosen],
            [side.labels[i] for side in (self.chosen, self.rejected) for i in chosen],
            self.chosen.padding,
        )
        batch = both.batch(range(len(both)))
        batch["trained"] = (batch.pop("labels") != IGNORED).long()
        batch["labels"] = torch.zeros(len(chosen), dtype=torch.int64)  # of each pair the first
        return batch


def compares_pairs(model: nn.Module, beta: float) -> None:
    """Have a causal language model compare pairs, in place, where ``trained`` comes with a batch.

    Its output has then ``logits`` of shape (pairs, 2), β times the gain in log-probability of
    either answer over the model without adapter, and ``loss``, the mean over pairs. All else is as
    before: names of parameters, files, and what happens without ``trained``.
    """
    cls = type(model)
    own = cls.forward

    @functools.wraps(own)  # transformers looks at what it takes
    def forward(self: Any, *args: Any, trained: Tensor | None = None, **batch: Any) -> Any:
        if trained is None:
            return own(self, *args, **batch)
        return _compared(self, own, trained, batch, beta)

    model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


@dataclass
class Compared:
    """What a model says of pairs: ``logits`` (pairs, 2), scalar ``loss``."""

    logits: Tensor
    loss: Tensor


def _compared(
    model: Any, forward: Any, trained: Tensor, batch: Mapping[str, Any], beta: float
) -> Compared:
    import torch

    from strategies.surroundings import mode

    given = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def answers() -> Tensor:
        logits = forward(model, **given).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), given["input_ids"][:, 1:].flatten(), reduction="none"
        )
        return -(each.view(len(trained), -1) * trained[:, 1:]).sum(1)

    with torch.no_grad(), mode(model, training=False), without_adapter(model):
        reference = answers()
    gains = beta * (answers() - reference)
    logits = gains.view(2, -1).T
    return Compared(logits, _losses(logits).mean())


def _losses(logits: Tensor) -> Tensor:
    from torch.nn import functional

    return -functional.logsigmoid(logits[:, 0] - logits[:, 1])


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off meanwhile; what is trained is trained afterwards, and nothing else."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, trained in wanted:  # PEFT would train all of an adapter again
            parameter.requires_grad_(trained)
