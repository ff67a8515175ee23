"""The task of docs/tasks.md: taken out of the page, and put to work on a tiny model."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlora_app.config.read import read_config
from fedlora_app.data.partition import shares
from fedlora_app.data.tables import Table
from fedlora_app.evaluation import evaluate, per_sample_losses
from fedlora_app.launch.door import check_run
from fedlora_app.launch.inspection import check_own_data, clients_of, inspect
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import TASKS, primary
from fedlora_app.training import train
from run_simulation import main
from tests.integration.conftest import records

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
FILES = dict(re.findall(r'```python title="(\S+)"\n(.*?)```', PAGE.read_text("utf-8"), re.DOTALL))
NAMES = ["Ada", "Grace", "Alan", "Emmy", "Oslo", "Turin", "Lima"]
OTHERS = ["flew", "to", "today", "in", "it", "rained", "we", "met", "again"]


def tiny_model(folder):
    """A BERT that knows the words of the page, one of them (Kyoto) as two pieces."""
    pieces = ["[PAD]", "[UNK]", *NAMES, "Kyo", "##to", *OTHERS]
    numbers = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "names_task.py").write_text(FILES["names_task.py"], encoding="utf-8")
    space = {"__name__": "make_rows"}
    exec(compile(FILES["make_rows.py"], "make_rows.py", "exec"), space)
    space["write"](tmp_path / "names")
    before = dict(TASKS)
    yield {
        "plugins": "names_task",
        "task": "token-classification",
        "data.name": str(tmp_path / "names"),
        "data.partition": "natural",
        "data.partition-column": "speaker",
        "model.name": str(tiny_model(tmp_path / "model")),
        "train.precision": "float32",
        "output": str(tmp_path / "run"),
        "ranks.list": "2,4",
    }
    sys.modules.pop("names_task", None)
    TASKS.clear()
    TASKS.update(before)


def test_the_file_is_as_short_as_the_page_says():
    assert len(FILES["names_task.py"].splitlines()) < 150


def test_from_rows_to_scores(flat, tmp_path):
    parts = read_config(flat)
    task = parts.task
    assert primary(task).label == "F1 of names"
    assert clients_of(task) == 4
    data = inspect(task, clients=4)
    assert list(data.shares) == [60] * 4
    assert "words from 'tokens', tags from 'tags'" in str(data)
    assert "made new (classifier)" in check_run(parts, tmp_path / "run", data)
    assert data.about == {"tags": ["O", "person", "place"]}

    mine = task.encode(data.train.take(shares(task, data.train, 4)[2]))
    model = add_lora(task.model(data.about, seed=0), parts.config.lora, rank=4, seed=0)
    test = task.encode(data.test)
    before = evaluate(task, model, test, batch_size=16)
    found = per_sample_losses(task, model, test, batch_size=7)
    assert found.mean() == pytest.approx(before["loss"], abs=1e-5)
    train(model, mine, replace(parts.config.train, steps=80), seed=0)
    after = evaluate(task, model, test, batch_size=16)
    assert after.keys() == {"loss", "f1", "tag_accuracy"}
    assert after["loss"] < before["loss"]
    assert after["f1"] > 0.8


def test_the_first_piece_of_a_word_has_its_tag(flat):
    task = read_config(flat).task
    words = [["in", "Kyoto", "it", "rained"], ["Ada"]]
    table = Table({"tokens": words, "tags": [["O", "place", "O", "O"], ["O"]]})
    tokens = task.encode(task.rows(table, {"tags": ["O", "person", "place"]}, "here"))
    assert tokens.sizes.tolist() == [5, 1]
    assert tokens.batch([1, 0])["labels"].tolist() == [[0, *[-100] * 4], [0, 2, -100, 0, 0]]
    assert tokens.batch([1, 0])["attention_mask"].tolist() == [[1, 0, 0, 0, 0], [1] * 5]


def test_scores_by_hand(flat):
    task = read_config(flat).task
    labels = torch.tensor([[0, 1, 2, -100], [1, 1, -100, -100]])
    given = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 2]])
    sums = task.judge(torch.nn.functional.one_hot(given, 3).float(), {"labels": labels})
    # Of names 4 are there (1, 2, 1, 1), 3 were given (1, 1, 1), 2 of them rightly.
    assert task.summary(sums) == {"f1": pytest.approx(4 / 7), "tag_accuracy": pytest.approx(3 / 5)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "line 1: expected a tag for each word"),
        ({"tokens": ["a"], "tags": ["river"]}, r"line 1: expected tags that training has \(O, per"),
        ({"words": ["a"], "tags": ["O"]}, "expected columns 'tokens' and 'tags', got words, tags"),
    ],
)
def test_wrong_rows_of_a_node(flat, tmp_path, row, message):
    task = read_config(flat).task
    (tmp_path / "own.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        task.own_rows(str(tmp_path / "own.jsonl"), {"tags": ["O", "person", "place"]})


def test_a_node_shows_its_own_rows_before_it_starts(flat):
    parts = read_config(flat)
    path = f"{flat['data.name']}/train.jsonl"
    assert "240 rows" in check_own_data({"data-path": path}, parts.config)


def test_ways_that_need_classes_are_refused(flat):
    parts = read_config({**flat, "data.partition": "dirichlet"})
    with pytest.raises(ValueError, match="of token-classification have none; use iid, quantity or"):
        inspect(parts.task, clients=4)
    assert np.unique(parts.task.train_rows().groups).size == 4


@pytest.mark.slow
def test_the_first_run_of_the_page(flat, tmp_path, monkeypatch):
    """A real simulation, by the command of the page with fewer rounds and the tiny model."""
    command = re.search(r"python run_simulation.py (.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]
    page = dict(re.findall(r"(\S+)=(\S+)", command))
    assert page.items() <= {**flat, "data.name": "names"}.items()
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{before}")
    keys = [f"{key}={value}" for key, value in flat.items() if key != "output"]
    small = ["train.steps=3", "min-nodes=4", *keys]
    assert main(["--rounds", "1", "--output", flat["output"], "--config", *small]) == 0
    assert 0 <= records(tmp_path / "run", "round")[-1]["server_f1"] <= 1
