from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from peft import PeftModel

from fedlora_app.config.keys import LoraConfig, ModelConfig, RunConfig
from fedlora_app.data import packaged
from fedlora_app.models.loading import MeanPoolClassifier, build_model, build_tokenizer
from fedlora_app.models.lora import add_lora
from fedlora_app.models.onnx_weights import read_bert
from fedlora_app.tasks import make_task

L3 = ModelConfig(name="packaged:minilm-l3")
TEXTS = ["oil prices rose sharply", "crude oil became more expensive", "a cat sleeps on the sofa"]


@pytest.fixture(scope="module")
def batch():
    return build_tokenizer(L3)(TEXTS, padding=True, return_tensors="pt")


def test_converted_onnx_model_computes_what_the_file_computes(batch):
    model = build_model(L3, num_labels=20, seed=0)
    assert isinstance(model, MeanPoolClassifier)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert not mask.all()
    graph = ReferenceEvaluator(str(packaged.model_path(L3.name)))
    outputs = graph.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    (states,) = (torch.tensor(output) for output in outputs if output.ndim == 3)
    (pooled,) = (torch.tensor(output) for output in outputs if output.shape == (3, 384))

    with torch.no_grad():
        got = model.encoder(ids, mask).last_hidden_state
        logits = model(ids, mask).logits

    torch.testing.assert_close(got, states, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits, model.classifier(pooled), atol=2e-5, rtol=0)
    # The tokenizer is another package's: a paraphrase lies nearer than another topic.
    other = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert other[0] > other[1] + 0.3


def test_borrowed_tokenizer_has_the_vocabulary_of_the_converted_model():
    # Both models descend from one: the same word has a similar vector in both.
    first, second = (
        build_model(config, num_labels=2, seed=0).encoder.get_input_embeddings().weight
        for config in (L3, ModelConfig())
    )
    assert torch.cosine_similarity(first, second).quantile(0.01) > 0.7
    assert torch.cosine_similarity(first, second.roll(1, 0)).mean() < 0.2


@pytest.mark.parametrize("head", ["stock", "mean-pool"])
def test_converted_model_same_bits_whatever_ran_before(head):
    config = ModelConfig(name=L3.name, head=head)
    states, draws = [], []
    for seed, before in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(before)
        model = build_model(config, num_labels=5, seed=seed)
        draws.append(torch.rand(3))
        states.append(model.state_dict())
    same, also, other = states
    assert same.keys() == also.keys()
    assert all(torch.equal(same[key], also[key]) for key in same)
    assert not torch.equal(same["classifier.weight"], other["classifier.weight"])
    assert torch.equal(draws[0], draws[2])
    assert same["classifier.weight"].shape == (5, 384)
    assert all(value.is_contiguous() for value in same.values())  # safetensors wants them so


@pytest.mark.parametrize("head", ["stock", "mean-pool"])
def test_adapter_of_a_converted_model_trains_and_loads_again(batch, tmp_path, head):
    config = ModelConfig(name=L3.name, head=head)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model = add_lora(build_model(config, num_labels=3, seed=0), LoraConfig(), rank=4, seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.arange(3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sum(".lora_B." in name for name, _ in model.named_parameters()) == 6  # 3 layers × q, v
    model.save_pretrained(tmp_path)

    fresh = PeftModel.from_pretrained(build_model(config, num_labels=3, seed=0), tmp_path)

    with torch.no_grad():
        torch.testing.assert_close(
            fresh.eval()(input_ids=ids, attention_mask=mask).logits,
            model.eval()(input_ids=ids, attention_mask=mask).logits,
        )


def test_bfloat16_converted_model(batch):
    model = build_model(L3, num_labels=3, seed=0, precision="bfloat16")
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}
    exact = build_model(L3, num_labels=3, seed=0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, mask).logits
    torch.testing.assert_close(logits.float(), exact(ids, mask).logits, atol=0.02, rtol=0.1)


def test_files_that_are_no_exported_bert_are_refused(tmp_path, monkeypatch):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a protocol buffer")
    with pytest.raises(ValueError, match=r"broken\.onnx: expected an ONNX file"):
        read_bert(broken)

    path = packaged.model_path(L3.name)
    model = onnx.load(path)
    product = next(node for node in model.graph.node if node.name.endswith("key/MatMul"))
    product.op_type = "Mul"  # so that the weight of one layer is not found
    onnx.save(model, tmp_path / "lacking.onnx")
    lacking = r"1 arrays do not fit .* encoder\.layer\.0\.attention\.self\.key\.weight.*got none"
    with pytest.raises(ValueError, match=lacking):
        read_bert(tmp_path / "lacking.onnx")

    del model.graph.initializer[:]
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(ValueError, match=r"'embeddings\.word_embeddings\.weight' is missing"):
        read_bert(tmp_path / "empty.onnx")

    # As a user meets it: with what to do.
    monkeypatch.setattr(packaged, "model_path", lambda name: broken)
    with pytest.raises(FileNotFoundError, match=r"--require-hashes.*expected an ONNX file"):
        build_model(L3, num_labels=2, seed=0)


def test_names_of_tokenizers():
    assert packaged.tokenizer_name("packaged:minilm-l3") == "packaged:minilm-l6"
    for name in ("packaged:minilm-l6", "packaged:gpt5", "minilm-l3", "./minilm-l3"):
        assert packaged.tokenizer_name(name) == name


def test_conversations_of_a_package_once_each_by_topic():
    keys = {"task": "causal-lm", "model.name": "packaged:smollm2-135m"}
    task = make_task(RunConfig.from_flat({**keys, "data.name": "packaged:chatterbot"}))
    table = task.splits("packaged:chatterbot")["train"]
    rows = task.rows(table, None, "here")
    assert len(rows) == len({rows.items[i] for i in range(len(rows))}) == 899
    assert len(rows.about["categories"]) == 21
    assert any("1127 conversations that had come before" in note for note in rows.origin.notes)
    names = np.array(task.strata_names(rows.about))[task.strata(rows)]
    assert rows.items[0] == (
        ("user", "What is AI?"),
        ("assistant", "Artificial Intelligence is the branch of engineering and science devoted to "
                      "constructing machines that think."),
    )  # fmt: skip
    assert names[0] == "ai"
    path, place = table.place(0)
    assert (path.name, place) == ("ai.yml", "conversation 1")
    assert (names == "trivia").sum() == 261
