"""What language models are used for once they are trained: they go on where a row ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fedlora_app.data.conversations import ANSWERS, TEXT, Turns, asked_columns, asked_turns
from fedlora_app.tasks import snippets
from fedlora_app.tasks.generation import end_tokens, prompt_of, written
from fedlora_app.tasks.use import Asked, Tokenized, read_asked

if TYPE_CHECKING:
    from torch import nn

    from fedlora_app.data.tables import Table


class Writing(Tokenized):
    """A language model writes the answer to a row, or of a plain text what comes next."""

    pipeline = "text-generation"
    asked_column = "prompt"

    def describe(self, model: nn.Module, about: Mapping[str, Any]) -> None:
        """Have the model keep what it has read while it writes, and end where a turn does."""
        settings: Any = model
        settings.config.use_cache = True
        settings.generation_config.eos_token_id = end_tokens(self.tokenizer, model)
        settings.generation_config.pad_token_id = self.tokenizer.pad_token_id

    def usage(self, merged: bool, about: Mapping[str, Any]) -> str:
        """Return how to have an answer written."""
        chat = bool(self.tokenizer.chat_template)
        return snippets.writer(merged, chat)

    def asked(self, table: Table, columns: Mapping[str, str], about: Mapping[str, Any]) -> Asked:
        """Return the turns before an answer; one that stands there already is not looked at."""
        kind, names = asked_columns(table, self.config.data.text_column, columns)
        what = "a text" if kind.columns == (TEXT,) else "a question"
        return read_asked(table, names, partial(asked_turns, kind), what)

    def answers(
        self, model: nn.Module, items: Sequence[Any], about: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the likeliest answer to each item, of ``evaluate.generate-tokens`` at most."""
        prompts = [self._prompt(turns) for turns in items]
        return [{"answer": text} for text in written(model, self.tokenizer, prompts, self.config)]

    def _prompt(self, turns: Turns) -> str:
        if turns[0][0] == TEXT:
            return turns[0][1]
        return prompt_of(self.tokenizer, (*turns, (ANSWERS, "")))
