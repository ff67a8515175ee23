"""What is refused before anything starts: in seconds, with a reason, and without a trace."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fedlora_app.config.keys import ConfigError, LoraConfig, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.launch import door, simulation
from fedlora_app.launch.door import idle_gpus, resource_problems
from fedlora_app.launch.inspection import Report
from fedlora_app.models.loading import build_model, positions
from fedlora_app.resuming import check_resume, make_saver
from fedlora_app.tasks import Rows
from run_simulation import main
from strategies.checkpoint import Checkpoints
from tests.app.test_models import folders  # noqa: F401
from tests.app.test_pretrained import checkpoint  # noqa: F401

TEXTS = ["oil price", "bank rate"]


def config(folder, **flat):
    return read_config({"model.name": str(folder), "data.max-length": 8, **flat})


def check_model(parts, labels, texts):
    """As the door does, for texts of so many labels."""
    rows = Rows(list(texts), np.zeros(len(texts), int), {"labels": [str(i) for i in range(labels)]})
    return door.check_model(parts, Report(parts.task, rows, rows))


def test_a_good_model_is_said_to_be_loaded(checkpoint):  # noqa: F811
    line = check_model(config(checkpoint("roberta")), 3, TEXTS)
    assert "4 made new (classifier)" in line
    check_model(config(checkpoint("gpt2"), **{"lora.dora": True}), 3, TEXTS)


def test_a_tokenizer_with_more_tokens_than_the_model(checkpoint):  # noqa: F811
    folder = checkpoint("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(44)])
    tokenizer.save_pretrained(folder)
    check_model(config(folder), 3, TEXTS)  # 50 in all: as many as rows
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    for head in ("stock", "mean-pool"):
        with pytest.raises(ConfigError, match=r"1 tokens more .* has 50 rows .*'<pad>', number 50"):
            check_model(config(folder, **{"model.head": head}), 3, TEXTS)


def test_a_tokenizer_of_another_model(checkpoint):  # noqa: F811
    with pytest.raises(ConfigError, match=r"100% of the tokens .* unknown to its tokenizer"):
        check_model(config(checkpoint("bert")), 3, ["des mots", "inconnus"])


@pytest.mark.parametrize(
    ("name", "most"), [("bert", 512), ("roberta", 18), ("gpt2", 1024), ("llama", None)]
)
def test_texts_longer_than_the_positions(checkpoint, name, most):  # noqa: F811
    folder = checkpoint(name)
    model = build_model(config(folder).config.model, num_labels=2, seed=0, shapes_only=True)
    assert positions(model) == most
    if most is None:
        check_model(config(folder, **{"data.max-length": 5000}), 2, TEXTS)
        return
    check_model(config(folder, **{"data.max-length": most}), 2, TEXTS)
    with pytest.raises(ConfigError, match=rf"{most + 1} tokens, .* set data\.max-length={most}"):
        check_model(config(folder, **{"data.max-length": most + 1}), 2, TEXTS)
    whole = build_model(config(folder).config.model, num_labels=2, seed=0)  # as the model has it
    ids = torch.full((1, most), 3)
    whole(input_ids=ids, attention_mask=torch.ones_like(ids))
    ids = torch.full((1, most + 1), 3)
    with pytest.raises((IndexError, RuntimeError)):
        whole(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_targets_that_the_model_does_not_have(checkpoint):  # noqa: F811
    with pytest.raises(ValueError, match=r"no linear layer is called 'q_proj'; name some of"):
        check_model(config(checkpoint("bert"), **{"lora.target-modules": "q_proj"}), 3, TEXTS)
    assert LoraConfig().target_modules == "auto"


def test_ranks_wider_than_the_model(checkpoint):  # noqa: F811
    folder, uniform = checkpoint("bert"), {"ranks.policy": "uniform"}
    check_model(config(folder, **uniform, **{"ranks.rank": 32}), 3, TEXTS)
    with pytest.raises(ConfigError, match=r"ranks up to 33, and the widest layer .* has 32"):
        check_model(config(folder, **uniform, **{"ranks.rank": 33}), 3, TEXTS)


def test_resources_that_nobody_has(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resource_problems(4, 1.0) == resource_problems(1, 0.25) == []
    (problem,) = resource_problems(5, 0)
    assert "5 CPUs, and this machine has 4" in problem
    (problem,) = resource_problems(1, 2.0)
    assert "2 GPUs, and this machine has 1" in problem
    for wrong in (-1.0, float("nan"), 1.5):
        (problem,) = resource_problems(1, wrong)
        assert "expected a share between 0 and 1 or a whole number" in problem


def test_a_gpu_that_no_client_uses_is_said(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert idle_gpus(1, 0) == ""  # there is none
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert idle_gpus(1, 0.5) == ""
    assert "1 GPU here" in idle_gpus(1, 0)
    assert "--gpus-per-client 0.125 gives" in idle_gpus(1, 0)
    assert "--gpus-per-client 0.5 gives" in idle_gpus(4, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 16)
    assert "16 GPUs here" in idle_gpus(1, 0)
    assert "--gpus-per-client 1 gives" in idle_gpus(1, 0)


def test_a_checkpoint_of_other_classes_is_refused_with_both_lists(tmp_path):
    run = RunConfig.from_flat({"resume-from": "latest", "output": str(tmp_path)})
    saved = make_saver(RunConfig(), tmp_path, {"labels": ["food", "sport"]})
    Checkpoints(tmp_path / "checkpoints").save(
        2, {"x": torch.zeros(1)}, {"progress": [2, 0]}, saved.fingerprint
    )
    (tmp_path / "summary.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for labels in (["sport", "food"], ["food", "sport", "zoo"]):
        for check in (check_resume, make_saver):
            with pytest.raises(ConfigError) as caught:
                check(run, tmp_path, {"labels": labels})
            assert repr(json.dumps(labels)) in str(caught.value)
            assert '["food", "sport"]' in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "seed=1", "lora.scale=2", "seed=1"], "seed: given 2 times"),
        (["--rounds", "3", "--config", "rounds=4"], "rounds: given 2 times (--rounds is one"),
        (["--gpus-per-client", "99"], "99 GPUs, and this machine has"),
        (["--gpus-per-client", "-1"], "expected a share between 0 and 1"),
        (["--cpus-per-client", "4096"], "4096 CPUs, and this machine has"),
        (["--config", "model.name=./no-such-model"], "expected a folder with a model"),
        (["--config", "data.max-length=513"], "set data.max-length=512"),
        (["--config", "lora.target-modules=q_proj"], "no linear layer is called 'q_proj'"),
        (["--config", "train.learning-rate=nan"], "train.learning-rate"),
        (["--config", "clock.profile=devices.csv"], "clock.profile"),
        (["--resume"], "there are no checkpoints"),
        (["--config", "ranks.policy=quality", "ranks.validation-rows=100000"], "leave none to"),
    ],
)
def test_the_command_line_refuses_and_leaves_no_folder(
    tmp_path, monkeypatch, capsys, arguments, expected
):
    def start(*args, **kwargs):
        raise AssertionError("a SuperLink was started")

    monkeypatch.setattr(simulation, "SuperLink", start)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.csv").write_text("snr_db\n3\n")
    output = ["--output", "out"]
    assert main([*arguments, *output]) == 2
    assert expected in capsys.readouterr().err
    assert [file.name for file in Path(tmp_path).iterdir()] == ["devices.csv"]


@pytest.mark.parametrize(("name", "fits"), [("bert", True), ("llama", False)])
def test_pairs_whose_texts_are_marked_need_a_model_that_knows_marks(checkpoint, name, fits):  # noqa: F811
    folder = checkpoint(name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    about = {"labels": ["x", "y"], "pairs": True}
    rows = Rows([("oil", "price"), ("bank", "rate")], np.arange(2), about)
    parts = config(folder)
    report = Report(parts.task, rows, rows)
    if fits:
        door.check_model(parts, report)
        batch = parts.task.encode(rows).batch([0, 1])
        assert batch["token_type_ids"].tolist() == [[0, 1], [0, 1]]
        build_model(parts.config.model, num_labels=2, seed=0)(**batch).loss.backward()
    else:
        with pytest.raises(ConfigError, match="token_type_ids, which the model does not know"):
            door.check_model(parts, report)


def test_pairs_longer_than_what_is_kept_of_them():
    parts = read_config({"data.max-length": 4})
    about = {"labels": ["x", "y"], "pairs": True}
    rows = Rows([("oil", "price"), ("bank", "rate")], np.arange(2), about)
    with pytest.raises(ConfigError, match="4 tokens, but a pair of texts takes 5 at least"):
        door.check_model(parts, Report(parts.task, rows, rows))
