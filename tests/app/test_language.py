"""Language models as a task: formats, templates, what is trained, and that it trains."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlora_app.config.keys import RunConfig, TrainConfig
from fedlora_app.config.read import read_config
from fedlora_app.data.conversations import plain_chat, templated_chat
from fedlora_app.data.partition import shares
from fedlora_app.evaluation import evaluate
from fedlora_app.launch.door import check_model
from fedlora_app.launch.inspection import Report
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import make_task
from fedlora_app.training import train

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ("two", "and", "is", "four", "three", "six", "what", "say", "it", "again", "be", "kind")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def save_llama(path):
    """Save a tiny Llama and a tokenizer of words, with a chat template."""
    marks = ["<pad>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]
    words = {word: i for i, word in enumerate([*marks, *WORDS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=marks[3:], model_max_length=64,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def config(folder, data, **flat):
    keys = {"task": "causal-lm", "model.name": str(folder), "data.name": str(data),
            "data.partition": "iid", "data.min-samples": 2, "data.max-length": 32,
            "train.precision": "float32"}  # fmt: skip
    return RunConfig.from_flat({**keys, **flat})


def written(tmp_path, rows, name="d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "two and two"},
        {"role": "assistant", "content": "is four"}, {"role": "user", "content": "again"},
        {"role": "assistant", "content": "four"}]  # fmt: skip
FORMATS = {
    "messages": ({"messages": CHAT}, "is four </s> four </s>"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "two"}, {"from": "gpt", "value": "is it"}]},
        "is it </s>",
    ),
    "completion": ({"prompt": "what is", "completion": "three"}, "three </s>"),
    "alpaca": ({"instruction": "say it", "input": "six", "output": "it is six"}, "it is six </s>"),
    "question": ({"question": "what", "answer": "two three"}, "two three </s>"),
    "text": ({"text": "be kind again"}, "kind again </s>"),  # nothing predicts the first
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_answers_alone_are_trained(folder, tmp_path, name):
    row, expected = FORMATS[name]
    task = make_task(config(folder, written(tmp_path, [row] * 12)))
    rows = task.train_rows()
    inputs = task.encode(rows)
    batch = inputs.batch([0, 1])
    trained = [i for i in batch["labels"][0].tolist() if i != -100]
    assert task.tokenizer.decode(trained) == expected
    assert (batch["attention_mask"][0].sum()) == inputs.sizes[0]
    assert batch["input_ids"].shape == batch["labels"].shape
    shown = "\n".join(task.show(rows))
    assert "⟦" in shown
    everything = make_task(
        config(folder, written(tmp_path, [row] * 12), **{"data.train-on": "all"})
    )
    labels = everything.encode(rows).labels[0]
    assert (labels != -100).sum() == len(labels) - 1


def test_a_column_says_whose_rows_are(folder, tmp_path):
    rows = [{"prompt": "what", "completion": "six" if i else " ", "user": "abc"[i % 3]}
            for i in range(40)]  # fmt: skip
    flat = {"data.partition": "natural", "data.partition-column": "user"}
    task = make_task(config(folder, written(tmp_path, rows), **flat))
    found = task.train_rows()
    parts = shares(task, found, 3)
    assert sum(map(len, parts)) == len(found)
    assert [set(found.groups[part]) for part in parts] == [{"a"}, {"b"}, {"c"}]
    assert found.origin.columns["client"] == "user"
    assert found.origin.blank == 1


def test_columns_can_be_named(folder, tmp_path):
    path = written(tmp_path, [{"q": "what is", "a": "six", "text": "four"}] * 12)
    rows = make_task(config(folder, path, **{"data.text-column": "q,a"})).train_rows()
    assert rows.items[0] == (("user", "what is"), ("assistant", "six"))
    with pytest.raises(ValueError, match=r"expected the columns 'q,b'"):
        make_task(config(folder, path, **{"data.text-column": "q,b"})).train_rows()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": [CHAT[2]]}, "line 2: expected turns of user and assistant"),
        ({"messages": [CHAT[1], CHAT[1], CHAT[2]]}, "user after user"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "expected a role of .*'judge'"),
        ({"messages": "two"}, "expected a list of messages"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": 4}]}, "expected a text as"),
    ],
)
def test_rows_out_of_order_are_named(folder, tmp_path, row, match):
    path = written(tmp_path, [{"messages": CHAT}, row, *[{"messages": CHAT}] * 9])
    with pytest.raises(ValueError, match=match):
        make_task(config(folder, path)).train_rows()


def test_rows_without_an_answer_are_counted_and_left_out(folder, tmp_path):
    rows = [{"prompt": "what", "completion": "six"}] * 20 + [{"prompt": "what", "completion": " "}]
    task = make_task(config(folder, written(tmp_path, rows)))
    found = task.train_rows()
    assert found.origin.blank == 1
    empty = make_task(config(folder, written(tmp_path, rows[-1:] * 3, "empty.jsonl")))
    with pytest.raises(ValueError, match="expected rows with an answer, got 3 without"):
        empty.train_rows()


def test_no_cut_takes_away_the_whole_answer(folder, tmp_path):
    long = {"prompt": " ".join(["two and"] * 30), "completion": "is four"}
    task = make_task(config(folder, written(tmp_path, [long] * 12), **{"data.max-length": 8}))
    inputs = task.encode(task.train_rows())
    assert inputs.sizes.max() <= 8
    assert all((labels != -100).any() for labels in inputs.labels)


def test_a_model_without_a_template_gets_a_plain_one():
    text, spans = plain_chat((("user", "what"), ("assistant", "six")))
    assert text == "### User:\nwhat\n\n### Assistant:\nsix"
    assert [text[a:b] for a, b in spans] == ["six"]


def test_a_template_that_rewrites_earlier_turns():
    def render(messages, add_generation_prompt):
        last = messages[-1]["content"] if messages else ""
        return "|".join(m["content"].strip() for m in messages) + f"({last[:1]})"

    turns = [("user", "a"), ("assistant", " yes "), ("user", "b"), ("assistant", "no")]
    text, spans = templated_chat(turns, render)
    assert [text[a:b] for a, b in spans] == ["yes", "no"]
    with pytest.raises(ValueError, match="leaves out or changes an answer"):
        templated_chat(turns, lambda messages, **_: str(len(messages)) * (1 + len(messages)))


def test_the_loss_is_that_of_the_trained_tokens_however_they_are_batched(folder, tmp_path):
    rows = [{"prompt": "what is", "completion": " ".join(WORDS[: 1 + i % 5])} for i in range(30)]
    task = make_task(config(folder, written(tmp_path, rows)))
    inputs = task.encode(task.train_rows())
    model = task.model({}, seed=0)
    scores = evaluate(task, model, inputs, batch_size=7)
    nats, tokens = 0.0, 0
    for ids, labels in zip(inputs.ids, inputs.labels, strict=True):  # a row at a time, by hand
        logits = model(input_ids=torch.tensor(ids)[None].long()).logits[0].double()
        for at in np.flatnonzero(labels != -100):
            nats -= float(logits[at - 1].log_softmax(-1)[labels[at]])
            tokens += 1
    assert scores["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    # In training, the mean over a batch's trained tokens is the model's own loss.
    batch = inputs.batch(range(8))
    own = float(model(**batch).loss)
    counted = task.judge(model(**batch).logits, batch)["tokens"]
    assert own == pytest.approx(counted[0] / counted[1], rel=1e-5)


def test_it_learns_and_nothing_but_lora_is_trained(folder, tmp_path):
    rows = [{"prompt": "two and two", "completion": "is four"},
            {"prompt": "three and three", "completion": "is six"}] * 20  # fmt: skip
    told = config(folder, written(tmp_path, rows))
    task = make_task(told)
    inputs = task.encode(task.train_rows())
    model = add_lora(task.model({}, seed=0), told.lora, rank=4, seed=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    before = evaluate(task, model, inputs, batch_size=16)
    settings = TrainConfig(steps=80, learning_rate=0.1, precision="float32")
    train(model, inputs, settings, {}, seed=0)
    after = evaluate(task, model, inputs, batch_size=16)
    assert after["perplexity"] < 0.8 * before["perplexity"]
    assert 0 < task.quality(before) < task.quality(after) < 1


def test_the_door(folder, tmp_path):
    path = written(tmp_path, [{"prompt": "what is", "completion": "six"}] * 30)

    def checked(**flat):
        parts = read_config(config(folder, path, **flat).to_flat())
        rows = parts.task.train_rows()
        return check_model(parts, Report(parts.task, rows, rows))

    assert "none new" in checked()
    with pytest.raises(ValueError, match=r"200 tokens, .* set data\.max-length=64"):
        checked(**{"data.max-length": 200})
    with pytest.raises(ValueError, match="no head that could be trained alone"):
        checked(method="head")
    task = make_task(config(folder, path, **{"data.partition": "dirichlet"}))
    with pytest.raises(ValueError, match="have none"):
        shares(task, task.train_rows(), 2)
