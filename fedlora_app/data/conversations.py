"""Texts that a language model learns from, in the formats that people keep them in.

Whatever the format, a row becomes turns of ``(role, text)``: plain texts have one turn of the
role ``text``. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fedlora_app.data.tables import Table
from fedlora_app.discretion import DataError

Turns = tuple[tuple[str, str], ...]
Fail = Callable[..., NoReturn]  # called with (kind, got, remedy)

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # fmt: skip
ANSWERS = "assistant"
TEXT = "text"


@dataclass(frozen=True)
class Format:
    """How columns make a conversation.

    Parameters
    ----------
    name : str
        For people.
    columns : tuple of str
        All of them have to be there.
    extra : str
        A column that may be there, to be added to the first (Alpaca's ``input``).
    """

    name: str
    columns: tuple[str, ...]
    extra: str = ""


FORMATS = (
    Format("messages", ("messages",)),
    Format("conversations", ("conversations",)),
    Format("prompt and completion", ("prompt", "completion")),
    Format("instruction, input and output", ("instruction", "output"), "input"),
    Format("question and answer", ("question", "answer")),
    Format("prompt and response", ("prompt", "response")),
    Format("text", ("text",)),
)


def format_of(table: Table) -> Format | None:
    """Return the first format whose columns a table has; None if it has none's."""
    names = {name.lower() for name in table.columns}
    return next((f for f in FORMATS if names.issuperset(f.columns)), None)


def taken_columns(table: Table, wanted: str) -> tuple[Format, dict[str, str]]:
    """Return the format of a table and its columns by role.

    Parameters
    ----------
    table : Table
    wanted : str
        ``auto``; one column of messages or of plain texts; or two, of prompts and answers,
        separated by a comma.

    Raises
    ------
    DataError
        If there are no such columns.
    """
    place, _ = table.place(None)
    if wanted == "auto":
        found = format_of(table)
        if found is None:
            raise DataError(
                place,
                "expected the columns of a conversation: "
                + "; ".join(" + ".join(f.columns) for f in FORMATS),
                ", ".join(table.columns),
                "rename them, or set data.text-column, or another task",
            )
        by_name = {name.lower(): name for name in table.columns}
        names = [*found.columns, *([found.extra] if found.extra in by_name else [])]
        return found, {name: by_name[name] for name in names}
    names = [part.strip() for part in wanted.split(",")]
    missing = [name for name in names if name not in table.columns]
    if missing or len(names) > 2 or len(set(names)) < len(names):
        error = DataError(
            place,
            f"expected the columns {wanted!r}: one, or one of prompts and one of answers",
            ", ".join(table.columns),
            "set data.text-column",
        )
        error.told = error.told.replace(repr(wanted), "that are named")
        raise error
    if len(names) == 2:
        return FORMATS[2], dict(zip(FORMATS[2].columns, names, strict=True))
    values = table.columns[names[0]][:1]
    kind = FORMATS[0] if values and isinstance(values[0], list | tuple) else FORMATS[-1]
    return kind, {kind.columns[0]: names[0]}


def asked_columns(
    table: Table, wanted: str, trained: Mapping[str, str]
) -> tuple[Format, dict[str, str]]:
    """Return the format of a table without answers, and the columns of its questions by role.

    Parameters
    ----------
    table : Table
        May have answers, which are not looked at.
    wanted : str
        As of ``taken_columns``; of two columns the first.
    trained : mapping
        The columns by role that the model was tested on; empty: not known.

    Raises
    ------
    DataError
        If there are no such columns.
    """
    by_name = {name.lower(): name for name in table.columns}
    before = next((f for f in FORMATS if trained.keys() >= {*f.columns}), None)
    if wanted != "auto":
        first = wanted.partition(",")[0].strip()
        kind = before or (FORMATS[2] if "," in wanted else FORMATS[-1])
    elif before and trained[before.columns[0]] in table.columns:
        kind, first = before, trained[before.columns[0]]
    else:
        found = next((f for f in FORMATS if f.columns[0] in by_name), None)
        kind, first = found or FORMATS[-1], by_name[found.columns[0]] if found else "text"
    if first not in table.columns:
        names = ", ".join(dict.fromkeys(f.columns[0] for f in FORMATS))
        raise DataError(
            table.place(None)[0],
            f"expected a column of what is asked: {names if wanted == 'auto' else repr(first)}",
            ", ".join(table.columns),
            "rename it, or set data.text-column",
        )
    values = table.columns[first][:1]
    if values and isinstance(values[0], list | tuple):
        kind = FORMATS[0]
    elif kind.columns[0] in ("messages", "conversations"):
        kind = FORMATS[2]
    extra = {kind.extra: by_name[kind.extra]} if kind.extra in by_name else {}
    return kind, {kind.columns[0]: first, **extra}


def asked_turns(kind: Format, values: Mapping[str, Any], fail: Fail) -> Turns | None:
    """Return the turns before an answer that is still to be written; None where nobody asks."""
    if kind.columns[0] in ("messages", "conversations"):
        found = values[kind.columns[0]]
        messages = list(found) if isinstance(found, list | tuple) else found
        if not messages:
            return None
        said = messages[-1] if isinstance(messages, list) else None
        role = str(said.get("role", said.get("from", ""))) if isinstance(said, Mapping) else ""
        if ROLES.get(role.lower()) == ANSWERS:
            messages = messages[:-1]  # it is what the model is to write itself
        elif not isinstance(messages, list):
            messages = [messages]
        turns = _messages([*messages, {"role": ANSWERS, "content": "…"}], fail)
        return turns[:-1] if turns else None
    texts = {role: _text(role, value, fail) for role, value in values.items()}
    asked = texts[kind.columns[0]]
    if not asked.strip():
        return None
    if kind.extra and (more := texts.get(kind.extra, "")).strip():
        asked = f"{asked}\n\n{more}"
    return ((TEXT if kind.columns == (TEXT,) else "user", asked),)


def turns_of(kind: Format, values: Mapping[str, Any], fail: Fail) -> Turns | None:
    """Return the turns of a row; None where there is nothing to learn from.

    Parameters
    ----------
    kind : Format
    values : mapping
        By role, as ``taken_columns`` says.
    fail : callable
        Raises the error, given what is wrong.
    """
    if kind.columns[0] in ("messages", "conversations"):
        return _messages(values[kind.columns[0]], fail)
    texts = {role: _text(role, value, fail) for role, value in values.items()}
    if kind.columns == (TEXT,):
        return ((TEXT, texts[TEXT]),) if texts[TEXT].strip() else None
    asked, answered = (texts[column] for column in kind.columns)
    if kind.extra and (more := texts.get(kind.extra, "")).strip():
        asked = f"{asked}\n\n{more}"
    if not asked.strip() or not answered.strip():
        return None
    return (("user", asked), (ANSWERS, answered))


def _messages(found: Any, fail: Fail) -> Turns | None:
    if found is None or (isinstance(found, list | tuple) and not found):
        return None
    if not isinstance(found, list | tuple) or not all(isinstance(m, Mapping) for m in found):
        fail("expected a list of messages, each with role and content", type(found).__name__,
             "write it as such")  # fmt: skip
    turns: list[tuple[str, str]] = []
    for message in found:
        said = str(message.get("role", message.get("from", ""))).lower()
        content = message.get("content", message.get("value"))
        if said not in ROLES:
            fail(f"expected a role of {', '.join(ROLES)}", repr(said), "correct it")
        role, before = ROLES[said], turns[-1][0] if turns else ""
        first = role == "system" and bool(turns)
        if first or role == before or (role == ANSWERS and before not in ("user",)):
            fail(
                "expected turns of user and assistant, one after the other, and a system turn "
                "first if at all",
                f"{role} after {before or 'nothing'}",
                "put them in order",
            )
        turns.append((role, _text("content", content, fail)))
    if not any(role == ANSWERS and text.strip() for role, text in turns):
        return None
    while turns[-1][0] != ANSWERS:  # a question that nobody answered
        turns.pop()
    return tuple(turns)


def _text(role: str, value: Any, fail: Fail) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        fail(f"expected a text as {role}", type(value).__name__, "write it as a string")
    return str(value)


def plain_chat(turns: Turns) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text for a model without a template, and where its answers are."""
    text, spans = "", []
    for role, said in turns:
        text += f"### {role.capitalize()}:\n"
        start = len(text)
        text += said
        if role == ANSWERS:
            spans.append((start, len(text)))
        text += "\n\n"
    return text.rstrip("\n") if spans and spans[-1][1] == len(text) - 2 else text, spans


def messages_of(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Return turns as chat templates take them."""
    return [{"role": role, "content": text} for role, text in turns]


def marks_answers(template: str) -> bool:
    """Return whether a chat template itself says what the assistant writes."""
    return re.search(r"\{%-?\s*generation\b", template) is not None


def marked_chat(
    turns: Sequence[tuple[str, str]], tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation by a template that marks answers itself, and where they are.

    Parameters
    ----------
    turns : sequence of (role, text)
    tokenizer : transformers.PreTrainedTokenizerFast
        With the template.
    """
    messages = messages_of(turns)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    read = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    places = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    spans: list[tuple[int, int]] = []
    before = 0
    for marked, (start, end) in zip(read["assistant_masks"], places["offset_mapping"], strict=True):
        if marked and before:
            spans[-1] = (spans[-1][0], end)
        elif marked:
            spans.append((start, end))
        before = marked
    return whole, spans


def templated_chat(
    turns: Sequence[tuple[str, str]], render: Callable[..., str]
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation by a model's template, and where what it has to say is.

    An answer is what the template adds to the turns before it, with the prompt for an answer; its
    end of turn belongs to it.

    Parameters
    ----------
    turns : sequence of (role, text)
    render : callable
        ``render(messages, add_generation_prompt=…)``: the template.

    Raises
    ------
    ValueError
        If the template writes earlier turns in another way once there are later ones, so that
        nobody can tell where an answer is.
    """
    messages = messages_of(turns)
    spans: list[tuple[int, int]] = []
    whole = render(messages, add_generation_prompt=False)
    for i, (role, text) in enumerate(turns):
        if role != ANSWERS:
            continue
        before = render(messages[:i], add_generation_prompt=True)
        after = render(messages[: i + 1], add_generation_prompt=False)
        end = len(after) if whole.startswith(after) else -1
        if not whole.startswith(before) or end < 0:
            start = whole.find(text.strip(), spans[-1][1] if spans else 0)
            if start < 0:
                raise ValueError(
                    "its chat template leaves out or changes an answer, so that nobody can tell "
                    "what to train on; set data.train-on = 'all'"
                )
            spans.append((start, start + len(text.strip())))
        else:
            spans.append((len(before), end))
    return whole, spans
