"""A finished run's folder, loaded where it is and on what could be another machine, and asked."""

import json
import shutil

import numpy as np
import pytest
import torch

from fedlora_app.after.predict import predict
from fedlora_app.after.run import load_run
from fedlora_app.config.keys import ConfigError
from fedlora_app.evaluation import evaluate
from tests.app.test_images import png
from tests.app.trained import KINDS, summary


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_folder_scores_what_the_run_did(runs, tmp_path, kind):
    run = runs(kind)
    shutil.copytree(run / "adapter", tmp_path / "r" / "adapter")
    for name in ("config.json", "model.json"):
        shutil.copy(run / name, tmp_path / "r")
    shutil.copytree(run.parent / "model", tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").glob("*token*"):  # the run has it itself
        file.unlink()
    loaded = load_run(tmp_path / "r", base=str(tmp_path / "elsewhere"))
    rows = loaded.task.test_rows(loaded.about)
    found = evaluate(loaded.task, loaded.model, loaded.task.encode(rows), batch_size=5)
    for name in ("loss", *(score.name for score in loaded.task.scores)):
        assert found[name] == pytest.approx(summary(run)[name], abs=1e-5)


def test_texts_are_answered_in_order_and_bad_rows_named(runs, tmp_path):
    run = runs("texts, merged")
    file = tmp_path / "rows.csv"
    file.write_text("id,text,label\n7,oil price,\n8,,oil\n9,bank rate bank rate,nonsense\n")
    told = predict(run, file, tmp_path / "out.jsonl", keep=["id"], progress=False)
    assert told == {"rows": 3, "refused": 1}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["7", "8", "9"]
    assert "rows.csv, line 3: expected a text, got none in 'text'" in lines[1]["error"]
    loaded = load_run(run)
    assert loaded.classes == ("bank", "oil")
    tokens = loaded.task.tokenizer(["oil price", "bank rate bank rate"], padding=True,
                                   return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        wanted = loaded.model(**tokens).logits.softmax(-1).numpy()
    for line, row in zip((lines[0], lines[2]), wanted, strict=True):
        assert list(line["probabilities"]) == ["bank", "oil"]
        assert np.allclose(list(line["probabilities"].values()), row, atol=1e-5)
        assert line["label"] == loaded.classes[row.argmax()]
    assert loaded.predict(["oil price"])[0]["label"] == lines[0]["label"]


def test_images_of_a_flat_folder(runs, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(png(seed))
    (folder / "1.png").write_bytes(b"broken")
    loaded = load_run(runs("images"))
    found = loaded.predict(folder)
    assert "1.png: expected an image that can be read" in found[1]["error"]
    again = loaded.predict([folder / "2.png", png(0)])
    for a, b in zip((found[2], found[0]), again, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-6)


def test_answers_are_written_as_the_run_wrote_them(runs):
    from fedlora_app.tasks.generation import answers, prompt_of

    loaded = load_run(runs("chat"))
    asked = ["what is", "two"]
    turns = [(("user", text), ("assistant", "")) for text in asked]
    prompts = [prompt_of(loaded.task.tokenizer, each) for each in turns]
    wanted = answers(loaded.model, loaded.task.tokenizer, prompts, tokens=4, batch_size=1)
    assert [line["answer"] for line in loaded.predict(asked)] == wanted
    chats = [[{"role": "user", "content": text}] for text in asked]
    chats[0].append({"role": "assistant", "content": "nobody reads this"})
    found = loaded.predict([*({"messages": chat} for chat in chats), {"messages": []}])
    assert [line.get("answer") for line in found] == [*wanted, None]
    assert "row 3: expected a question" in found[2]["error"]


def test_pairs_are_told_apart_or_answered(runs):
    loaded = load_run(runs("pairs"))
    row = {"prompt": "what is", "chosen": "six three again", "rejected": "four"}
    found = loaded.predict([row, {**row, "chosen": "four", "rejected": "six three again"}])
    assert [line["preferred"] for line in found] == ["rejected", "chosen"]
    assert found[0]["margin"] == pytest.approx(found[1]["margin"], rel=1e-4)
    assert found[0]["probability"] == pytest.approx(1 / (1 + np.exp(-found[0]["margin"])))
    assert "answer" in loaded.predict(["what is"])[0]


def test_another_base_is_refused(runs, tmp_path):
    run = runs("texts, merged")
    other = load_run(run).task.model({"labels": ["a", "b"]}, seed=9)
    shutil.copytree(run.parent / "model", tmp_path / "model")
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected the weights the run was trained on \(SHA-256"):
        load_run(run, base=str(tmp_path / "model"))


def test_a_folder_of_before_is_loaded(runs, tmp_path):
    run = runs("texts, merged")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.json").unlink()
    for file in (tmp_path / "run" / "adapter").glob("*token*"):
        file.unlink()
    assert load_run(tmp_path / "run").predict(["oil"]) == load_run(run).predict(["oil"])


def test_what_is_no_run_or_cannot_differ(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json; name the folder"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match=r"lora\.scale: it made the model"):
        load_run(runs("chat"), config={"lora.scale": 1.0})
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        predict(runs("chat"), tmp_path / "a.csv", tmp_path / "b.csv")
    (tmp_path / "a.csv").write_text("words\nx\n")
    with pytest.raises(ValueError, match="expected a column of what is asked: messages, conv"):
        predict(runs("chat"), tmp_path / "a.csv", tmp_path / "b.jsonl")
    assert not list(tmp_path.glob("b*"))


def test_what_is_cut_off_leaves_the_old_file(runs, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text\noil\n")
    (tmp_path / "b.jsonl").write_text("old\n")

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora_app.tasks.classification.Classification.answers", broken)
    with pytest.raises(KeyboardInterrupt):
        predict(runs("head alone"), tmp_path / "a.csv", tmp_path / "b.jsonl", progress=False)
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["a.csv", "b.jsonl"]
    assert (tmp_path / "b.jsonl").read_text() == "old\n"
