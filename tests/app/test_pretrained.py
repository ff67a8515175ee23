"""What of a model its files lack: trained and saved with the adapter, or refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedlora_app.config.keys import LoraConfig, ModelConfig
from fedlora_app.evaluation import per_sample_losses
from fedlora_app.models.loading import build_model, build_tokenizer
from fedlora_app.models.lora import add_lora
from fedlora_app.report.folder import save_adapter
from tests.app.test_models import SMALL, folders, inputs  # noqa: F401
from tests.app.texts import TASK, Texts, tokenize

HEADS = {"num_attention_heads": 2}
# Pretrained for masked or next words: no classification head, and no pooler either.
CHECKPOINTS = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL, **HEADS)),
    "roberta": (
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig(**SMALL, **HEADS, max_position_embeddings=20),
    ),
    "deberta": (transformers.DebertaV2ForMaskedLM, transformers.DebertaV2Config(**SMALL, **HEADS)),
    "albert": (
        transformers.AlbertForMaskedLM,
        transformers.AlbertConfig(**SMALL, **HEADS, embedding_size=16),
    ),
    "electra": (transformers.ElectraForMaskedLM, transformers.ElectraConfig(**SMALL, **HEADS)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, pad_token_id=1),
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, **HEADS, num_key_value_heads=1, pad_token_id=1),
    ),
    "llama-tied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **SMALL, **HEADS, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=1
        ),
    ),
}


@pytest.fixture
def checkpoint(folders, tmp_path):  # noqa: F811
    def make(name):
        kind, config = CHECKPOINTS[name]
        torch.manual_seed(0)
        folder = tmp_path / name
        kind(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{folders['bert']}/{file}", folder)
        return folder

    return make


@pytest.mark.parametrize("targets", ["auto", "dense"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_adapter_gives_the_same_logits_on_the_plain_model(checkpoint, tmp_path, name, targets):
    if targets == "dense" and name in ("gpt2", "llama", "llama-tied", "albert"):
        pytest.skip("has no layers of that name, or only in groups")
    config = ModelConfig(name=str(checkpoint(name)), head="stock")
    model = add_lora(
        build_model(config, num_labels=3, seed=5),
        LoraConfig(target_modules=targets),
        rank=2,
        seed=0,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    model.eval().save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    expected = model(**inputs()).logits
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(
            config.name, num_labels=3
        )
        again = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(again(**inputs()).logits, expected)


@pytest.mark.parametrize("head", ["stock", "mean-pool"])
def test_adapter_of_pairs_gives_the_same_logits_when_it_is_loaded(checkpoint, tmp_path, head):
    config = ModelConfig(name=str(checkpoint("bert")), head=head)
    model = add_lora(build_model(config, num_labels=3, seed=5), LoraConfig(), rank=2, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_adapter(model.eval(), tmp_path / "adapter", config.name, {"pairs": True})
    assert (tmp_path / "adapter" / "pairs.json").read_text().strip() == "true"
    types = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    expected = model(**inputs(), token_type_ids=types).logits
    assert not torch.allclose(expected, model(**inputs()).logits)
    again = PeftModel.from_pretrained(
        build_model(config, num_labels=3, seed=5), str(tmp_path / "adapter")
    ).eval()
    torch.testing.assert_close(again(**inputs(), token_type_ids=types).logits, expected)


def test_what_was_loaded_and_what_is_new_is_said(checkpoint):
    model = build_model(ModelConfig(name=str(checkpoint("bert"))), num_labels=3, seed=0)
    assert model.loaded.parts == ("bert.pooler", "classifier")
    assert "4 made new (bert.pooler, classifier)" in model.loaded.line()
    shapes = build_model(
        ModelConfig(name=str(checkpoint("bert"))), num_labels=3, seed=0, shapes_only=True
    )
    assert shapes.loaded.line() == model.loaded.line()
    assert {p.device.type for p in shapes.parameters()} == {"meta"}


@pytest.mark.parametrize("head", ["stock", "mean-pool"])
@pytest.mark.parametrize("shapes_only", [False, True])
def test_lacking_weights_are_refused(checkpoint, head, shapes_only):
    folder = checkpoint("bert")
    file = folder / "model.safetensors"
    whole = load_file(file)

    def refused(match):
        config = ModelConfig(name=str(folder), head=head)
        with pytest.raises(ValueError, match=match):
            build_model(config, num_labels=3, seed=0, shapes_only=shapes_only)

    # other names than the model's, all of them but one
    odd = {(k if "word_emb" in k else f"module.net.{k}"): v for k, v in whole.items()}
    save_file(odd, file, {"format": "pt"})
    refused(r"lack \d+ of \d+ tensors, the first .*; \d+ tensors in them are not .* module\.net\.")
    lacking = {k: v for k, v in whole.items() if "layer.1.output.LayerNorm.weight" not in k}
    save_file(lacking, file, {"format": "pt"})
    refused(r"lack 1 of \d+ tensors, the first .*layer\.1\.output\.LayerNorm\.weight")
    save_file(whole, file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": 60}))
    refused(r"word_embeddings\.weight has shape \(50, 32\) in its files and \(60, 32\)")


def test_files_that_are_none_are_named_with_the_remedy(checkpoint):
    folder = checkpoint("bert")
    file, config = folder / "model.safetensors", ModelConfig(name=str(folder))
    whole = file.read_bytes()
    for shapes_only in (False, True):
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(FileNotFoundError, match=r"bert'.*model\.safetensors .*`git lfs pull`"):
            build_model(config, num_labels=2, seed=0, shapes_only=shapes_only)
        for cut in (len(whole) // 2, 5, 0):
            file.write_bytes(whole[:cut])
            with pytest.raises(FileNotFoundError, match=r"model\.safetensors .*damaged or cut"):
                build_model(config, num_labels=2, seed=0, shapes_only=shapes_only)
    file.write_bytes(whole)
    (folder / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json .*`git lfs pull`"):
        build_tokenizer(config)


def test_encoder_decoders_are_not_supported(tmp_path):
    for config in (
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1),
        transformers.BartConfig(vocab_size=50, d_model=32),
    ):
        config.save_pretrained(tmp_path)
        for head in ("stock", "mean-pool", "auto"):
            with pytest.raises(ValueError, match=f"encoder-decoder models .{config.model_type}."):
                build_model(ModelConfig(name=str(tmp_path), head=head), num_labels=2, seed=0)


def test_code_in_the_folder_is_neither_run_nor_asked_for(checkpoint, monkeypatch):
    def ask(*args):
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    folder = checkpoint("bert")
    settings = json.loads((folder / "config.json").read_text())
    own = {"model_type": "mytopicnet", "auto_map": {"AutoConfig": "conf.MyConf"}}
    (folder / "config.json").write_text(json.dumps(settings | own))
    (folder / "conf.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match=r"code of its own .*never run here"):
        build_model(ModelConfig(name=str(folder)), num_labels=2, seed=0)
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["conf.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    build_tokenizer(ModelConfig(name=str(folder)))  # tokenizer.json does without that code


def test_a_quantised_checkpoint_names_the_method(checkpoint, monkeypatch):
    folder = checkpoint("llama")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    for shapes_only in (False, True):
        with pytest.raises(ValueError, match=r"llama': its files are quantised by gptq"):
            build_model(
                ModelConfig(name=str(folder)), num_labels=2, seed=0, shapes_only=shapes_only
            )


def test_a_folder_without_tokenizer_files_is_refused(checkpoint):
    folder = checkpoint("bert")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="tokenizer"):
        build_tokenizer(ModelConfig(name=str(folder)))


def test_padding_on_the_left_and_weights_in_bfloat16_change_nothing(checkpoint):
    folder = checkpoint("llama-tied")
    CHECKPOINTS["llama-tied"][0].from_pretrained(folder).bfloat16().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    named = ModelConfig(name=str(folder))
    rows = Texts.of(["oil price", "bank rate price oil"], [0, 1], ["a", "b"])
    model = add_lora(build_model(named, num_labels=3, seed=0), LoraConfig(), rank=2, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokens = tokenize(rows, build_tokenizer(named), 8)
    together = per_sample_losses(TASK, model, tokens, batch_size=2)
    alone = [per_sample_losses(TASK, model, tokens.take([i]), batch_size=1)[0] for i in range(2)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize(
    "own",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression", "num_labels": 1},
        {"id2label": {str(i): f"L{i}" for i in range(7)}},
    ],
)
def test_another_task_in_the_folders_config_does_not_count(checkpoint, own):
    folder = checkpoint("bert")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | own))
    model = build_model(ModelConfig(name=str(folder), head="stock"), num_labels=3, seed=0)
    found = model(**inputs(), labels=torch.tensor([0, 2]))
    assert found.logits.shape == (2, 3)
    expected = torch.nn.functional.cross_entropy(found.logits, torch.tensor([0, 2]))
    torch.testing.assert_close(found.loss, expected)
