"""Arrays are matched by name, whatever order the model, the file or the server has them in."""

import zlib

import numpy as np
import peft
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from safetensors.torch import load_file, save_file
from torch import nn

from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS
from strategies.client import receive_parameters, send_parameters
from strategies.messages import from_record, to_record
from strategies.ranks import ListRank
from strategies.wire import WIRE_DTYPES
from tests.fakes import FakeGrid

LAYERS = 12  # in a file, layer 10 comes before layer 2
RANK = 4


class Net(nn.Module):
    """What is saved in full comes first, and all layers have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(LAYERS))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


VARIANTS = {
    "plain": {},
    "dora": {"use_dora": True},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "saved before the layers": {"modules_to_save": ["embed"]},
    "everything": {"use_dora": True, "bias": "all", "modules_to_save": ["embed", "head"]},
}


def make_model(rank: int = RANK, **options):
    torch.manual_seed(3)
    settings = {"modules_to_save": ["head"], **options}
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[str(i) for i in range(LAYERS)],
        init_lora_weights=False, **settings,
    )  # fmt: skip
    return peft.get_peft_model(Net(), config)


def step(name: str) -> float:
    """Return how far a client moves a tensor: another number for every name."""
    return (zlib.crc32(name.encode()) % 1000 + 1) / 100


class Client(NumPyClient):
    def __init__(self, context, model):
        self.state, self.model = context.state, model

    def fit(self, parameters, config):
        receive_parameters(self.model, parameters, config, self.state)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(step(plain(name)))
        return send_parameters(self.model, config, self.state), 10, {"loss": 0.5}


def plain(name: str) -> str:
    return name.replace(".default", "").replace(".modules_to_save", "").removesuffix(".weight")


def nodes(options):
    model = make_model(rank=1, **options)
    app = ClientApp(client_fn=lambda context: Client(context, model).to_client())
    contexts = {n: Context(1, n, {"partition-id": n - 1}, RecordDict(), {}) for n in (1, 2)}

    def answer(message):
        reply = app(message, contexts[message.metadata.dst_node_id])
        return reply.error if reply.has_error() else reply.content

    return FakeGrid([1, 2], answer, rng=np.random.default_rng(0))


def run(arrays, options, *, ranks=(RANK, RANK), rounds=1, **settings):
    strategy = FedLoRA(
        ranks=ListRank(list(ranks)), client_api="numpy", scale=2.0, evaluate_fraction=0,
        query=False, min_replies=2, **settings,
    )  # fmt: skip
    result = strategy.start(nodes(options), to_record(arrays), num_rounds=rounds, timeout=5)
    return from_record(result.arrays)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ["model", "file", "reversed"])
def test_every_tensor_comes_back_under_its_own_name(variant, order, tmp_path):
    options = VARIANTS[variant]
    arrays = peft.get_peft_model_state_dict(make_model(**options))
    if order == "file":
        save_file({k: t.clone() for k, t in arrays.items()}, tmp_path / "adapter.safetensors")
        arrays = load_file(tmp_path / "adapter.safetensors")
        assert list(arrays) != list(peft.get_peft_model_state_dict(make_model(**options)))
    elif order == "reversed":
        arrays = dict(reversed(arrays.items()))
    found = run(arrays, options)
    doubles = {k for k in arrays if ".modules_to_save." in k or ".original_module." in k}
    assert found.keys() == arrays.keys() - doubles
    for name, tensor in found.items():
        wanted = arrays[name] + step(name.removesuffix(".weight"))
        torch.testing.assert_close(tensor, wanted, msg=name)


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_on_every_wire(wire):
    arrays = dict(reversed(peft.get_peft_model_state_dict(make_model(bias="all")).items()))
    found = run(arrays, {"bias": "all"}, wire_dtype=wire)
    for name, tensor in found.items():
        wanted = arrays[name] + step(name.removesuffix(".weight"))
        torch.testing.assert_close(tensor, wanted, rtol=0.02, atol=0.05, msg=name)


@pytest.mark.parametrize("rule", [name for name in AGGREGATIONS if name != "fedit"])
def test_every_rule_gets_every_tensor_of_clients_of_different_rank(rule):
    arrays = dict(reversed(peft.get_peft_model_state_dict(make_model(bias="all")).items()))
    rule = AGGREGATIONS[rule](holder_weights="data") if rule == "replication" else rule
    found = run(arrays, {"bias": "all"}, ranks=(2, RANK), rounds=2, aggregation=rule)
    for name in (n for n in found if "lora_" not in n and not n.startswith("merged.")):
        wanted = arrays[name] + 2 * step(name.removesuffix(".weight"))
        torch.testing.assert_close(found[name], wanted, msg=name)
