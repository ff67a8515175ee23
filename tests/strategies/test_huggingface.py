"""Trainer and plain loop, held against a step written out in plain torch."""

import random
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from strategies import FedLoRA
from strategies.client import PROFILED_KEY, adapter_state, apply_adapter, make_reply, receive
from strategies.huggingface import (
    FedLoRACallback,
    dataset_losses_and_labels,
    train_with_trainer,
)
from strategies.messages import CLIENT_KEY, ROUND_KEY, SCALE_KEY, TRAIN_KEY, to_record
from strategies.profiling import PROFILE_KEY, SAMPLES_KEY, profile_metrics
from strategies.ranks import ListRank
from strategies.ranks.pruning import GAMMA_KEY, PENALTY_KEY
from strategies.training import losses_and_labels, train_loop
from tests.fakes import FakeGrid

LR = 0.5
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": LR, "max_grad_norm": 0.0,
       "use_cpu": True}  # fmt: skip


def causal(rank=4, dropout=0.0):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1)
    )  # fmt: skip
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(base, config)


def classifier():
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                   num_attention_heads=2, num_labels=3)
    )  # fmt: skip
    return peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    )


def texts(count=8, seed=1):
    """Rows of one length whose answers differ in length, so that batches weigh differently."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = torch.from_numpy(rng.integers(0, 23, 9))
        labels = ids.clone()
        labels[: i % 8] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batches(rows, size=2):
    return [stacked(rows[i : i + size]) for i in range(0, len(rows), size)]


def values(model):
    return {key: tensor.clone() for key, tensor in adapter_state(model).items()}


def plain_step(model, rows, penalty=lambda model: 0.0):
    """One step of gradient descent on all rows at once."""
    batch = stacked(rows)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    (loss + penalty(model)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= LR * parameter.grad
    return values(model), loss.item()


def by_trainer(model, rows, config=None, **options):
    args = {**SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **options}
    return train_with_trainer(model, rows, config, args=args)


def by_loop(model, rows, config=None, bf16=False, **options):
    precision = "bfloat16" if bf16 else "float32"
    return train_loop(
        model,
        torch.utils.data.DataLoader(rows, 2, shuffle=True),
        config,
        optimizer=lambda parameters: torch.optim.SGD(parameters, LR),
        accumulation=4,
        max_grad_norm=0,
        precision=precision,
        steps=options.get("max_steps"),
    )


both = pytest.mark.parametrize("train", [by_trainer, by_loop])


@both
def test_four_batches_of_two_are_one_of_eight(train):
    model, rows = causal(), texts()
    expected, loss = plain_step(causal(), rows)
    outcome = train(model, rows, max_steps=1)
    for key, value in values(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    assert outcome.loss == pytest.approx(loss, rel=1e-4)
    assert (outcome.steps, outcome.num_examples) == (1, 8)
    assert 0 < outcome.seconds < 60
    assert outcome.metrics() == {"loss": outcome.loss, "seconds": outcome.seconds, "steps": 1}


@both
def test_the_penalty_of_a_message_is_part_of_the_step(train):
    def tail(model):
        A = {k: p for k, p in model.named_parameters() if "lora_A" in k}
        B = {k: p for k, p in model.named_parameters() if "lora_B" in k}
        return 0.3 * sum(
            A[k][3:].norm() * B[k.replace("lora_A", "lora_B")][:, 3:].norm() for k in A
        )

    model, rows = causal(), texts()
    expected, loss = plain_step(causal(), rows, tail)
    outcome = train(model, rows, {PENALTY_KEY: 0.3, GAMMA_KEY: 0.75}, max_steps=1)
    for key, value in values(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    assert outcome.loss == pytest.approx(loss, rel=1e-4)  # the penalty is left out


@both
def test_the_proximal_term_is_part_of_the_steps_and_not_of_the_loss(train):
    mu, rows, plain = 0.7, texts(), causal()
    start = [p.detach().clone() for p in plain.parameters() if p.requires_grad]

    def near(model):
        trained = (p for p in model.parameters() if p.requires_grad)
        return mu / 2 * sum((p - p0).square().sum() for p, p0 in zip(trained, start, strict=True))

    losses = []
    for _ in range(3):  # in the first step there is nothing to pull back
        expected, loss = plain_step(plain, rows, near)
        plain.zero_grad()
        losses.append(loss)
    model = causal()
    outcome = train(model, rows, {"proximal-mu": mu}, max_steps=3)
    for key, value in values(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    assert outcome.loss == pytest.approx(np.mean(losses), rel=1e-4)
    with pytest.raises(ValueError, match="proximal-mu: expected a number of at least 0, got -1"):
        train(model, rows, {"proximal-mu": -1}, max_steps=1)


@both
def test_bfloat16_trains_and_leaves_nothing_for_the_next_client(train):
    rows, fresh, model = texts(), causal(), causal()
    start = values(model)
    exact = train(fresh, rows, max_steps=2)
    rough = train(model, rows, max_steps=2, bf16=True)
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss
    assert all(value.dtype == torch.float32 for value in values(model).values())
    assert any(not torch.equal(value, start[key]) for key, value in values(model).items())
    receive(model, start, {SCALE_KEY: 2.0})  # the next client, without mixed precision
    again = train(model, rows, max_steps=2)
    assert again.loss == exact.loss
    assert all(torch.equal(v, values(model)[k]) for k, v in values(fresh).items())


def test_float16_scales_its_loss_in_the_plain_loop():
    model, rows = causal(), texts()
    before = values(model)
    outcome = train_loop(model, batches(rows), steps=3, precision="float16")
    assert np.isfinite(outcome.loss)
    assert any(not torch.equal(value, before[key]) for key, value in values(model).items())


@both
@pytest.mark.parametrize("factors", ["A", "B"])
def test_a_factor_that_the_server_froze_stays(train, factors):
    model = causal()
    before = values(model)
    receive(model, before, {SCALE_KEY: 2.0, TRAIN_KEY: factors})
    train(model, texts(), max_steps=2)
    changed = {k for k, value in values(model).items() if not torch.equal(value, before[k])}
    assert changed == {key for key in before if f"lora_{factors}" in key}


def numpy_state():
    return np.random.get_state()[1]  # noqa: NPY002 (what a Trainer seeds)


@both
def test_seed_round_and_client_decide_all_of_it(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = texts(12)

    def run(**config):
        model = causal(dropout=0.3)
        torch.manual_seed(sum(config.values()) + 7)  # what ran before must not matter
        state = torch.get_rng_state(), random.getstate(), numpy_state().copy()
        train(model, rows, config, max_steps=2)
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1] == random.getstate()
        assert np.array_equal(state[2], numpy_state())
        return torch.cat([value.flatten() for value in values(model).values()])

    first = run(**{ROUND_KEY: 1, CLIENT_KEY: 0})
    assert torch.equal(first, run(**{ROUND_KEY: 1, CLIENT_KEY: 0}))
    assert not torch.equal(first, run(**{ROUND_KEY: 2, CLIENT_KEY: 0}))
    assert not torch.equal(first, run(**{ROUND_KEY: 1, CLIENT_KEY: 1}))
    assert not list(tmp_path.iterdir())


def test_the_trainer_gives_the_model_back_as_it_was(tmp_path, capsys):
    model, rows = causal().eval(), texts()
    model.config.use_cache = True
    full = TrainingArguments(str(tmp_path / "full"), max_steps=1, use_cpu=True, bf16=True)
    plain = TrainingArguments(str(tmp_path / "plain"), max_steps=1, use_cpu=True)
    for args in (full, plain, full):  # made beforehand, of different precision
        train_with_trainer(model, rows, args=args)
    assert not model.training
    assert model.config.use_cache
    assert "forward" not in vars(model)
    assert "_original_forward" not in vars(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert args.seed == 42  # the caller's arguments are not touched
    assert not list(tmp_path.iterdir())  # though TrainingArguments save by default
    train_with_trainer(model, rows, args=plain, save=True)
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["checkpoint-1"]
    capsys.readouterr()
    train_with_trainer(model, rows, args={"max_steps": 1, "use_cpu": True})
    assert capsys.readouterr() == ("", "")


def test_losses_of_samples_are_those_of_the_model_row_by_row():
    model, rows = causal(dropout=0.5), texts(7)
    losses, labels = losses_and_labels(model, batches(rows, 3))
    model.eval()
    for row, loss in zip(rows, losses, strict=True):
        assert loss == pytest.approx(model(**stacked([row])).loss.item(), rel=1e-5)
    assert sorted(labels) == sorted(t for row in rows for t in row["labels"][1:].tolist() if t >= 0)

    model, rng = classifier().eval(), np.random.default_rng(2)
    rows = [{"input_ids": torch.from_numpy(rng.integers(0, 23, 6)), "labels": torch.tensor(i % 3)}
            for i in range(5)]  # fmt: skip
    losses, labels = losses_and_labels(model, batches(rows))
    singly = [model(**stacked([row])).loss.item() for row in rows]
    assert losses == pytest.approx(singly, rel=1e-5)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="function of your own"):
        losses_and_labels(model, [{**batches(rows)[0], "labels": torch.rand(2)}])


def test_the_callback_profiles_the_received_adapter_and_disturbs_nothing():
    rows, state = texts(), RecordDict()
    expected = profile_metrics(*losses_and_labels(causal(), batches(rows)))
    asked, silent = causal(dropout=0.2), causal(dropout=0.2)
    by_trainer(silent, rows, max_steps=1)
    train_with_trainer(
        asked, rows, {PROFILE_KEY: True}, state=state,
        args={**SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
              "max_steps": 1},
    )  # fmt: skip
    found = dict(state.metric_records[PROFILED_KEY])
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(v, values(asked)[k]) for k, v in values(silent).items())
    few, _ = dataset_losses_and_labels(causal(), rows, stacked, limit=3)
    assert len(few) == 3
    again = FedLoRACallback({PROFILE_KEY: True, SAMPLES_KEY: 3}, RecordDict())
    with pytest.raises(RuntimeError, match="give this callback to a Trainer"):
        again.outcome()
    args = TrainingArguments(max_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True)
    Trainer(causal(), args, train_dataset=rows, callbacks=[again]).train()
    assert again.outcome().steps == 2
    assert PROFILED_KEY in again.state


def test_a_round_with_clients_of_different_rank_around_one_resident_model():
    resident, rows, seen = causal(rank=1), texts(), []

    def client(message):
        context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
        config = apply_adapter(resident, message, context)
        if message.metadata.message_type == "evaluate":
            return make_reply(resident, message, num_examples=2, loss=1.0).content
        done = by_trainer(resident, rows, config, max_steps=2)
        return make_reply(resident, message, num_examples=done.num_examples,
                          metrics=done.metrics(), context=context).content  # fmt: skip

    initial = values(causal(rank=4))
    strategy = FedLoRA(
        query=False, aggregation="ffa", ranks=ListRank([2, 4]), scale=2.0, listeners=[seen.append]
    )
    result = strategy.start(FakeGrid([1, 2], client), to_record(initial), num_rounds=2)
    assert isinstance(result.arrays, ArrayRecord)
    after = {key: torch.from_numpy(array.numpy().copy()) for key, array in result.arrays.items()}
    assert all(torch.equal(after[k], v) for k, v in initial.items() if "lora_A" in k)
    assert any(not torch.equal(after[k], v) for k, v in initial.items() if "lora_B" in k)
    done = [record for record in seen if record["kind"] == "client"]
    assert [record["rank"] for record in done] == [2, 4, 2, 4]
    assert all(record["status"] == "ok" and record["steps"] == 2 for record in done)
    assert all(record["seconds"] > 0 for record in done)


def test_the_plain_loop_makes_one_pass_or_as_many_steps_as_asked():
    rows = texts(10)
    assert train_loop(causal(), batches(rows), accumulation=2).steps == 3  # 2 + 2 + 1 batches
    outcome = train_loop(causal(), batches(rows), accumulation=2, steps=7)
    assert (outcome.steps, outcome.num_examples) == (7, 10)

    def halved(model, batch):
        return model(**batch).loss / 2

    own = train_loop(causal(), batches(rows), loss_fn=halved, learning_rate=0.0)
    full = train_loop(causal(), batches(rows), learning_rate=0.0)
    assert own.loss == pytest.approx(full.loss / 2, rel=1e-5)


def test_what_cannot_be_trained_is_said():
    frozen = causal().requires_grad_(False)
    for train in (by_trainer, by_loop):
        with pytest.raises(ValueError, match="none requires gradients"):
            train(frozen, texts())
    with pytest.raises(ValueError, match="expected rows to train on"):
        by_trainer(causal(), [])
    with pytest.raises(ValueError, match="expected batches to train on"):
        train_loop(causal(), [])
    with pytest.raises(ValueError, match="expected batches to train on"):
        train_loop(causal(), iter(batches(texts())), steps=9)
    with pytest.raises(ValueError, match="precision: expected float32"):
        train_loop(causal(), batches(texts()), precision="int8")
    with pytest.raises(ValueError, match="at least 1"):
        train_loop(causal(), batches(texts()), accumulation=0)
    with pytest.raises(ValueError, match="returned no loss"):
        train_loop(causal(), [{"input_ids": texts()[0]["input_ids"][None]}])


def test_the_library_alone_needs_no_transformers():
    code = (
        "import sys, strategies, strategies.client, strategies.training\n"
        "print({'transformers', 'accelerate', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
