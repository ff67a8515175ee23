"""Answers that a language model generates, and how they are scored."""

import pytest
import torch
import transformers

from fedlora_app.config.read import read_config
from fedlora_app.held_out import HeldOut
from fedlora_app.launch.door import check_model
from fedlora_app.launch.inspection import Report
from fedlora_app.models.lora import add_lora
from fedlora_app.report import samples
from fedlora_app.report.folder import RunFolder
from fedlora_app.report.records import read_records
from fedlora_app.tasks import make_task
from fedlora_app.tasks.generation import answers, end_tokens, prompt_of
from fedlora_app.tasks.scorers import SCORERS, Scorer, choice_letter, final_number
from fedlora_app.training import train
from tests.app.test_language import TEMPLATE, WORDS, config, folder, written  # noqa: F401

ASKED = [{"prompt": " ".join(WORDS[: 1 + i % 7]), "completion": "is four"} for i in range(30)]


def by_hand(model, ids, ends, count):
    """Write one token at a time, without a cache, a batch or padding."""
    ids, made = list(ids), []
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
        made.append(token)
    return made


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_each_prompt_gives_alone(folder, tmp_path, side):  # noqa: F811
    told = config(folder, written(tmp_path, ASKED))
    task = make_task(told)
    tokenizer, model = task.tokenizer, task.model({}, seed=0)
    model.generation_config.repetition_penalty = 1.7  # of its files, and not for a score
    tokenizer.padding_side = side
    prompts = [prompt_of(tokenizer, turns) for turns in task.train_rows().items[:5]]
    found = answers(model, tokenizer, prompts, tokens=4, batch_size=3)
    ends = end_tokens(tokenizer, model)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        made = tokenizer.decode(by_hand(model, ids, ends, 4), skip_special_tokens=True)
        assert answer == made.strip()
    assert len(set(found)) > 1
    assert model.generation_config.repetition_penalty == 1.7
    long = answers(model, tokenizer, ["two " * 200], tokens=60, batch_size=1)  # 64 positions
    assert len(long[0].split()) <= 60


def test_an_answer_ends_where_the_template_ends_a_turn(folder):  # noqa: F811
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert end_tokens(tokenizer, model) == [1]
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<user>")  # another than the text's end
    model.generation_config.eos_token_id = [1, 2]
    assert end_tokens(tokenizer, model) == [1, 2, tokenizer.convert_tokens_to_ids("<user>")]
    turns = (("user", "what"), ("assistant", "six"))
    assert prompt_of(tokenizer, turns) == "<user>what<user><assistant>"
    tokenizer.chat_template = None
    assert prompt_of(tokenizer, turns) == "### User:\nwhat\n\n### Assistant:\n"


@pytest.mark.parametrize(
    ("name", "given", "wanted", "score"),
    [
        ("exact", " is\nfour ", "is four", 1),
        ("exact", "is four .", "is four", 0),
        ("number", "5 apples and 7 pears make $1,234.50.", "so #### 1234.5", 1),
        ("number", "#### 18\nHuman: and 7", "9 + 9 = 18\n#### 18", 1),
        ("number", "it is -3", "#### 3", 0),
        ("number", "no idea", "#### 3", 0),
        ("number", "3", "none", 0),
        ("choice", "The answer is (B) since A is wrong.", "B", 1),
        ("choice", "C. Because", "C", 1),
        ("choice", "A train is fast", "A", 0),
        ("choice", "(D)", "**Answer: d**", 1),
    ],
)
def test_scorers(name, given, wanted, score):
    assert SCORERS[name]().score(given, wanted) == score


def test_parts_of_scorers():
    assert final_number("") is None
    assert final_number("2 and 3") == 3
    assert choice_letter("") is None
    assert choice_letter("Bananas") is None


@pytest.fixture
def keywords(tmp_path, monkeypatch):
    """A scorer of one's own, in a module that ``plugins`` names."""
    (tmp_path / "my_scorer.py").write_text(
        "from fedlora_app.tasks.scorers import Scorer, register_scorer\n"
        "@register_scorer\nclass Words(Scorer):\n    name = 'my-words'\n"
        "    def score(self, given, wanted):\n"
        "        return len({*given.split()} & {*wanted.split()}) / len({*wanted.split()})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_scorer"
    SCORERS.pop("my-words", None)


def test_it_learns_to_answer_and_one_s_own_scorer_sees_it(folder, tmp_path, keywords):  # noqa: F811
    flat = {"evaluate.generate": 6, "evaluate.scorer": "my-words", "evaluate.generate-tokens": 5,
            "plugins": keywords, "train.steps": 60, "train.learning-rate": 0.1}  # fmt: skip
    told = config(folder, written(tmp_path, ASKED), **flat)
    task = make_task(told)
    assert [score.name for score in task.scores] == ["perplexity", "my_words"]
    rows = task.train_rows()
    held_out = HeldOut(task, rows)
    model = add_lora(task.model({}, seed=0), told.lora, rank=8, seed=0)
    kept = RunFolder(tmp_path / "run", told)
    kept.begin()
    before = held_out.evaluate(model)
    kept.keep(held_out.samples, 0)
    train(model, task.encode(rows), told.train, {}, seed=0)
    after = held_out.evaluate(model, everything=True)
    kept.keep(held_out.samples, 2)
    assert before["my_words"] < 0.5 < after["my_words"]
    assert len(held_out.samples) == 4
    assert held_out.samples[0].wanted == held_out.samples[0].given == "is four"
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [(r["kind"], r["round"]) for r in records] == [("samples", 0), ("samples", 2)]
    page = samples.section(records)
    assert "after round 0" in page
    assert "is four [1.000]" in page
    assert samples.section([]) == ""


class Wild(Scorer):
    """Gives what is no score."""

    name = "wild"

    def score(self, given, wanted):
        return 7.0


def test_what_is_refused(folder, tmp_path, monkeypatch):  # noqa: F811
    path = written(tmp_path, ASKED)
    texts = written(tmp_path, [{"text": "be kind again"}] * 30, "texts.jsonl")

    def checked(data=path, **flat):
        few = {"evaluate.generate": 3, "evaluate.generate-tokens": 8, **flat}
        parts = read_config(config(folder, data, **few).to_flat())
        rows = parts.task.train_rows()
        return check_model(parts, Report(parts.task, rows, rows))

    assert "none new" in checked()
    with pytest.raises(ValueError, match=r"evaluate.scorer: expected one of exact, .* got 'bleu'"):
        checked(**{"evaluate.scorer": "bleu"})
    with pytest.raises(ValueError, match="no room for a prompt among the model's 64 positions"):
        checked(**{"evaluate.generate-tokens": 64})
    with pytest.raises(ValueError, match=r"evaluate.generate: .* got plain texts"):
        checked(texts)
    monkeypatch.setitem(SCORERS, "wild", Wild)
    flat = {"evaluate.generate": 3, "evaluate.generate-tokens": 8, "evaluate.scorer": "wild"}
    task = make_task(config(folder, path, **flat))
    with pytest.raises(ValueError, match=r"'wild': expected a number from 0 to 1, got 7"):
        task.try_out(task.model({}, seed=0), task.train_rows())
