"""PiSSA and OLoRA: what PEFT makes of one model, for clients of any rank."""

import peft
import pytest
import torch
import transformers

from fedlora_app.config.keys import ConfigError, LoraConfig
from fedlora_app.config.read import read_config
from fedlora_app.models.lora import add_lora
from fedlora_app.models.starts import STARTS, check_start, start_of
from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS, Update, make_aggregator
from strategies.client import adapter_state, receive
from strategies.lora import Adapter
from strategies.messages import from_record, to_record
from strategies.model import GlobalModel
from strategies.packing import Packing
from strategies.promises import declares

RANK, SCALE = 8, 2.0
NETS = {
    "llama": transformers.LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=1,  # query is 32×32 and value 16×32
    ),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50),
}  # fmt: skip
TOKENS = torch.arange(12).reshape(2, 6)


def base(net="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(NETS[net]).eval()


def model_of(net="llama"):
    return add_lora(base(net), LoraConfig(scale=SCALE), rank=1, seed=0)


def begun(variant, net="llama", rank=RANK):
    """Return what a server starts with."""
    model = add_lora(base(net), LoraConfig(scale=SCALE), rank=rank, seed=0)
    start = start_of(model, variant, scale=SCALE, rank=rank)
    return GlobalModel(Adapter(start.pairs), start=start)


def received(model, rank, net="llama", rule="replication"):
    """Return the model of a client that was sent its part."""
    client = model_of(net)
    packing = Packing(make_aggregator(rule), model, "float32", 1)
    parcel = packing.train(rank, lambda: None)
    config = packing.config({}, _Client(), parcel, rank)
    receive(client, from_record(parcel.sent().record), dict(config))
    return client


class _Client:
    index = 0


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("variant", STARTS)
@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_a_client_of_any_rank_starts_as_peft_does(variant, net, rank):
    client = received(begun(variant, net), rank, net)
    torch.testing.assert_close(logits(client), logits(base(net)), atol=1e-5, rtol=1e-4)
    if (variant, net) == ("olora", "gpt2"):
        return  # PEFT 0.21 takes a transposed layer's factors the wrong way round
    targets = list(client.peft_config["default"].target_modules)
    other = peft.get_peft_model(
        base(net),
        peft.LoraConfig(
            r=rank, lora_alpha=SCALE * rank, target_modules=targets, init_lora_weights=variant,
            fan_in_fan_out=net == "gpt2",
        ),
    )  # fmt: skip
    ours, theirs = dict(client.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if ".lora_" not in name:
            torch.testing.assert_close(ours[name], value, atol=2e-6, rtol=1e-4)
        elif ".lora_A." in name:  # each alone is known up to signs
            b = name.replace(".lora_A.", ".lora_B.")
            torch.testing.assert_close(
                ours[b] @ ours[name], theirs[b] @ value, atol=2e-6, rtol=1e-4
            )


@pytest.mark.parametrize("rule", ["replication", "rbla"])
@pytest.mark.parametrize("variant", STARTS)
def test_a_round_moves_each_entry_and_leaves_the_rest_of_the_model(variant, rule):
    """Dense, by hand: a client of rank r is W + s Σ_{j<r} (b_j a_j - b⁰_j a⁰_j)."""
    model = begun(variant)
    made = make_aggregator(rule)
    state = made.init(model.adapter)
    g = torch.Generator().manual_seed(3)
    for rank, weight in ((2, 1.0), (5, 3.0)):  # nobody trains entries 5 to 7
        sent = model.adapter.with_rank(rank)
        moved = {
            m: type(p)(p.A + torch.randn(p.A.shape, generator=g), p.B, p.scale)
            for m, p in sent.pairs.items()
        }
        made.add(state, Update(Adapter(moved), weight))
    after = GlobalModel(made.finish(state).adapter, start=model.start)
    for rank in (1, 2, 5, RANK):
        client = received(after, rank)
        for module, pair in after.adapter.pairs.items():
            old = model.adapter.pairs[module]
            change = sum(
                SCALE * (torch.outer(pair.B[:, j], pair.A[j]) - torch.outer(old.B[:, j], old.A[j]))
                for j in range(rank)
            )
            layer = client.get_submodule(module)
            own = layer.get_delta_weight("default") + layer.get_base_layer().weight
            plain = base().get_submodule(module.removeprefix("base_model.model.")).weight
            torch.testing.assert_close(own, plain + change, atol=1e-5, rtol=1e-4)
    assert any(
        (after.adapter.delta(m) - model.adapter.delta(m)).abs().max() > 0.1
        for m in after.adapter.pairs
    )


@pytest.mark.parametrize("variant", STARTS)
def test_the_whole_is_one_adapter_on_the_loaded_weights(variant):
    model = begun(variant)
    bigger = {m: type(p)(p.A, 3 * p.B, p.scale) for m, p in model.adapter.pairs.items()}
    model = GlobalModel(Adapter(bigger), start=model.start)
    again = GlobalModel.from_tensors(from_record(to_record(model.to_tensors())), SCALE)
    client = received(again, RANK)
    state = again.combined().to_state_dict()
    whole = add_lora(base(), LoraConfig(scale=SCALE), rank=1, seed=0)
    receive(whole, state, {"lora-scale": SCALE})
    assert adapter_state(whole)  # of rank 16 at most
    torch.testing.assert_close(logits(whole), logits(client), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", sorted(AGGREGATIONS))
def test_rules_that_would_lose_a_part_of_the_model_are_refused(rule):
    keys = {"aggregation": rule, "lora.variant": "pissa", "ranks.policy": "uniform"}
    if declares(make_aggregator(rule), "keeps_start"):
        read_config(keys)
        return
    with pytest.raises(ConfigError, match=r"as fedit, rbla, replication do"):
        read_config(keys)
    arrays = to_record(begun("pissa").to_tensors())
    with pytest.raises(ValueError, match="starts from factors of its frozen weights"):
        FedLoRA(aggregation=rule, scale=SCALE).check(arrays)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora.dora": True}, "lora.dora"),
        ({"method": "head"}, "method = 'head'"),
        ({"task": "causal-lm", "model.quantization": "4bit"}, "model.quantization = '4bit'"),
        ({"task": "preference"}, "task = 'preference'"),
        ({"ranks.policy": "self-pruning"}, "ranks.policy = 'self-pruning'"),
        ({"simulate.clients-per-process": 2}, "simulate.clients-per-process"),
    ],
)
def test_what_cannot_go_with_a_start_is_refused(keys, said):
    with pytest.raises(ConfigError) as error:
        read_config({"aggregation": "replication", "lora.variant": "olora", **keys})
    assert said in str(error.value)


def test_a_rank_above_what_a_layer_has():
    model = model_of()
    with pytest.raises(ValueError, match=r"16 factors \(16×32\), and ranks go up to 17"):
        check_start(model, "pissa", 17)
    check_start(model, "pissa", 16)


def test_only_linear_layers():
    net = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    )
    with pytest.raises(ValueError, match=r"is for linear layers, and .* is a Conv2d"):
        check_start(add_lora(net, LoraConfig(), rank=1, seed=0), "olora", 1)
