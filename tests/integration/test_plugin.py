"""``FedLoRA`` in a Message API app as users write them: Flower's template, two lines changed."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS
from strategies.client import apply_adapter, make_reply, register_profile
from strategies.lora import Adapter
from strategies.messages import from_record
from strategies.ranks import AutoRank, ListRank, UniformRank
from tests.fakes import FakeGrid, Nodes

NODES = [501, 77, 230]
FULL, SCALE = 4, 2.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def make_model(rank=FULL):
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALE * rank),
        target_modules=["first", "second"],
        modules_to_save=["head"],
    )
    return get_peft_model(Net(), config)


def data(node):
    g = torch.Generator().manual_seed(node)
    x = torch.randn(40 + node % 7, 8, generator=g)
    return x, x[:, :3].argmax(1)


def train(model, x, y, lr, steps=5):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def before():
    """The app as it was: Flower's template with PEFT."""
    app = ClientApp()

    @app.train()
    def fit(message, context):
        model = make_model()
        arrays = message.content["arrays"].to_torch_state_dict()
        set_peft_model_state_dict(model, arrays)
        x, y = data(context.node_id)
        loss = train(model, x, y, message.content["config"]["lr"])
        return Message(
            RecordDict(
                {
                    "arrays": ArrayRecord(get_peft_model_state_dict(model)),
                    "metrics": MetricRecord({"train_loss": loss, "num-examples": len(x)}),
                }
            ),
            reply_to=message,
        )

    return app


def after(mods=None, **keys):
    """The same app with the two helpers."""
    app = ClientApp(mods=mods)

    @app.train()
    def fit(message, context):
        model = make_model()
        config = apply_adapter(model, message, context)
        x, y = data(context.node_id)
        loss = train(model, x, y, config["lr"])
        return make_reply(
            model,
            message,
            context=context,
            num_examples=len(x),
            loss=loss,
            metrics={"train_loss": loss},
            steps=5,
            **keys,
        )

    @app.evaluate()
    def score(message, context):
        model = make_model()
        apply_adapter(model, message, context)
        x, y = data(context.node_id)
        with torch.inference_mode():
            logits = model(x)
        loss = nn.functional.cross_entropy(logits, y).item()
        accuracy = (logits.argmax(1) == y).float().mean().item()
        return make_reply(
            model, message, num_examples=len(x), loss=loss, metrics={"accuracy": accuracy}, **keys
        )

    return app


def start(strategy, app, rounds=3, nodes=None, **options):
    nodes = nodes or Nodes(app, NODES)
    return strategy.start(
        grid=FakeGrid(NODES, nodes),
        initial_arrays=ArrayRecord(get_peft_model_state_dict(make_model())),
        num_rounds=rounds,
        **{"train_config": ConfigRecord({"lr": 0.1}), **options},
    )


def lora(**options):
    return FedLoRA(**{"ranks": ListRank([2, 4], cycle=True), "scale": SCALE, **options})


def test_with_equal_ranks_the_result_is_that_of_fedavg():
    expected = start(FedAvg(fraction_evaluate=0.0), before()).arrays.to_torch_state_dict()
    strategy = lora(aggregation="fedit", ranks=UniformRank(FULL), evaluate_fraction=0)
    found = start(strategy, after()).arrays.to_torch_state_dict()
    assert found.keys() == expected.keys()
    initial = get_peft_model_state_dict(make_model())
    assert any(not torch.equal(found[k], initial[k]) for k in initial)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_fedavg_app_takes_fedlora_unchanged_while_ranks_are_equal():
    strategy = lora(aggregation="fedit", ranks=UniformRank(FULL), evaluate_fraction=0)
    expected = start(FedAvg(fraction_evaluate=0.0), before()).arrays.to_torch_state_dict()
    found = start(strategy, before()).arrays.to_torch_state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def test_functions_keys_and_settings_of_the_user():
    records, seen = [], []

    def evaluate(server_round, arrays):
        model = make_model()
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        x, y = data(999)
        with torch.inference_mode():
            return MetricRecord({"loss": nn.functional.cross_entropy(model(x), y).item()})

    def mean(contents, weight_key):
        seen.append([dict(content["metrics"]) for content in contents])
        weights = [content["metrics"][weight_key] for content in contents]
        return MetricRecord({"clients": len(contents), "rows": sum(weights)})

    strategy = lora(
        weighted_by_key="rows",
        arrayrecord_key="my-arrays",
        configrecord_key="my-config",
        train_metrics_aggr_fn=mean,
        listeners=[records.append],
    )
    app = after(weight_key="rows", arrays_key="trained", metrics_key="numbers")
    nodes = Nodes(app, NODES)
    result = start(
        strategy,
        app,
        rounds=4,
        nodes=nodes,
        evaluate_fn=evaluate,
        train_config=ConfigRecord({"lr": 0.5}),
        evaluate_config=ConfigRecord({"mine": 1}),
    )
    total = sum(len(data(node)[0]) for node in NODES)
    assert dict(result.train_metrics_clientapp[1]) == {"clients": 3, "rows": total}
    assert all({"train_loss", "loss", "seconds", "steps", "rows"} == set(m) for m in seen[0])
    losses = [result.evaluate_metrics_serverapp[i]["loss"] for i in range(5)]
    assert losses[-1] < 0.9 * losses[0]
    assert {"loss", "accuracy"} == set(result.evaluate_metrics_clientapp[4])
    clients = [r for r in records if r["kind"] == "client"]
    assert [r["status"] for r in clients] == ["ok"] * 12
    assert [r["rank"] for r in clients[:3]] == [2, 4, 2]
    assert all(r["steps"] == 5 and 0 < r["seconds"] < 60 for r in clients)
    for message, reply in nodes.replies:
        if message.metadata.message_type == "train":
            assert set(message.content) == {"my-arrays", "my-config"}
            assert set(reply.content) == {"trained", "numbers"}
        else:
            assert message.content["my-config"]["mine"] == 1
            assert set(reply.content) == {"numbers"}


@pytest.mark.parametrize(
    "rule",
    [
        "flora",
        "ffa",
        "fedsvd",
        "rolora",
        "fedsa",
        "fslora",
        "flexlora",
        "fedex",
        "fedmomentum",
        "fold",
    ],
)
@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_the_same_client_serves_every_rule(rule, wire):
    records = []
    strategy = lora(aggregation=rule, wire_dtype=wire, listeners=[records.append])
    start(strategy, after())
    clients = [r for r in records if r["kind"] == "client"]
    assert [r["status"] for r in clients] == ["ok"] * 9, clients
    losses = [r["train_loss"] for r in records if r["kind"] == "round"]
    assert losses[-1] < losses[0]


def test_autorank_gets_its_profile_in_a_query_and_again_in_a_reply():
    app = ClientApp()
    asked = []

    def losses(context):
        x, y = data(context.node_id)
        with torch.inference_mode():
            logits = make_model()(x)
        return nn.functional.cross_entropy(logits, y, reduction="none").numpy(), y.numpy()

    register_profile(app, losses)

    @app.train()
    def fit(message, context):
        model = make_model()

        def measure():
            asked.append(context.node_id)
            return losses(context)

        config = apply_adapter(model, message, context, measure=measure)
        x, y = data(context.node_id)
        loss = train(model, x, y, config["lr"])
        return make_reply(model, message, context=context, num_examples=len(x), loss=loss)

    records = []
    strategy = lora(
        ranks=AutoRank(1, FULL, reassign_every=2), evaluate_fraction=0, listeners=[records.append]
    )
    start(strategy, app, rounds=4)
    profiles = [r for r in records if r["kind"] == "client" and "label-entropy" in r]
    assert len(asked) == len(profiles) > 0
    assert len({r["rank"] for r in records if r["kind"] == "client"}) > 1


def clipped_norms(nodes):
    """Return the norm of each client's update, straight from what travelled."""
    norms = []
    for message, reply in nodes.replies:
        sent, back = (c.content["arrays"].to_torch_state_dict() for c in (message, reply))
        assert list(sent) == list(back)
        norms.append(torch.cat([(back[k] - sent[k]).flatten() for k in sent]).norm().item())
    return norms


SENDS_OTHER_ARRAYS = {"ffa", "fedsvd", "rolora", "flora", "fedex", "fold"}
CLIPPED = [(fixedclipping_mod, rule) for rule in AGGREGATIONS if rule not in SENDS_OTHER_ARRAYS]


@pytest.mark.parametrize(("mod", "rule"), [*CLIPPED, (adaptiveclipping_mod, "replication")])
def test_flowers_clipping_mods(mod, rule):
    records = []
    config = ConfigRecord({"lr": 0.5, "clipping_norm": 0.05})
    app = after(mods=[mod])
    nodes = Nodes(app, NODES)
    policy = UniformRank(FULL) if rule == "fedit" else ListRank([2, 4], cycle=True)
    strategy = lora(aggregation=rule, ranks=policy, evaluate_fraction=0, listeners=[records.append])
    start(strategy, app, rounds=2, nodes=nodes, train_config=config)
    clients = [r for r in records if r["kind"] == "client"]
    assert [r["status"] for r in clients] == ["ok"] * 6, clients
    np.testing.assert_allclose(clipped_norms(nodes), 0.05, rtol=1e-3)
    if mod is adaptiveclipping_mod:
        assert all(r["norm_bit"] == 1 for r in clients)


def test_flowers_local_privacy_and_size_mods():
    records = []
    app = after(mods=[message_size_mod, arrays_size_mod, LocalDpMod(0.05, 0.001, 1.0, 1e-5)])
    strategy = lora(evaluate_fraction=0, listeners=[records.append])
    start(strategy, app)
    clients = [r for r in records if r["kind"] == "client"]
    assert [r["status"] for r in clients] == ["ok"] * 9, clients


@pytest.mark.parametrize("rule", sorted(SENDS_OTHER_ARRAYS))
def test_a_clipping_mod_says_where_a_rule_sends_back_other_arrays(rule):
    records = []
    config = ConfigRecord({"lr": 0.5, "clipping_norm": 0.05})
    strategy = lora(aggregation=rule, evaluate_fraction=0, listeners=[records.append])
    start(strategy, after(mods=[fixedclipping_mod]), rounds=2, train_config=config)
    refused = [r for r in records if r["kind"] == "client" and r["status"] == "rejected"]
    assert refused
    assert all("keys in the ArrayRecord" in r["reason"] for r in refused)


def test_flowers_privacy_wrapper_around_fedlora():
    inner = lora(evaluate_fraction=0, aggregation="zero-padding")
    strategy = DifferentialPrivacyClientSideFixedClipping(
        inner, noise_multiplier=0.001, clipping_norm=0.5, num_sampled_clients=3
    )
    app = after(mods=[fixedclipping_mod])
    nodes = Nodes(app, NODES)
    result = start(strategy, app, nodes=nodes)
    assert max(clipped_norms(nodes)) <= 0.5 * (1 + 1e-5)
    assert len(nodes.replies) == 9
    adapter = Adapter.from_state_dict(from_record(result.arrays), SCALE)
    assert set(adapter.ranks.values()) == {FULL}
