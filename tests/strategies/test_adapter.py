"""Adapter and LoraPair, held against PEFT itself."""

import peft
import pytest
import torch
from torch import nn

from strategies.client import adapter_state, check_mergeable, load_adapter
from strategies.lora import Adapter, AdapterError, LoraPair
from strategies.lora.algebra import frobenius, is_finite
from tests.fakes import random_adapter, same

PREFIX = "base_model.model."


class Model(nn.Module):
    """Every kind of layer PEFT puts LoRA on; ``attn`` is as wide as its rank."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 8, 3)
        self.pointwise = nn.Conv2d(8, 5, 1)
        self.conv1 = nn.Conv1d(3, 8, 3)
        self.fc = nn.Linear(6, 5)
        self.attn = nn.Linear(4, 4)
        self.head = nn.Linear(6, 2)


TARGETS = ["emb", "conv", "pointwise", "conv1", "fc", "attn"]
FLAVOURS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"fc": 2}, "alpha_pattern": {"conv": 3, "fc": 5}},
    "dora": {"use_dora": True, "target_modules": ["emb", "conv", "fc", "attn"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["conv", "fc", "attn"]},
}


def build(flavour="plain"):
    torch.manual_seed(0)
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "modules_to_save": ["head"],
        "init_lora_weights": False,
        **FLAVOURS[flavour],
    }
    config = peft.LoraConfig(**options)
    return peft.get_peft_model(Model(), config), config


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_round_trip_of_every_flavour(flavour):
    model, config = build(flavour)
    state = peft.get_peft_model_state_dict(model)
    back = Adapter.from_state_dict(state, config=config).to_state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    # and PEFT takes it
    other, _ = build(flavour)
    result = peft.set_peft_model_state_dict(other, back)
    assert not result.unexpected_keys


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_adapter_names_in_keys_are_understood(flavour):
    model, config = build(flavour)
    named = {
        k: v for k, v in model.state_dict().items() if "lora_" in k or ".modules_to_save." in k
    }
    plain = {
        k: v
        for k, v in peft.get_peft_model_state_dict(model).items()
        if not k.endswith("base_layer.bias")
    }
    read = Adapter.from_state_dict(named, config=config)
    assert same(read, Adapter.from_state_dict(plain, config=config))
    if flavour == "plain":
        assert read.to_state_dict("default").keys() == {
            k.replace(".modules_to_save.default", "") for k in named
        }


@pytest.mark.parametrize("flavour", ["plain", "rslora", "patterns"])
def test_delta_is_what_peft_adds(flavour):
    model, config = build(flavour)
    adapter = Adapter.from_state_dict(peft.get_peft_model_state_dict(model), config=config)
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        expected = layer.get_delta_weight("default").detach()
        delta = adapter.delta(PREFIX + name)
        if name == "emb":
            delta = delta.T
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_loading_resizes_the_model_in_place(flavour):
    model, config = build(flavour)
    whole = Adapter.from_state_dict(
        {k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}, config=config
    ).with_scale(2.0)
    part = whole.with_rank(2)
    load_adapter(model, part)
    state = adapter_state(model)
    assert state.keys() == peft.get_peft_model_state_dict(model).keys()
    assert same(Adapter.from_state_dict(state, 2.0), part)
    for name in config.target_modules:
        layer = getattr(model.base_model.model, name)
        assert layer.r["default"] == 2
        assert layer.scaling["default"] == 2.0
        if flavour != "dora":
            delta = layer.get_delta_weight("default").detach()
            expected = part.delta(PREFIX + name)
            torch.testing.assert_close(delta, expected.T if name == "emb" else expected)
    fc = model.base_model.model.fc
    assert fc(torch.randn(3, 6)).shape == (3, 5)
    load_adapter(model, whole)
    assert same(Adapter.from_state_dict(adapter_state(model), 2.0), whole)


def test_loading_something_else_is_refused():
    model, _ = build()
    with pytest.raises(ValueError, match="server and client must build the same model"):
        load_adapter(model, random_adapter(2, seed=0))


def test_every_problem_is_reported_at_once():
    good = random_adapter(4, seed=0).to_state_dict()
    bad = dict(good)
    del bad["tall.lora_B.weight"]  # missing partner
    bad["wide.lora_A.weight"] = torch.zeros(3, 9)  # disagreeing ranks
    bad["square.lora_A.weight"] = torch.full((4, 6), float("nan"))
    bad["head.bias"] = torch.tensor([0.0, float("inf"), 0.0])
    bad["tall.lora_C.weight"] = torch.zeros(4)  # unknown kind of LoRA tensor
    bad["something"] = torch.zeros(2)  # unknown
    bad["narrow.base_layer.weight"] = torch.zeros(2)  # base model, not adapter
    bad["steps.weight"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(AdapterError) as caught:
        Adapter.from_state_dict(bad)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 8
    for part in (
        "lora_B of 'tall' is missing",
        "ranks disagree in 'wide'",
        "'square.lora_A.weight' holds NaN or Inf",
        "'head.bias' holds NaN or Inf",
        "'tall.lora_C.weight' is not a LoRA tensor",
        "'something' is unknown",
        "'narrow.base_layer.weight' is not a LoRA tensor",
        "'steps.weight' is torch.int64",
    ):
        assert part in told


def test_config_is_checked():
    model, config = build()
    state = peft.get_peft_model_state_dict(model)
    state["base_model.model.extra.weight"] = torch.zeros(2)
    with pytest.raises(AdapterError, match=r"extra\.weight' is unknown.*modules_to_save"):
        Adapter.from_state_dict(state, config=config)
    other = peft.LoraConfig(r=8, lora_alpha=8, modules_to_save=["head", "extra"])
    with pytest.raises(AdapterError, match=r"rank 4 for .* but the config says 8"):
        Adapter.from_state_dict(state, config=other)


def test_a_grouped_convolution_is_refused():
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    model = peft.get_peft_model(layer, peft.LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(AdapterError, match="grouped convolution"):
        Adapter.from_state_dict(peft.get_peft_model_state_dict(model))


def test_two_adapters_mixed_are_refused():
    state = {f"a.lora_{f}.one.weight": torch.zeros(2, 2) for f in "AB"}
    state |= {f"b.lora_{f}.two.weight": torch.zeros(2, 2) for f in "AB"}
    with pytest.raises(AdapterError, match="several adapters are mixed: one, two"):
        Adapter.from_state_dict(state)


def test_rank_slices_lead_and_pads_are_zero():
    adapter = random_adapter(4, seed=1)
    part = adapter.with_rank(2)
    assert set(part.ranks.values()) == {2}
    for name, pair in adapter.pairs.items():
        assert torch.equal(part.pairs[name].A, pair.A[:2])
        assert torch.equal(part.pairs[name].B, pair.B[:, :2])
        grown = adapter.with_rank(7)
        torch.testing.assert_close(grown.delta(name), adapter.delta(name))
        assert not grown.pairs[name].A[4:].any()
    with pytest.raises(ValueError, match="at least 1"):
        adapter.with_rank(0)


def test_scale_folds_without_changing_the_delta():
    adapter = random_adapter(3, seed=2, scale=0.5)
    folded = adapter.with_scale(4.0)
    for name in adapter.pairs:
        assert folded.pairs[name].scale == 4.0
        torch.testing.assert_close(folded.delta(name), adapter.delta(name))


def test_an_adapter_is_immutable():
    adapter = random_adapter(2, seed=0)
    with pytest.raises(AttributeError, match="immutable"):
        adapter.pairs = {}
    with pytest.raises(TypeError):
        adapter.dense["head.bias"] = torch.zeros(3)


def test_differences_name_what_is_wrong():
    expected = random_adapter(4, seed=0)
    other = random_adapter(3, seed=1, shapes={"tall": (9, 5), "new": (2, 2)}, dense=False)
    told = "\n".join(other.differences(expected, 4))
    for part in (
        "rank 3 for 'tall', but rank 4 was assigned",
        "module 'wide' is missing",
        "module 'new' is unknown",
        "tensor 'head.bias' is missing",
        "lora_A of 'tall' has shape (3, 5), expected (r, 4)",
    ):
        assert part in told
    assert expected.validate(like=random_adapter(4, seed=5), rank=4) == []


def test_norm_and_finiteness_need_no_dense_product():
    pair = random_adapter(4, seed=3).pairs["tall"]
    assert pair.norm() == pytest.approx(float(pair.delta().norm()), rel=1e-5)
    assert frobenius(torch.zeros(2, 3), torch.zeros(4, 2)) == 0.0
    assert is_finite(torch.full((4,), 3e38))  # the sum overflows, the elements do not
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))


def test_a_pair_of_a_layer_as_wide_as_its_rank_keeps_its_factors_apart():
    A, B = torch.eye(4), 2 * torch.eye(4)
    adapter = Adapter({"m": LoraPair(A, B, 1.0)})
    back = Adapter.from_state_dict(adapter.to_state_dict())
    assert torch.equal(back.pairs["m"].A, A)
    assert torch.equal(back.pairs["m"].B, B)


def test_merging_into_a_quantised_base_is_refused():
    model, _ = build()
    check_mergeable(model)
    weight = model.base_model.model.fc.base_layer.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(ValueError, match=r"fc' is quantised \(torch\.int8\)"):
        check_mergeable(model)
