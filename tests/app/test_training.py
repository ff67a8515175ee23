from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score, log_loss

from fedlora_app import training
from fedlora_app.config import keys as run_config
from fedlora_app.config.keys import DataConfig, LoraConfig, ModelConfig
from fedlora_app.evaluation import evaluate, per_sample_losses
from fedlora_app.models.loading import MeanPoolClassifier, build_model, build_tokenizer
from fedlora_app.models.lora import add_lora
from fedlora_app.training import train, train_rounds
from strategies.messages import MODEL_ROUND_KEY, ROUND_KEY
from strategies.surroundings import torch_threads
from tests.app.texts import TASK, Tokens, load_train, tokenize

LABELS = 3
TrainConfig = partial(run_config.TrainConfig, precision="float32")  # what "auto" may become


def tiny(seed=0, dropout=0.1, labels=LABELS):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = MeanPoolClassifier(transformers.AutoModel.from_config(config), labels)
    return add_lora(model, LoraConfig(), rank=4, seed=seed)


@pytest.fixture(scope="module")
def rows():
    """Texts of random tokens whose label can be read off the first of them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 21, size=60)
    ids = rng.integers(10, 50, size=(60, 20))
    ids[:, 0] = rng.integers(1, 1 + LABELS, size=60)
    ids[np.arange(20) >= lengths[:, None]] = 0
    return Tokens(torch.tensor(ids, dtype=torch.int32), lengths, ids[:, 0] - 1)


def weights(model, trained=True):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad == trained
    }


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=["torch's dropout", "our dropout"])
def dropout_of(request, monkeypatch):
    """Small models draw as torch does, large ones as ``QuickDropout``: have it decided here."""
    monkeypatch.setattr(training, "LARGE", 0 if request.param == "our dropout" else math.inf)


@pytest.mark.usefixtures("dropout_of")
def test_same_seed_same_weights_whatever_ran_before(rows):
    config = TrainConfig(steps=3, batch_size=8)
    results = []
    for seed, before in ((5, 1), (5, 2), (6, 1)):
        model = tiny()
        torch.manual_seed(before)
        expected_next = torch.rand(3, generator=torch.Generator().manual_seed(before))
        result = train(model, rows, config, seed=seed)
        assert torch.equal(torch.rand(3), expected_next)  # the caller's stream is untouched
        results.append((result.loss, weights(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    assert not same(results[0][1], results[2][1])


@pytest.mark.usefixtures("dropout_of")
def test_the_seed_decides_the_dropout_too(rows):
    one_row = rows.take([0])  # no order to shuffle
    config = TrainConfig(steps=1, batch_size=1)
    first = train(tiny(dropout=0.5), one_row, config, seed=1)
    assert first.loss == train(tiny(dropout=0.5), one_row, config, seed=1).loss
    assert first.loss != train(tiny(dropout=0.5), one_row, config, seed=2).loss


def test_only_trainable_weights_move_and_modes_and_threads_return(rows):
    model = tiny().eval()
    frozen, trained = weights(model, trained=False), weights(model)
    threads = torch.get_num_threads()
    train(model, rows, TrainConfig(steps=2, threads=threads + 1), seed=0)
    assert same(frozen, weights(model, trained=False))
    assert not any(torch.equal(trained[name], now) for name, now in weights(model).items())
    assert not model.training
    assert torch.get_num_threads() == threads
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_group_has_its_learning_rate(rows):
    # The first step of AdamW moves a weight by its learning rate, whatever the gradient.
    model = tiny()
    before = weights(model)
    config = TrainConfig(steps=1, learning_rate=1e-3, head_learning_rate=1e-2)
    train(model, rows, config, seed=0)
    for name, now in weights(model).items():
        largest = float((now - before[name]).abs().max())
        if "lora_A" in name:
            assert largest == 0  # B is zero: no gradient yet
        else:
            assert largest == pytest.approx(1e-3 if "lora_B" in name else 1e-2, rel=0.01)


class Constant(torch.nn.Module):
    """Of a bias with the same gradient at each step, AdamW moves by the sum of the rates."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask, labels):
        logits = torch.zeros(len(input_ids), 2) + torch.stack([self.bias * 0, -self.bias])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def sum_of_rates(rows, **settings):
    """Return what the rates of a training sum up to, in units of the first."""
    model, rounds = Constant(), settings.pop("rounds", 1)
    same_rows = replace(rows, labels=np.zeros(len(rows), dtype=np.int64))
    config = TrainConfig(head_learning_rate=1e-4, max_grad_norm=0, **settings)
    message = {MODEL_ROUND_KEY: 1, ROUND_KEY: 1}
    train_rounds(model, same_rows, config, message, seed=0, rounds=rounds)
    return model.bias.item() / 1e-4


@pytest.mark.parametrize(
    ("schedule", "total"),
    [("constant", 4.0), ("linear", 1 + 3 / 4 + 2 / 4 + 1 / 4), ("cosine", 1 + 0.5 * 3)],
)
def test_schedule(rows, schedule, total):
    assert sum_of_rates(rows, steps=4, schedule=schedule) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "rounds", "schedule", "total"),
    [
        (2, 3, "constant", 2 * (1 + 0.5 + 0.25)),
        (3, 2, "linear", (1 + 2 / 3 + 1 / 3) * 1.5),
        (4, 1, "constant", 4),
    ],
)
def test_rounds_in_one_go_decay_as_rounds_do(rows, steps, rounds, schedule, total):
    found = sum_of_rates(rows, steps=steps, rounds=rounds, schedule=schedule, round_decay=0.5)
    assert found == pytest.approx(total, rel=1e-3)


def test_steps_and_epochs(rows):
    assert train(tiny(), rows, TrainConfig(steps=2), seed=0).steps == 2
    config = TrainConfig(steps=0, epochs=1.5, batch_size=16)
    result = train(tiny(), rows, config, seed=0)
    assert result.steps == math.ceil(90 / 16)
    assert result.num_examples == 60
    assert result.seconds > 0


def test_clipping_bounds_the_gradient(rows):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads if g is not None]).norm()))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train(tiny(), rows, TrainConfig(steps=2, max_grad_norm=1e-3), seed=0)
        train(tiny(), rows, TrainConfig(steps=2, max_grad_norm=0), seed=0)
    assert norms[:2] == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert min(norms[2:]) > 2e-3


def test_training_learns(rows):
    model = tiny()
    before = evaluate(TASK, model, rows, batch_size=16)
    train(model, rows, TrainConfig(steps=60, learning_rate=0.02, head_learning_rate=0.02), seed=0)
    after = evaluate(TASK, model, rows, batch_size=16)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > before["accuracy"]


def test_divergence_is_returned_not_raised(rows):
    model = tiny()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.fill_(float("nan"))
    assert math.isnan(train(model, rows, TrainConfig(steps=1), seed=0).loss)
    assert math.isnan(evaluate(TASK, model, rows, batch_size=16)["loss"])


def test_nothing_to_train(rows):
    with pytest.raises(ValueError, match="none requires gradients"):
        train(tiny().requires_grad_(False), rows, TrainConfig(), seed=0)
    with pytest.raises(ValueError, match="expected rows to train on, got none"):
        train(tiny(), rows.take([]), TrainConfig(), seed=0)


def test_head_alone_can_be_trained(rows):
    model = tiny()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    train(model, rows, TrainConfig(steps=1), seed=0)


def test_evaluation_agrees_with_sklearn_row_by_row(rows):
    model = tiny()
    model.train()
    result = evaluate(TASK, model, rows, batch_size=7)
    assert model.training
    model.eval()
    probabilities = []
    for i in range(len(rows)):  # one row at a time, without padding
        ids = rows.input_ids[i : i + 1, : rows.sizes[i]].long()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        probabilities.append(logits.double().softmax(-1)[0].numpy())
    predicted = np.argmax(probabilities, axis=1)
    assert result["loss"] == pytest.approx(log_loss(rows.labels, probabilities), rel=1e-5)
    assert result["accuracy"] == accuracy_score(rows.labels, predicted)
    assert result["macro_f1"] == pytest.approx(
        f1_score(rows.labels, predicted, average="macro", zero_division=0)
    )
    losses = per_sample_losses(TASK, model, rows, batch_size=16)
    expected = -np.log(np.array(probabilities)[np.arange(60), rows.labels])
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_order_and_batch_size_do_not_matter(rows):
    model = tiny()
    order = np.random.default_rng(1).permutation(len(rows))
    losses = per_sample_losses(TASK, model, rows, batch_size=16)
    np.testing.assert_allclose(
        per_sample_losses(TASK, model, rows.take(order), batch_size=5), losses[order], rtol=1e-4
    )


def test_evaluation_refuses(rows):
    with pytest.raises(ValueError, match="expected labels 0 to 1, got 0 to 2"):
        evaluate(TASK, tiny(labels=2), rows, batch_size=4)
    with pytest.raises(ValueError, match="got none"):
        evaluate(TASK, tiny(), rows.take([]), batch_size=4)


def test_threads_return_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_real_model_learns_real_data_in_a_few_steps(precision):
    data = load_train(DataConfig()).take(range(0, 480, 2))
    rows = tokenize(data, build_tokenizer(ModelConfig()), 32)
    base = build_model(ModelConfig(), num_labels=8, seed=0, precision=precision)
    model = add_lora(base, LoraConfig(), rank=4, seed=0)
    held_out, used = rows.take(range(64)), rows.take(range(64, 240))
    with torch_threads(1):
        before = evaluate(TASK, model, held_out, batch_size=32, precision=precision)
        train(model, used, TrainConfig(steps=20, precision=precision), seed=0)
        after = evaluate(TASK, model, held_out, batch_size=32, precision=precision)
    assert after["loss"] < 0.6 * before["loss"]
    majority = np.bincount(held_out.labels).max() / len(held_out)
    assert after["accuracy"] > majority + 0.15
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
