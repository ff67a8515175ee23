"""Packed rows and batches of like length: less padding, the same loss."""

import numpy as np
import pytest
import torch
import transformers

from fedlora_app.config.keys import LoraConfig, TrainConfig
from fedlora_app.config.read import read_config
from fedlora_app.data.batches import training_batches
from fedlora_app.launch.door import check_model
from fedlora_app.launch.inspection import Report
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import Rows, make_task
from fedlora_app.tasks.packing import Packed, fit, packing_problem
from fedlora_app.tasks.sequences import IGNORED, Sequences
from fedlora_app.training import train
from strategies.client import adapter_state
from tests.app.test_language import WORDS, config, folder, written  # noqa: F401

VOCABULARY = 50
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "use_cache": False}  # fmt: skip


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def sliding():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=1, sliding_window=4
    )
    return transformers.MistralForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, use_cache=False,
        eos_token_id=0, bos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sequences(count=20, longest=24, seed=0):
    """Rows of different lengths, the second part of each trained; one has nothing to train."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, VOCABULARY, n, dtype=np.int32) for n in rng.integers(2, longest, count)]
    labels = [np.where(np.arange(len(row)) * 2 >= len(row), row, IGNORED) for row in ids]
    labels[3] = np.full_like(labels[3], IGNORED)
    return Sequences(ids, [row.astype(np.int32) for row in labels], 0)


@torch.no_grad()
def summed(model, batch):
    """Return the loss summed over trained tokens, computed from the logits."""
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2, sliding])
def test_the_loss_of_packed_rows_is_that_of_single_ones(make, attention):
    model = make().eval()
    model.set_attn_implementation(attention)
    rows = sequences()
    packed = Packed(rows, 32)
    batch = packed.batch(range(len(rows)))
    assert len(batch["input_ids"]) < len(rows) / 1.5
    assert int((batch["labels"][:, 1:] != IGNORED).sum()) == sum(
        int((row[1:] != IGNORED).sum()) for row in rows.labels
    )
    single = sum(float(summed(model, rows.batch([i]))) for i in range(len(rows)))
    assert float(summed(model, batch)) == pytest.approx(single, rel=1e-5)
    assert packing_problem(model) == ""


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_packed_step_is_the_step_of_the_same_rows(make):
    rows, found = sequences(), []
    for inputs in (rows, Packed(rows, 40)):
        model = add_lora(make(), LoraConfig(), rank=2, seed=0)
        config = TrainConfig(steps=3, batch_size=6, precision="float32", accumulate=2)
        done = train(model, inputs, config, seed=0)
        found.append((done, {k: v.clone() for k, v in adapter_state(model).items()}))
    (one, weights), (other, packed) = found
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert (other.steps, other.num_examples) == (3, len(rows))
    for key, value in weights.items():
        torch.testing.assert_close(packed[key], value, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        ("Bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 2},
         "in BloomForCausalLM packed rows would see each other"),
        ("Mamba", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2},
         "MambaForCausalLM carries a state"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_keep_rows_apart_is_named(kind, settings, match):
    config = getattr(transformers, f"{kind}Config")(**settings, pad_token_id=0)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    before = torch.get_rng_state()
    assert match in packing_problem(model)
    assert torch.equal(before, torch.get_rng_state())


def test_bins_hold_everything_once_and_not_too_much():
    rng = np.random.default_rng(1)
    for _ in range(50):
        sizes = rng.integers(1, 30, rng.integers(1, 40)).tolist()
        bins = fit(sizes, 24)
        assert sorted(i for one in bins for i in one) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in one) <= 24 or len(one) == 1 for one in bins)
        assert len(bins) <= 11 / 9 * (sum(min(s, 24) for s in sizes) / 12 + 1) + 1


def padding(rows, order):
    """Return the share of a batch's places that hold no token, over all batches."""
    batches = [rows.batch(chosen) for chosen in order]
    places = sum(batch["input_ids"].numel() for batch in batches)
    return 1 - sum(int(rows.sizes[chosen].sum()) for chosen in order) / places


def test_batches_of_like_length_hold_less_padding():
    rows = sequences(300, 200)
    sizes = rows.sizes

    def order(by_length, seed=0, total=700):
        rng = np.random.default_rng(seed)
        return list(training_batches(300, 8, total, rng, sizes if by_length else None))

    plain, grouped = order(False), order(True)
    assert [len(batch) for batch in grouped] == [len(batch) for batch in plain]
    seen = np.bincount(np.concatenate(grouped), minlength=300)
    assert set(seen.tolist()) <= {2, 3}  # every row once before any comes again, within a window
    assert padding(rows, grouped) < 0.2 * padding(rows, plain)
    assert np.array_equal(np.concatenate(grouped), np.concatenate(order(True)))
    assert not np.array_equal(np.concatenate(grouped), np.concatenate(order(True, seed=1)))
    means = [sizes[batch].mean() for batch in grouped[:37]]
    assert np.abs(np.diff(means)).mean() > 20  # the batches themselves in no order of length
    packed = Packed(rows, 256)
    filled = [packed.batch(chosen)["input_ids"].numel() for chosen in plain]
    assert 1 - sum(int(sizes[c].sum()) for c in plain) / sum(filled) < 0.5 * padding(rows, plain)


def test_parts_of_a_step_and_checkpoints_change_no_number():
    found = {}
    for accumulate, again in ((1, False), (4, False), (2, True)):
        model = add_lora(llama(), LoraConfig(), rank=2, seed=0)
        config = TrainConfig(
            steps=0, epochs=1.3, batch_size=6, precision="float32", accumulate=accumulate,
            gradient_checkpointing=again,
        )  # fmt: skip
        done = train(model, sequences(), config, seed=0)
        assert done.steps == 5
        found[accumulate] = done.loss, {k: v.clone() for k, v in adapter_state(model).items()}
    for loss, weights in found.values():
        assert loss == pytest.approx(found[1][0], rel=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(value, found[1][1][key], rtol=2e-3, atol=2e-5)


def test_the_config_says_whether_rows_are_packed(folder, tmp_path):  # noqa: F811
    rows = [{"prompt": "what is", "completion": " ".join(WORDS[: 1 + i % 5])} for i in range(30)]
    path = written(tmp_path, [*rows, {"prompt": "two", "completion": "four"}])
    for told in (False, True):
        parts = read_config(config(folder, path, **{"data.packing": told}).to_flat())
        found = parts.task.train_rows()
        inputs = parts.task.for_training(parts.task.encode(found))
        batch = inputs.batch(range(16))
        assert (len(batch["input_ids"]) < 8) == told
        assert ("position_ids" in batch) == told
        check_model(parts, Report(parts.task, found, found))
        model = parts.task.model({}, seed=0)
        assert not model.config.use_cache  # with a cache rows would see each other


def test_padding_is_on_the_right_whatever_the_tokenizer_says(folder, tmp_path):  # noqa: F811
    path = written(tmp_path, [{"text": "two and"}, {"text": "is four again be kind"}] * 6)
    task = make_task(config(folder, path))
    task.tokenizer.padding_side = task.tokenizer.truncation_side = "left"
    batch = task.encode(task.train_rows()).batch([0, 1])
    for mask in batch["attention_mask"]:
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)


def test_without_a_template_or_a_trained_token_it_is_said(folder, tmp_path, caplog):  # noqa: F811
    path = written(tmp_path, [{"prompt": "what", "completion": "six"}] * 12)
    task = make_task(config(folder, path))
    assert not any("no chat template" in line for line in task.show(task.train_rows()))
    task.tokenizer.chat_template = None
    shown = task.show(task.train_rows())
    assert any("no chat template" in line for line in shown)
    assert "⟦six</s>⟧" in "".join(shown).replace(" ", "")
    task = make_task(config(folder, written(tmp_path, [{"text": "two and"}] * 11, "t.jsonl")))
    task.tokenizer.eos_token = None
    empty = Rows([(("text", "two"),), (("text", "two and"),)], np.zeros(2, np.int64))
    with caplog.at_level("WARNING"):
        inputs = task.encode(empty)
    assert "1 of 2 rows have no token to train on" in caplog.text
    model = add_lora(task.model({}, seed=0), LoraConfig(), rank=2, seed=0)
    done = train(model, inputs, TrainConfig(steps=4, batch_size=1, precision="float32"), seed=0)
    assert done.steps == 2  # the two others had nothing to learn from
    assert np.isfinite(done.loss)
    settings = TrainConfig(steps=2, batch_size=1, precision="float32")
    with pytest.raises(ValueError, match="all labels of all"):
        train(model, inputs.take([0]), settings, seed=0)


def test_more_parts_than_rows_are_refused(folder, tmp_path):  # noqa: F811
    path = written(tmp_path, [{"prompt": "what", "completion": "six"}] * 12)
    flat = config(folder, path, **{"train.accumulate": 5, "train.batch-size": 4}).to_flat()
    with pytest.raises(ValueError, match=r"train.accumulate: 4 rows .* at most 4"):
        read_config(flat)
