"""Training at a scale of the rank's own, held against PEFT's rsLoRA."""

import math

import peft
import pytest
import torch
from torch import nn

from strategies.client import adapter_state, load_adapter, trained_at
from strategies.lora import Adapter
from strategies.training import train_loop

ALPHA, SHARED = 6.0, 2.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, ids, labels):
        out = self.linear(self.table(ids).mean(1))
        return type("Out", (), {"loss": nn.functional.cross_entropy(out, labels)})


def made(rank, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=["linear", "table"], **options)
    return peft.get_peft_model(Net(), config)


def rows():
    torch.manual_seed(1)
    return [{"ids": torch.randint(9, (8, 4)), "labels": torch.randint(5, (8,))} for _ in range(6)]


def deltas(model):
    base = model.base_model.model
    return {name: getattr(base, name).get_delta_weight("default").detach().clone()
            for name in ("linear", "table")}  # fmt: skip


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_it_trains_what_pefts_rslora_trains(rank):
    expected = made(rank, lora_alpha=ALPHA, use_rslora=True)
    train_loop(expected, rows(), learning_rate=0.02)
    model = made(rank, lora_alpha=SHARED * rank)
    with trained_at(model, lambda r: ALPHA / math.sqrt(r)):
        train_loop(model, rows(), learning_rate=0.02)
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta, deltas(expected)[name], rtol=1e-4, atol=1e-6)
        assert delta.abs().max() > 1e-3
    assert model.base_model.model.linear.scaling["default"] == SHARED


def test_the_model_computes_the_same_inside():
    model = made(2, lora_alpha=4, init_lora_weights=False)
    before, batch = deltas(model), rows()[0]
    loss = float(model(**batch).loss)
    with trained_at(model, lambda r: 0.3):
        assert float(model(**batch).loss) == pytest.approx(loss, rel=1e-6)
        assert model.base_model.model.linear.scaling["default"] == 0.3
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta, before[name])


def test_a_factor_that_is_not_trained_stays_to_the_bit():
    model = made(3, lora_alpha=6, init_lora_weights=False)
    state = {key: value.clone() for key, value in adapter_state(model).items()}
    load_adapter(model, Adapter.from_state_dict(state, SHARED))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            parameter.requires_grad_(False)
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    bad = [*rows(), {"ids": torch.zeros(2, 2), "labels": torch.zeros(2)}]
    with pytest.raises(RuntimeError), trained_at(model, lambda r: 0.7):
        train_loop(model, bad)  # whatever happens, the scale comes back
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    assert model.base_model.model.table.scaling["default"] == SHARED
