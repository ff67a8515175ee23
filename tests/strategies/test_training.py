"""The plain loop, held against loops written out with torch's own optimisers and schedules."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from strategies.dropout import QuickDropout
from strategies.schedules import SCHEDULES, make_schedule
from strategies.training import train_loop


class Net(nn.Module):
    """Rows of eight numbers, four classes; ``lora_A`` and ``head`` are trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(8, 16).requires_grad_(False)
        self.lora_A = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x, labels):
        logits = self.head(torch.tanh(self.lora_A(self.frozen(x))))
        return Output(nn.functional.cross_entropy(logits, labels))


class Output:
    def __init__(self, loss):
        self.loss = loss


class Slope(nn.Module):
    """Its gradient is 1 at each step, so that SGD at a rate of 1 adds up the factors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return Output(-self.weight)


def batches(count=5, size=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 8, generator=generator)
    labels = torch.randint(4, (count * size,), generator=generator)
    return [
        {"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, count * size, size)
    ]


def same(model, other, **tolerance):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name, **tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_by_name_decay_clipping_and_schedule_as_written_by_hand(schedule):
    model, plain = Net(), Net()
    outcome = train_loop(
        model,
        batches(),
        steps=7,
        learning_rate={"lora_": 3e-2, "": 5e-3},
        weight_decay=0.1,
        schedule=schedule,
        max_grad_norm=0.5,
    )
    groups = [
        {"params": list(plain.lora_A.parameters()), "lr": 3e-2},
        {"params": list(plain.head.parameters()), "lr": 5e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    planner = {
        "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
        "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=7),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7),
    }[schedule](optimizer)
    losses = []
    for batch in (batches() * 2)[:7]:
        optimizer.zero_grad()
        loss = plain(**batch).loss
        loss.backward()
        trained = [p for p in plain.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        planner.step()
        losses.append(loss.item())
    same(model, plain, rtol=1e-5, atol=1e-7)
    assert outcome.loss == pytest.approx(sum(losses) / 7, rel=1e-6)


def test_a_mapping_of_rates_goes_to_an_optimiser_of_ones_own():
    seen = []

    def made(groups):
        seen.extend(groups)
        return torch.optim.SGD(groups)

    model, plain = Net(), Net()
    train_loop(model, batches(1), optimizer=made, learning_rate={"head": 0.5, "": 0.0})
    plain(**batches(1)[0]).loss.backward()
    moved = plain.head.weight - 0.5 * plain.head.weight.grad
    torch.testing.assert_close(model.head.weight, moved)
    assert torch.equal(model.lora_A.weight, plain.lora_A.weight)
    assert [group["lr"] for group in seen] == [0.5, 0.0]
    train_loop(Net(), batches(1), optimizer=lambda p: torch.optim.SGD(p, 0.1))  # a list of them


def test_accumulated_batches_are_one_large_batch():
    model, large = Net(), Net()
    train_loop(model, batches(4, 3), steps=6, accumulation=4, schedule="linear")
    train_loop(large, batches(1, 12), steps=6, schedule="linear")
    same(model, large, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("epochs", "accumulation", "steps"),
    [(None, 1, 10), (1, 1, 10), (1.5, 1, 15), (0.25, 1, 3), (1.1, 1, 11), (2, 3, 8), (0.01, 4, 1)],
)
def test_fractional_epochs_are_rounded_up_to_whole_steps(epochs, accumulation, steps):
    outcome = train_loop(Net(), batches(10, 2), epochs=epochs, accumulation=accumulation)
    assert outcome.steps == steps
    assert outcome.num_examples == (20 if steps * accumulation >= 10 else 2 * steps * accumulation)
    per_pass = math.ceil(10 / accumulation)
    assert steps == math.ceil(round((epochs or 1) * per_pass, 6))


def sum_of_factors(steps, schedule):
    model = Slope()
    train_loop(
        model,
        [{"x": torch.zeros(1)}],
        steps=steps,
        schedule=schedule,
        max_grad_norm=0,
        optimizer=lambda p: torch.optim.SGD(p, 1.0),
    )
    return model.weight.item()


def test_a_schedule_of_ones_own():
    asked = []

    def halved(step, steps):
        asked.append((step, steps))
        return 0.5**step

    assert sum_of_factors(3, halved) == pytest.approx(1.75)
    assert asked == [(0, 3), (1, 3), (2, 3)]


def test_an_optimiser_keeps_a_schedule_of_its_own():
    class Falling(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["lr"] /= 2

    model = Slope()
    batch = {"x": torch.zeros(1)}
    train_loop(model, [batch], steps=3, optimizer=lambda p: Falling(p, 1.0), max_grad_norm=0)
    assert model.weight.item() == pytest.approx(1.75)


def test_threads_and_mode_come_back_even_after_an_error():
    threads, model, seen = torch.get_num_threads(), Net().eval(), []

    def noted(model, batch):
        seen.append((torch.get_num_threads(), model.training))
        raise KeyError

    with pytest.raises(KeyError):
        train_loop(model, batches(), threads=threads + 1, loss_fn=noted)
    assert seen == [(threads + 1, True)]
    assert (torch.get_num_threads(), model.training) == (threads, False)


def llama(dropout=0.0):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=2, attention_dropout=dropout)
    )  # fmt: skip


def tokens():
    ids = torch.randint(23, (4, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def bert():
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                   num_attention_heads=2, num_labels=3)
    )  # fmt: skip
    return nn.ModuleDict({"inner": model})  # not outermost: as inside an app's own class


def of_bert(model, batch):
    ids = batch["input_ids"]
    return model["inner"](input_ids=ids, labels=ids[:, 0] % 3).loss


@pytest.mark.parametrize(("make", "loss_fn"), [(llama, None), (bert, of_bert)])
def test_checkpointing_changes_memory_alone(make, loss_fn, recwarn):
    once, again = make(), make()
    calls = {"once": 0, "again": 0}
    for name, model in (("once", once), ("again", again)):
        layer = next(m for n, m in model.named_modules() if n.endswith("0.mlp.act_fn")
                     or n.endswith("0.intermediate"))  # fmt: skip

        def count(*_, name=name):
            calls[name] += 1

        layer.register_forward_hook(count)
    options = {"steps": 2, "learning_rate": 1e-2, "loss_fn": loss_fn}
    first = train_loop(once, tokens(), **options)
    second = train_loop(again, tokens(), gradient_checkpointing=True, **options)
    assert first.loss == second.loss  # dropout, too, is drawn as before
    assert calls == {"once": 2, "again": 4}
    same(once, again, rtol=0, atol=0)
    third = train_loop(again, tokens(), **options)
    assert calls["again"] == 6  # and is off again
    assert math.isfinite(third.loss)
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


def test_checkpointing_is_left_on_and_the_cache_as_it_was():
    model = llama()
    model.config.use_cache = True
    train_loop(model, tokens(), gradient_checkpointing=True)
    assert model.config.use_cache
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    before = {n: vars(m).get("gradient_checkpointing") for n, m in model.named_modules()}
    train_loop(model, tokens(), gradient_checkpointing=True)
    after = {n: vars(m).get("gradient_checkpointing") for n, m in model.named_modules()}
    assert after == before


def test_quick_dropout_refuses_to_be_drawn_again():
    with QuickDropout(0), pytest.raises(ValueError, match="cannot draw the same numbers"):
        train_loop(bert(), tokens(), gradient_checkpointing=True, loss_fn=of_bert)


def test_what_the_loop_refuses():
    cases = {
        "expected steps or epochs, got both": {"steps": 2, "epochs": 1.0},
        "epochs: expected a number above 0": {"epochs": 0.0},
        "schedule: expected constant, linear, cosine or a function": {"schedule": "step"},
        "a rate for 'head.weight', whose name holds none of 'lora_'": {
            "learning_rate": {"lora_": 1.0}
        },
        "weight_decay is AdamW's": {"weight_decay": 0.1, "optimizer": torch.optim.SGD},
        "Net holds no transformers model that can": {"gradient_checkpointing": True},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            train_loop(Net(), batches(), **options)
    for options in ({"epochs": 1.5}, {"schedule": "linear"}):
        with pytest.raises(ValueError, match="batches with a length"):
            train_loop(Net(), iter(batches()), **options)
    assert make_schedule("linear")(1, 4) == 0.75
    assert train_loop(Net(), iter(batches())).steps == 5  # a stream, once
