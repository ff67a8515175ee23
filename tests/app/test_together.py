from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from fedlora_app import training
from fedlora_app.config import keys as run_config
from fedlora_app.config.keys import LoraConfig
from fedlora_app.models.loading import MeanPoolClassifier
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks.causal_lm import CausalLM
from fedlora_app.tasks.sequences import IGNORED, Sequences
from fedlora_app.together import Job, train_together
from fedlora_app.training import train
from strategies.client import adapter_state, load_adapter
from strategies.lora import Adapter
from tests.app.texts import TASK, Tokens

LABELS = 3
TrainConfig = partial(run_config.TrainConfig, precision="float32")  # what "auto" may become
SIZE = dict(vocab_size=50, hidden_size=32, intermediate_size=40)  # noqa: C408


def bert(dropout=0.0, lora_dropout=0.0, **lora):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = MeanPoolClassifier(transformers.AutoModel.from_config(config), LABELS)
    return add_lora(model, LoraConfig(dropout=lora_dropout, **lora), rank=3, seed=0)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZE, num_hidden_layers=2, num_attention_heads=2, num_labels=LABELS, pad_token_id=0
    )
    model = transformers.LlamaForSequenceClassification(config)
    return add_lora(model, LoraConfig(), rank=3, seed=0)


def rows(count, longest, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, size=count)
    ids = rng.integers(10, 50, size=(count, lengths.max()))
    ids[:, 0] = rng.integers(1, 1 + LABELS, size=count)
    ids[np.arange(ids.shape[1]) >= lengths[:, None]] = 0
    return Tokens(torch.tensor(ids, dtype=torch.int32), lengths, ids[:, 0] - 1)


def jobs(model, config):
    """Clients of other ranks, rows, lengths, steps, rates and clipping."""
    state = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    start = Adapter.from_state_dict(state, 2.0)
    generator = torch.Generator().manual_seed(1)
    made = []
    for seed, rank in enumerate((2, 4, 8, 4)):
        adapter = start.with_rank(rank).to_state_dict()
        moved = {
            key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in adapter.items()
        }
        own = replace(
            config,
            steps=3 + seed if config.steps else 0,
            learning_rate=1e-2 / (1 + seed),
            head_learning_rate=3e-3 * (1 + seed),
            max_grad_norm=(0.05, 1.0, 0.0, 0.3)[seed],
            schedule=("constant", "linear", "cosine", "constant")[seed],
        )
        client_rows = rows(5 + 4 * seed, (6, 20, 11, 30)[seed], seed)
        made.append(Job(Adapter.from_state_dict(moved, 2.0), client_rows, own, seed))
    return made


def one_after_the_other(model, jobs):
    for job in jobs:
        load_adapter(model, job.adapter)
        result = train(model, job.inputs, job.config, seed=job.seed)
        state = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
        yield result, Adapter.from_state_dict(state, 2.0)


def compare(model, made, rtol=1e-4, task=TASK):
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    found = train_together(task, model, made)
    assert all(torch.equal(p.cpu(), before[name]) for name, p in model.named_parameters())
    for job, (ours, adapter), (alone, expected) in zip(
        made, found, one_after_the_other(model, made), strict=True
    ):
        assert (ours.steps, ours.num_examples) == (alone.steps, alone.num_examples)
        assert ours.loss == pytest.approx(alone.loss, rel=rtol)
        assert adapter.ranks == expected.ranks == job.adapter.ranks
        started, state = job.adapter.to_state_dict(), adapter.to_state_dict()
        for key, tensor in expected.to_state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=rtol, atol=1e-5)
            moved = (tensor.cpu() - started[key].cpu()).abs().max()
            assert moved > 1e-3 or key.endswith("A.weight")  # else the test says nothing


@pytest.mark.parametrize("make", [bert, llama])
def test_together_is_one_after_the_other(make):
    model = make()
    compare(model, jobs(model, TrainConfig(steps=3, batch_size=4)))


class Words(CausalLM):
    """The next token, with a padding token and no tokenizer."""

    def fill(self):
        return {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def test_language_models_count_trained_tokens():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, num_hidden_layers=2, num_attention_heads=2)
    model = add_lora(transformers.LlamaForCausalLM(config), LoraConfig(), rank=3, seed=0)

    def sequences(seed):
        rng = np.random.default_rng(seed)
        ids = [rng.integers(1, 50, size=n).astype(np.int32) for n in rng.integers(4, 20, size=9)]
        trained = [np.arange(len(row)) >= rng.integers(1, len(row)) for row in ids]
        labels = [np.where(t, row, IGNORED) for t, row in zip(trained, ids, strict=True)]
        return Sequences(ids, labels, 0)

    made = jobs(model, TrainConfig(steps=3, batch_size=4))
    made = [replace(job, inputs=sequences(n)) for n, job in enumerate(made)]
    compare(model, made, task=Words(run_config.RunConfig()))


class Pictures:
    """Rows of one shape, with no axis to fill up."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(count, 1, 8, 8, generator=generator)
        self.labels = torch.randint(LABELS, (count,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def batch(self, chosen):
        return {"pixel_values": self.pixels[chosen], "labels": self.labels[chosen]}


def test_pictures_too(monkeypatch):
    monkeypatch.setattr(training, "LARGE", 0)
    monkeypatch.setattr(type(TASK), "fill", lambda self: {})
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=LABELS,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.1,
    )
    model = add_lora(transformers.ViTForImageClassification(config), LoraConfig(), rank=3, seed=0)
    made = jobs(model, TrainConfig(steps=3, batch_size=4))
    compare(model, [replace(job, inputs=Pictures(5 + n, n)) for n, job in enumerate(made)])


def test_epochs_with_short_last_batches():
    model = bert()
    compare(model, jobs(model, TrainConfig(steps=0, epochs=1.5, batch_size=4)))


def test_other_batch_sizes():
    model = bert()
    made = jobs(model, TrainConfig(steps=3))
    sizes = (1, 7, 3, 5)
    made = [
        replace(job, config=replace(job.config, batch_size=n))
        for job, n in zip(made, sizes, strict=True)
    ]
    compare(model, made)


@pytest.mark.parametrize("eager", [False, True])
def test_each_draws_its_own_dropout(monkeypatch, eager):
    monkeypatch.setattr(training, "LARGE", 0)  # so that alone, too, dropout is ours
    model = bert(dropout=0.3, lora_dropout=0.2)
    if eager:
        model.base_model.model.encoder.set_attn_implementation("eager")
    compare(model, jobs(model, TrainConfig(steps=3, batch_size=4)))


def test_a_frozen_factor_stays():
    model = bert()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    made = jobs(model, TrainConfig(steps=3, batch_size=4))
    compare(model, made)
    for job, (_, adapter) in zip(made, train_together(TASK, model, made), strict=True):
        for name, pair in adapter.pairs.items():
            assert torch.equal(pair.A, job.adapter.pairs[name].A)


def test_bfloat16():
    """As near to float32 as one after the other is: roundings add up differently."""
    model = bert()
    made = jobs(model, TrainConfig(steps=3, batch_size=4, precision="bfloat16"))
    for (ours, _), (alone, _) in zip(
        train_together(TASK, model, made), one_after_the_other(model, made), strict=True
    ):
        assert ours.loss == pytest.approx(alone.loss, rel=0.02)


def test_one_that_diverges_leaves_the_others_alone():
    model = bert()
    made = jobs(model, TrainConfig(steps=3, batch_size=4))
    bad = {k: t * float("nan") for k, t in made[1].adapter.to_state_dict().items()}
    wrong = replace(made[1], adapter=Adapter.from_state_dict(bad, 2.0, check_finite=False))
    found = train_together(TASK, model, [made[0], wrong, *made[2:]])
    expected = train_together(TASK, model, made)
    for number, ((ours, _), (other, _)) in enumerate(zip(found, expected, strict=True)):
        assert math.isnan(ours.loss) if number == 1 else ours.loss == other.loss


def test_what_cannot_be_trained_together():
    model = bert()
    made = jobs(model, TrainConfig(steps=3))
    with pytest.raises(ValueError, match="got none"):
        train_together(TASK, model, [])
    other = replace(made[1], config=replace(made[1].config, precision="bfloat16"))
    with pytest.raises(ValueError, match=r"train\.precision: expected one for all jobs"):
        train_together(TASK, model, [made[0], other])
    scaled = replace(made[1], adapter=made[1].adapter.with_scale(1.0))
    with pytest.raises(ValueError, match="job 1: expected LoRA scale 2 as in the model, got 1"):
        train_together(TASK, model, [made[0], scaled])
    with pytest.raises(ValueError, match="job 0: its adapter and what this model trains differ"):
        train_together(TASK, model, [replace(made[0], adapter=made[0].adapter.only_dense())])
    dora = bert(dora=True)
    with pytest.raises(ValueError, match="only linear layers can be trained together"):
        train_together(TASK, dora, jobs(dora, TrainConfig(steps=3)))


def test_pairs_together():
    model, made = bert(), []
    for job in jobs(model, TrainConfig(steps=3, batch_size=4)):
        tokens = job.inputs
        halves = torch.arange(tokens.input_ids.shape[1]) >= torch.tensor(tokens.sizes)[:, None] // 2
        made.append(replace(job, inputs=replace(tokens, types=halves.to(torch.int8))))
    assert "token_type_ids" in made[0].inputs.batch([0])
    compare(model, made)
