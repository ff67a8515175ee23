"""Exports beside plain transformers and PEFT: the same logits as the run's own model."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from fedlora_app.after.export import export_run
from fedlora_app.after.run import load_run
from fedlora_app.tasks.preference import without_adapter
from tests.app.test_images import picture
from tests.app.trained import KINDS, finished, summary

TEXTS = ["oil price", "bank rate bank", "rate"]


def own_logits(loaded):
    """Return what the run's own model says to some rows, and these as plain code has them."""
    torch.manual_seed(0)
    if loaded.task.name == "image-classification":
        found = loaded.task.processor([picture(i, "RGB") for i in range(3)], return_tensors="pt")
    elif loaded.task.name == "text-classification":
        found = loaded.task.tokenizer(TEXTS, padding=True, return_tensors="pt")
    else:
        ids = torch.randint(4, 15, (3, 9))
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return loaded.model(**found).logits, found


def run_card(folder, monkeypatch):
    """Run the Python of a card, with an example in the place of dots; return its names."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    picture(0, "RGB").save(folder / "photo.png")
    monkeypatch.chdir(folder)
    space = {"FOLDER": str(folder)}
    exec(compile(code.replace("…", "what is"), "card", "exec"), space)
    return space


AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
}


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_libraries_compute_what_the_run_does(runs, tmp_path, monkeypatch, kind, merge):
    run, out = runs(kind), tmp_path / "out"
    loaded = load_run(run)
    wanted, batch = own_logits(loaded)
    with torch.no_grad(), without_adapter(loaded.model):
        changed = not torch.allclose(loaded.model(**batch).logits, wanted, atol=1e-3)
    assert changed or kind == "head alone"
    done = export_run(run, out, merge=merge)
    assert done.energy is None
    auto = getattr(transformers, AUTO[loaded.task.name])
    base = out if merge else run.parent / "model"
    if kind == "texts, mean-pool":
        encoder = transformers.AutoModel.from_pretrained(base)
        encoder = encoder if merge else PeftModel.from_pretrained(encoder, out)
        head = torch.nn.Linear(32, 2)
        dense = load_file(out / "2_Dense" / "model.safetensors")
        head.load_state_dict({key.removeprefix("linear."): t for key, t in dense.items()})
        with torch.no_grad():
            states = encoder.eval()(**batch).last_hidden_state
            found = torch.stack([
                head(row[keep.bool()].mean(0))
                for row, keep in zip(states, batch["attention_mask"], strict=True)
            ])  # fmt: skip
    else:
        two = {"num_labels": 2} if "classification" in loaded.task.name else {}
        model = auto.from_pretrained(base, **two)
        model = model if merge else PeftModel.from_pretrained(model, out)
        with torch.no_grad():
            found = model.eval()(**batch).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert not list(tmp_path.glob("*.new"))
    space = run_card(out, monkeypatch)
    if "logits" in space:
        assert space["logits"].shape == (1, 2)


def test_a_merged_classifier_names_its_labels(runs, tmp_path):
    export_run(runs("texts, merged"), tmp_path / "m", merge=True)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "m"))
    found = load_run(runs("texts, merged")).predict(TEXTS)
    for ours, theirs in zip(found, pipe(TEXTS), strict=True):
        assert theirs["label"] == ours["label"]
        assert theirs["score"] == pytest.approx(ours["probability"], abs=1e-5)


def test_a_chat_model_answers_as_the_run_does(runs, tmp_path):
    export_run(runs("chat"), tmp_path / "m", merge=True)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "m"))
    asked = [{"role": "user", "content": "what is"}]
    given = pipe(asked, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]["content"]
    assert given.strip() == load_run(runs("chat")).predict(["what is"])[0]["answer"]


def test_cut_to_a_rank(runs, tmp_path):
    run = runs("texts, merged")
    whole = load_run(run)
    done = export_run(run, tmp_path / "one", rank=1)
    assert done.rank == 1
    assert 0 < done.energy < 1
    told = json.loads((tmp_path / "one" / "export.json").read_text())
    assert told["energy"] == done.energy
    wide = export_run(run, tmp_path / "wide", rank=100)
    assert wide.energy is None
    kept = total = 0.0
    cut = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, layer in whole.model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            delta = layer.get_delta_weight("default").detach().double().numpy()
            U, S, Vt = np.linalg.svd(delta)
            kept, total = kept + S[0] ** 2, total + (S**2).sum()
            A, B = (cut[f"{name}.lora_{factor}.weight"].numpy() for factor in "AB")
            best = S[0] * np.outer(U[:, 0], Vt[0])
            assert np.allclose(2.0 * B @ A, best, atol=1e-5 * S[0])  # lora.scale is 2
    assert done.energy == pytest.approx(kept / total, rel=1e-4)


def test_the_card(runs, tmp_path):
    run = runs("texts, merged")
    export_run(run, tmp_path / "a", rank=2, base_name="google-bert/bert-tiny")
    text = (tmp_path / "a" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "google-bert/bert-tiny"
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-classification"
    results = front["model-index"][0]["results"][0]["metrics"]
    assert results[0]["type"] == "accuracy"
    assert results[0]["value"] == pytest.approx(summary(run)["accuracy"])
    for said in ("| clients | 3, 3 of them in a round |", "| rule | flora |", "| rounds | 1 |",
                 "2 (67%), 4 (33%)", "of the adapter's energy kept", "MB up",
                 "fedlora run --clients 3", "aggregation=flora"):  # fmt: skip
        assert said in text
    assert str(run.parent) not in text  # nor anything else of this machine
    assert str(run.parent) not in (tmp_path / "a" / "adapter_config.json").read_text()


@pytest.mark.parametrize(("bits", "near"), [("4bit", 1e-5), ("8bit", 0.02)])
def test_a_base_of_few_bits_is_written_as_the_numbers_these_stand_for(tmp_path, bits, near):
    pytest.importorskip("bitsandbytes", reason="the extra [quantization]")
    run = finished(tmp_path, "chat", **{"model.quantization": bits})
    loaded = load_run(run)
    wanted, batch = own_logits(loaded)
    assert loaded.predict(["what is"])[0]["answer"] is not None
    export_run(run, tmp_path / "m", merge=True, dequantise=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():  # 8 bits round what passes between layers, too
        torch.testing.assert_close(model(**batch).logits, wanted, atol=near, rtol=0)


def test_what_is_refused_writes_nothing(runs, tmp_path):
    run = runs("chat")
    shutil.copytree(run, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    changed = {**config, "model.quantization": "4bit"}
    (tmp_path / "q" / "config.json").write_text(json.dumps(changed))
    for source, options, message in (
        (tmp_path / "q", {"merge": True}, "few bits, .* set dequantise"),
        (run, {"merge": True, "dequantise": True}, "dequantise: is for merging"),
        (run, {"rank": 0}, "rank: expected at least 1"),
        (run, {"dtype": "float16"}, "an adapter is float32"),
        (run, {"push": "a/b"}, "expected a base that others can load"),
    ):
        with pytest.raises(ValueError, match=message):
            export_run(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="expected a folder that is not there yet"):
        export_run(run, tmp_path / "there")
