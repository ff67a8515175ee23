"""Pairs of answers: formats, DPO's loss by hand, what is switched off, and a run."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM

from fedlora_app.config.keys import TrainConfig
from fedlora_app.config.read import read_config
from fedlora_app.evaluation import evaluate
from fedlora_app.launch.door import check_model
from fedlora_app.launch.inspection import Report, inspect
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import make_task
from fedlora_app.tasks.preference import without_adapter
from fedlora_app.together import Job, train_together
from fedlora_app.training import train
from strategies.client import adapter_state
from strategies.lora import Adapter
from tests.app.test_language import config, folder, written  # noqa: F401
from tests.app.test_language_runs import ran
from tests.integration.conftest import records

BETA = 0.3
USER, GOOD, BAD = (
    {"role": "user", "content": "what is two"},
    {"role": "assistant", "content": "is four"},
    {"role": "assistant", "content": "six six again"},
)
SYSTEM = {"role": "system", "content": "be kind"}
ROW = {"prompt": "what is two", "chosen": "is four", "rejected": "six six again"}
FORMATS = {
    "texts": ROW,
    "messages after a text": {"prompt": "what is two", "chosen": [GOOD], "rejected": [BAD]},
    "prompt within": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt twice": {**ROW, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "texts after messages": {**ROW, "prompt": [USER]},
}


def made(folder, path, **flat):  # noqa: F811
    return make_task(config(folder, path, task="preference", **{"train.beta": BETA, **flat}))


def some_rows(n=40):
    return [
        {"prompt": ["what is", "say it again", "two"][i % 3], "chosen": ["four", "is four"][i % 2],
         "rejected": "six three " + "again " * (i % 4), "user": "ab"[i % 2]}
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(folder, tmp_path, name):  # noqa: F811
    task = made(folder, written(tmp_path, [FORMATS[name]] * 12))
    rows = task.train_rows()
    chosen, rejected = rows.items[0]
    assert chosen == (("user", "what is two"), ("assistant", "is four"))
    assert rejected == (("user", "what is two"), ("assistant", "six six again"))
    shown = "\n".join(task.show(rows))
    assert shown.index("⟦is four") < shown.index("rejected:") < shown.index("⟦six six")


def test_named_columns_and_what_is_left_out(folder, tmp_path):  # noqa: F811
    rows = [{"q": "two", "good": "four", "bad": "six"}] * 20
    rows += [{"q": "two", "good": " ", "bad": "six"}, {"q": "two", "good": "six", "bad": "six"}]
    path = written(tmp_path, rows)
    found = made(folder, path, **{"data.text-column": "q, good, bad"}).train_rows()
    assert found.origin.blank == 2
    assert found.items[0][1] == (("user", "two"), ("assistant", "six"))
    with pytest.raises(ValueError, match="expected columns chosen and rejected"):
        made(folder, path).train_rows()
    assert not made(folder, path).knows(made(folder, path).splits(str(path))["train"])
    with pytest.raises(ValueError, match="expected rows with two answers, got 3 without"):
        made(folder, written(tmp_path, [{**ROW, "chosen": ""}] * 3, "e.jsonl")).train_rows()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            "line 2: expected the same tur",
        ),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "line 2: expected a prompt before"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "line 2: expected turns of user and assistant"),
        ({"prompt": "two", "chosen": 4, "rejected": "six"}, "line 2: expected a text as content"),
    ],
)
def test_rows_that_are_no_pairs_are_named(folder, tmp_path, row, match):  # noqa: F811
    rows = [{"prompt": None, **FORMATS["prompt within"]}, row]
    with pytest.raises(ValueError, match=match):
        made(folder, written(tmp_path, rows)).train_rows()


def moved(task, seed=3):
    """Return a PEFT model whose adapter is not that of the start, and another of the base."""
    model = add_lora(task.model({}, seed=0), task.config.lora, rank=4, seed=0)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=g)
    return model, task.model({}, seed=0)


def log_probability(model, ids, labels):
    """Sum over trained tokens, one by one, in float64; without a batch or padding."""
    logits = model(input_ids=torch.tensor(ids)[None].long()).logits[0].double()
    return sum(logits[at - 1].log_softmax(-1)[labels[at]] for at in np.flatnonzero(labels != -100))


def test_the_loss_is_dpo_s_and_so_is_its_gradient(folder, tmp_path):  # noqa: F811
    task = made(folder, written(tmp_path, some_rows()))
    inputs = task.encode(task.train_rows().take(range(5)))
    model, base = moved(task)
    margins = []
    for one in range(5):
        gain = [
            log_probability(model, side.ids[one], side.labels[one])
            - log_probability(base, side.ids[one], side.labels[one]).detach()
            for side in (inputs.chosen, inputs.rejected)
        ]
        margins.append(BETA * (gain[0] - gain[1]))
    by_hand = torch.stack([torch.log1p(torch.exp(-m)) for m in margins])
    expected = torch.autograd.grad(
        by_hand.mean(), [p for p in model.parameters() if p.requires_grad]
    )
    batch = inputs.batch(range(5))
    out = model(**batch)
    assert task.losses(out.logits, batch).tolist() == pytest.approx(by_hand.tolist(), rel=1e-4)
    assert out.loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-5)
    out.loss.backward()
    for parameter, wanted in zip(
        (p for p in model.parameters() if p.requires_grad), expected, strict=True
    ):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)
    scores = evaluate(task, model, inputs, batch_size=2)
    assert scores["loss"] == pytest.approx(by_hand.mean().item(), rel=1e-5)
    assert scores["margin"] == pytest.approx(float(sum(margins)) / 5, rel=1e-4)
    assert scores["preferred"] == sum(float(m) > 0 for m in margins) / 5


def test_nothing_else_is_trained_after_the_adapter_was_off(folder, tmp_path):  # noqa: F811
    task = made(folder, written(tmp_path, some_rows()))
    model, base = moved(task)
    half = {n for n, p in model.named_parameters() if "lora_B" in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in half)  # as rules that train B alone have it
    ids = torch.tensor([[3, 6, 7, 8]])
    before = model(input_ids=ids).logits
    with without_adapter(model):
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == half


def test_at_the_start_nothing_is_told_apart_and_then_it_is(folder, tmp_path):  # noqa: F811
    task = made(folder, written(tmp_path, some_rows()))
    inputs = task.encode(task.train_rows())
    model = add_lora(task.model({}, seed=0), task.config.lora, rank=4, seed=0)
    before = evaluate(task, model, inputs, batch_size=16)
    assert before == {"loss": pytest.approx(np.log(2)), "preferred": 0.5, "margin": 0.0}
    settings = TrainConfig(steps=30, learning_rate=0.05, precision="float32", accumulate=2)
    train(model, inputs, settings, {}, seed=0)
    after = evaluate(task, model, inputs, batch_size=16)
    assert after["loss"] < 0.5
    assert after["preferred"] == 1
    assert task.quality(before) == 0.5


def test_a_run_ends_with_an_adapter_of_the_language_model(folder, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    more = {"output": str(output), "rounds": 2, "train.steps": 6, "ranks.list": "2,4",
            "train.learning-rate": 0.05, "sampling.fraction": 1.0, "task": "preference",
            "evaluate.generate": 2, "evaluate.generate-tokens": 4,
            "checkpoint-every": 0}  # fmt: skip
    flat = config(folder, written(tmp_path, some_rows(60)), **more).to_flat()
    ran(flat)
    assert [r["status"] for r in records(output, "client")] == ["ok"] * 6
    first, *_, last = records(output, "round")
    assert first["server_loss"] == pytest.approx(np.log(2))
    assert first["server_preferred"] == 0.5
    assert last["server_loss"] < 0.6
    assert records(output, "samples")[0]["samples"][0]["wanted"] in ("four", "is four")
    summary = json.loads((output / "summary.json").read_text())
    # The adapter opens as one of the language model, and tells the same pairs apart.
    task = read_config(flat).task
    pairs = task.encode(task.test_rows())
    opened = AutoPeftModelForCausalLM.from_pretrained(output / "adapter")
    base = task.model({}, seed=0)
    margins = [
        float(
            sum(
                sign * (log_probability(opened, side.ids[i], side.labels[i])
                        - log_probability(base, side.ids[i], side.labels[i]))
                for sign, side in ((1, pairs.chosen), (-1, pairs.rejected))
            )
        )
        for i in range(len(pairs))
    ]  # fmt: skip
    assert summary["margin"] == pytest.approx(task.config.train.beta * np.mean(margins), rel=1e-3)


def test_the_door(folder, tmp_path):  # noqa: F811
    path = written(tmp_path, some_rows())

    def checked(**flat):
        told = config(folder, path, task="preference", **flat)
        parts = read_config(told.to_flat())
        rows = parts.task.train_rows()
        return check_model(parts, Report(parts.task, rows, rows))

    assert "none new" in checked()
    with pytest.raises(ValueError, match="pairs of answers are not packed"):
        checked(**{"data.packing": True})
    for rule in ("flora", "fedex"):
        with pytest.raises(ValueError, match="merges into the frozen weights, and task = 'prefer"):
            checked(aggregation=rule)
    task = made(folder, path, **{"data.partition": "natural", "data.partition-column": "user"})
    assert "2 clients with" in str(inspect(task, clients=2))


def test_pairs_are_not_trained_together_for_rows_would_be_mixed_up(folder, tmp_path):  # noqa: F811
    task = made(folder, written(tmp_path, some_rows()))
    model, _ = moved(task)
    inputs, settings = task.encode(task.train_rows()), TrainConfig(steps=1, precision="float32")
    state = {name: p.detach() for name, p in adapter_state(model).items()}
    job = Job(Adapter.from_state_dict(state, 2.0), inputs, settings, 0)
    with pytest.raises(ValueError, match="'input_ids' has 32 for 16; train these clients one"):
        train_together(task, model, [job])
