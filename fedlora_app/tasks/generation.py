"""Answers that a language model writes itself: batched, greedy, and no longer than asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora_app.config.keys import RunConfig
from fedlora_app.config.plugins import load
from fedlora_app.config.round_keys import EvaluateConfig
from fedlora_app.data.conversations import (
    ANSWERS,
    TEXT,
    Turns,
    messages_of,
    plain_chat,
    templated_chat,
)
from fedlora_app.tasks.base import Sample
from fedlora_app.tasks.scorers import SCORERS, Scorer
from strategies.seeding import stream

if TYPE_CHECKING:
    from torch import nn

SHOWN = 4  # answers that are kept for people

PLAIN_ANSWER = f"### {ANSWERS.capitalize()}:\n"  # what ``plain_chat`` puts before an answer
PLAIN_TURN = "\n### "  # the next turn of a model that does not stop


def scorer_of(config: RunConfig) -> Scorer | None:
    """Return what scores generated answers; None where none are, or it is not known here.

    Nodes need not know a scorer of one's own: the server alone scores.
    """
    name = config.evaluate.scorer
    if not config.evaluate.generate:
        return None
    if name not in SCORERS:
        load(config.plugins)
    return SCORERS[name]() if name in SCORERS else None


def generation_problems(
    config: EvaluateConfig, tokenizer: Any, model: nn.Module, rows: Sequence[Turns]
) -> list[str]:
    """Return why no answers could be generated to some rows, one sentence each."""
    if not config.generate:
        return []
    found = []
    if config.scorer not in SCORERS:
        found.append(
            f"evaluate.scorer: expected one of {', '.join(SCORERS)}, or one that a module of "
            f"plugins registers; got {config.scorer!r}"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.generate_tokens >= positions:
        found.append(
            f"evaluate.generate-tokens: {config.generate_tokens} tokens leave no room for a prompt "
            f"among the model's {positions} positions; lower it"
        )
    if any(turns[0][0] == TEXT for turns in rows):
        found.append(
            "evaluate.generate: expected rows with answers, got plain texts, after which there is "
            "no answer to generate; set it to 0"
        )
        return found
    try:
        end_tokens(tokenizer, model)
        for turns in rows:
            prompt_of(tokenizer, turns)
    except Exception as error:  # a template is a program of the model's, and may raise anything
        found.append(
            "evaluate.generate: the model's chat template writes no prompt for an answer: "
            f"{type(error).__name__}: {error}; set it to 0, or mend the template"
        )
    return found


def tried(
    model: nn.Module, tokenizer: Any, scorer: Scorer, config: RunConfig, rows: Sequence[Turns]
) -> tuple[dict[str, float], list[Sample]]:
    """Have a model answer a seeded choice of ``evaluate.generate`` rows, the same each time.

    Returns
    -------
    dict, list of Sample
        The mean score, and the first of the answers.

    Raises
    ------
    ValueError
        If the scorer gives something else than a number from 0 to 1.
    """
    count = min(config.evaluate.generate, len(rows))
    order = stream(config.seed, "generate").permutation(len(rows))[:count]
    chosen = [rows[i] for i in sorted(order.tolist())]
    given = written(model, tokenizer, [prompt_of(tokenizer, turns) for turns in chosen], config)
    samples = []
    for turns, answer in zip(chosen, given, strict=True):
        value = float(scorer.score(answer, turns[-1][1]))
        if not 0 <= value <= 1:
            raise ValueError(
                f"evaluate.scorer = {scorer.name!r}: expected a number from 0 to 1, got {value!r}"
            )
        samples.append(Sample(turns[-2][1], turns[-1][1], answer, value))
    mean = float(np.mean([sample.score for sample in samples]))
    return {scorer.as_score.name: mean}, samples[:SHOWN]


def written(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], config: RunConfig
) -> list[str]:
    """Return what a model answers to each prompt, as the run config says."""
    return answers(
        model,
        tokenizer,
        prompts,
        tokens=config.evaluate.generate_tokens,
        batch_size=config.evaluate.batch_size,
        precision=config.train.precision,
    )


def prompt_of(tokenizer: Any, turns: Turns) -> str:
    """Return all that a model reads before it is to write the last answer of some turns."""
    before = turns[:-1]
    if not tokenizer.chat_template:
        return plain_chat(before)[0] + PLAIN_ANSWER
    found = tokenizer.apply_chat_template(
        messages_of(before), tokenize=False, add_generation_prompt=True
    )
    return str(found)


def end_tokens(tokenizer: Any, model: nn.Module) -> list[int]:
    """Return the tokens that end an answer: of tokenizer, model, and chat template.

    A template may end turns with another token than texts end with.
    """
    known: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    if tokenizer.chat_template:
        render = partial(tokenizer.apply_chat_template, tokenize=False)
        text, spans = templated_chat((("user", "a"), (ANSWERS, "b")), render)
        start, end = spans[-1]
        at = text.find("b", start, end)
        after = text[at + 1 : end] if at >= 0 else ""  # a template may change the letter
        special = {
            *tokenizer.all_special_ids,
            *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
        }
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        ends |= set([i for i in ids if i in special][:1])
    return sorted(i for i in ends if i is not None)


def answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    batch_size: int,
    precision: str = "float32",
) -> list[str]:
    """Return what a model most likely answers to each prompt, in their order.

    Each batch is filled up on the left, whatever the tokenizer does by itself: an answer goes on
    where its prompt ends. The answer to a prompt does not depend on what is batched with it, but
    for rounding.

    Parameters
    ----------
    model : nn.Module
        A causal language model, or PEFT's wrapper of one; stays as it is.
    tokenizer : PreTrainedTokenizer
        With a padding token.
    prompts : sequence of str
        As ``prompt_of`` returns them. One that leaves no room for the answer among the model's
        positions loses its start.
    tokens : int
        An answer has at most so many.
    batch_size : int
        Prompts of a batch.
    precision : {"float32", "bfloat16"}
        As in ``evaluate`` (default: "float32").
    """
    import torch

    from strategies.losses import autocast_type
    from strategies.surroundings import mode

    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    device, dtype = next(model.parameters()).device, autocast_type(precision)
    ends, pad = end_tokens(tokenizer, inner), int(tokenizer.pad_token_id)
    positions = getattr(inner.config, "max_position_embeddings", None)
    room = None if positions is None else positions - tokens
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    ids = ids if room is None else [row[-room:] for row in ids]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found = [""] * len(ids)
    with (
        torch.no_grad(),
        mode(model, training=False),
        _plainly(inner, tokens, ends, pad),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows, mask = _filled_up([ids[i] for i in chosen], pad)
            written = inner.generate(
                input_ids=torch.from_numpy(rows).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
            )
            for i, row in zip(chosen, written[:, rows.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), len(row))
                text = tokenizer.decode(row[:end], skip_special_tokens=True)
                found[i] = text if tokenizer.chat_template else text.split(PLAIN_TURN)[0]
    return [text.strip() for text in found]


@contextmanager
def _plainly(model: Any, tokens: int, ends: list[int], pad: int) -> Iterator[None]:
    """Have a model write the likeliest token each time: without what its files would have it do.

    Such as a penalty on repetition, which transformers adds to whatever is asked for.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    try:
        yield
    finally:
        model.generation_config = before


def _filled_up(rows: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    """Return token ids with padding before them, and where they are none."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask
