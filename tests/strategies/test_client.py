"""The client helpers: what a message says, the model is; what it sends back, the server reads."""

import json
import time

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from strategies.client import (
    PROFILED_KEY,
    adapter_state,
    apply_adapter,
    fit_reply,
    make_reply,
    receive_parameters,
    send_parameters,
    timed,
    training_metrics,
)
from strategies.lora import Adapter
from strategies.messages import MessageProtocol, NumPyProtocol, from_record, to_record
from strategies.profiling import profile_metrics
from strategies.wire import decode, encode

SCALE = 3.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.head(self.first(x))


def make_model(rank, seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["first"], modules_to_save=["head"])
    return get_peft_model(Net(), config)


def state(rank, seed):
    g = torch.Generator().manual_seed(seed)
    like = get_peft_model_state_dict(make_model(rank))
    return {key: torch.randn(t.shape, generator=g) for key, t in like.items()}


def settings(**more):
    return ConfigRecord({"lora-scale": SCALE, "lr": 0.1, **more})


def message(content, kind="train"):
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    return Message(content, 7, kind)


def train_message(tensors, **more):
    return message(RecordDict({"arrays": to_record(tensors), "config": settings(**more)}))


def by_hand(tensors, x):
    """Return what Net computes with the adapter, from the dense product."""
    torch.manual_seed(0)
    net = Net()
    prefix = "base_model.model."
    delta = tensors[f"{prefix}first.lora_B.weight"] @ tensors[f"{prefix}first.lora_A.weight"]
    hidden = x @ (net.first.weight + SCALE * delta).T + net.first.bias
    return hidden @ tensors[f"{prefix}head.weight"].T + tensors[f"{prefix}head.bias"]


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_the_model_is_what_the_message_says(rank, wire):
    model, x = make_model(4), torch.randn(9, 5)
    sent = encode(state(rank, seed=1), wire)
    config = apply_adapter(model, train_message(sent, **{"wire-dtype": wire}))
    assert config["lr"] == 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(decode(sent, wire), x), rtol=1e-5, atol=1e-5)


def test_one_model_serves_one_client_after_another():
    model, x = make_model(4), torch.randn(9, 5)
    for rank, seed in ((2, 1), (6, 2), (1, 3)):
        tensors = state(rank, seed)
        apply_adapter(model, train_message(tensors))
        with torch.no_grad():
            torch.testing.assert_close(model(x), by_hand(tensors, x), rtol=1e-5, atol=1e-5)
        assert model.peft_config["default"].r == rank


def test_the_server_reads_the_reply():
    model, tensors = make_model(4), state(2, seed=1)
    incoming = train_message(tensors)
    apply_adapter(model, incoming)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    time.sleep(0.05)
    reply = make_reply(model, incoming, num_examples=12, loss=0.5, metrics={"mine": 1}, steps=3)
    read = MessageProtocol().read_train(reply.content, list(tensors))
    assert read.weight == 12
    assert set(read.metrics) == {"num-examples", "loss", "mine", "seconds", "steps"}
    assert 0.05 <= read.metrics["seconds"] < 30
    assert read.metrics["steps"] == 3
    assert read.arrays.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(read.arrays[key], tensor + 1)
    own = make_reply(model, incoming, num_examples=1, metrics={"seconds": 9.0})
    assert own.content["metrics"]["seconds"] == 9.0


def test_arrays_go_back_in_the_order_they_came():
    tensors = dict(reversed(state(2, seed=1).items()))
    assert list(tensors) != list(adapter_state(make_model(2)))
    model, incoming = make_model(4), train_message(tensors)
    apply_adapter(model, incoming)
    record = make_reply(model, incoming, num_examples=1).content["arrays"]
    assert list(record) == list(tensors)
    assert all(torch.equal(from_record(record)[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("kind", ["evaluate", "evaluate.own_part"])
def test_an_evaluation_is_answered_with_metrics_alone(kind):
    incoming = message(train_message(state(2, seed=1)).content, kind)
    model = make_model(4)
    apply_adapter(model, incoming)
    reply = make_reply(model, incoming, num_examples=3, loss=1, metrics={"accuracy": 0.5})
    assert {k: dict(v) for k, v in reply.content.items()} == {
        "metrics": {"num-examples": 3, "loss": 1.0, "accuracy": 0.5}
    }


def test_records_of_other_names():
    tensors = state(2, seed=1)
    content = RecordDict({"a": to_record(tensors), "b": settings(), "c": ConfigRecord({"d": 1})})
    model = make_model(4)
    with pytest.raises(ValueError, match=r"one config record in the message, got 'b', 'c'"):
        apply_adapter(model, message(content))
    with pytest.raises(ValueError, match=r"expected 'x' array record"):
        apply_adapter(model, message(content), arrays_key="x", config_key="b")
    incoming = message(content)
    apply_adapter(model, incoming, arrays_key="a", config_key="b")
    reply = make_reply(
        model, incoming, num_examples=2, config_key="b", arrays_key="z", weight_key="rows"
    )
    assert set(reply.content) == {"z", "metrics"}
    assert reply.content["metrics"]["rows"] == 2


def test_a_factor_that_stays_needs_the_context():
    tensors = {k: t for k, t in state(2, seed=1).items() if "lora_B" not in k}
    incoming = train_message(tensors, **{"lora-send": "A"})
    model = make_model(4)
    with pytest.raises(ValueError, match="pass context"):
        apply_adapter(model, incoming)
    context = Context(1, 7, {}, RecordDict(), {})
    apply_adapter(model, incoming, context)
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.fill_(5.0)
    reply = make_reply(model, incoming, num_examples=1, context=context)
    assert set(reply.content["arrays"]) == set(tensors)
    other = make_model(4, seed=5)
    apply_adapter(other, incoming, context)
    assert bool((other.base_model.model.first.lora_B["default"].weight == 5.0).all())


def test_a_profile_goes_with_the_reply_where_it_is_asked_for():
    losses, labels = [0.5, 1.0, 2.0], [0, 1, 1]
    model, context = make_model(4), Context(1, 7, {}, RecordDict(), {})

    def unasked():
        raise AssertionError("not asked for")

    incoming = train_message(state(2, seed=1))
    apply_adapter(model, incoming, context, measure=unasked)
    reply = make_reply(model, incoming, num_examples=3, context=context)
    assert "label-entropy" not in reply.content["metrics"]
    incoming = train_message(state(2, seed=1), profile=True)
    with pytest.raises(ValueError, match="pass the context"):
        apply_adapter(model, incoming, measure=lambda: (losses, labels))
    apply_adapter(model, incoming, context, measure=lambda: (losses, labels))
    reply = make_reply(model, incoming, num_examples=3, context=context)
    expected = profile_metrics(losses, labels)
    assert expected.items() <= dict(reply.content["metrics"]).items()
    assert PROFILED_KEY in context.state


def test_a_private_reply_is_clipped_and_a_node_may_insist():
    tensors = state(2, seed=1)
    asked = {"dp-clip": 0.5, "dp-noise-multiplier": 1e-6}
    model, incoming = make_model(4), train_message(tensors, **asked)
    apply_adapter(model, incoming)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    sent = from_record(make_reply(model, incoming, num_examples=1).content["arrays"])
    moved = torch.cat([(sent[key] - tensors[key]).flatten() for key in tensors])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-3)
    arrays = send_parameters(model, settings(**asked))
    moved = sum(
        ((torch.from_numpy(a) - tensors[k]) ** 2).sum() for k, a in zip(sent, arrays, strict=True)
    )
    assert moved.sqrt().item() == pytest.approx(0.5, rel=1e-3)

    node = {"dp-noise-multiplier": 1.0}
    with pytest.raises(ValueError, match="this node insists"):
        make_reply(model, incoming, num_examples=1, context=Context(1, 7, node, RecordDict(), {}))
    with pytest.raises(ValueError, match="this node insists"):
        send_parameters(model, settings(**asked), node=node)


def test_metrics_of_a_model_that_received_nothing():
    assert training_metrics(make_model(1), {}) == {}


# ----- NumPyClient ---------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_a_numpy_client_of_two_lines(whole):
    protocol, tensors, model = NumPyProtocol(), state(2, seed=1), make_model(4)

    class Client(NumPyClient):
        def __init__(self, context):
            self.state = context.state

        def fit(self, parameters, config):
            receive_parameters(model, parameters, config, self.state)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(1.0)
            if whole:
                return fit_reply(
                    model, config, self.state, num_examples=12, metrics={"loss": 0.5}, steps=4
                )
            metrics = {"loss": 0.5, **training_metrics(model, config, self.state, steps=4)}
            return send_parameters(model, config, self.state), 12, metrics

    app = ClientApp(client_fn=lambda context: Client(context).to_client())
    incoming = message(protocol.train(to_record(tensors), settings()))
    reply = app(incoming, Context(1, 7, {}, RecordDict(), {}))
    read = protocol.read_train(reply.content, list(tensors))
    assert read.weight == 12
    assert set(read.metrics) == {"loss", "seconds", "steps", "num-examples"}
    for key, tensor in tensors.items():
        torch.testing.assert_close(read.arrays[key], tensor + 1)
    adapter = Adapter.from_state_dict(read.arrays, SCALE)
    assert set(adapter.ranks.values()) == {2}


def test_a_reply_says_how_long_it_was_at_its_client_unless_it_is_private():
    model, tensors = make_model(4), state(2, seed=1)
    app = ClientApp(mods=[timed])

    @app.train()
    def train(msg, context):
        time.sleep(0.05)  # the model is built
        apply_adapter(model, msg)
        return make_reply(model, msg, num_examples=3)

    context = Context(1, 7, {}, RecordDict(), {})
    told = (
        MessageProtocol()
        .read_train(app(train_message(tensors), context).content, list(tensors))
        .metrics
    )
    assert told["held-seconds"] - told["seconds"] >= 0.05
    private = app(train_message(tensors, **{"dp-clip": 0.5, "dp-noise-multiplier": 1.0}), context)
    assert dict(private.content["metrics"]) == {"num-examples": 1}

    class Numbers(NumPyClient):
        def fit(self, parameters, config):
            receive_parameters(model, parameters, config)
            return fit_reply(model, config, num_examples=12)

    protocol = NumPyProtocol()
    app = ClientApp(client_fn=lambda context: Numbers().to_client(), mods=[timed])
    reply = app(message(protocol.train(to_record(tensors), settings())), context)
    assert protocol.read_train(reply.content, list(tensors)).metrics["held-seconds"] > 0


def test_parameters_without_their_names():
    model = make_model(2)
    arrays = [t.numpy() for t in state(2, seed=1).values()]
    with pytest.raises(ValueError, match="array-names"):
        receive_parameters(model, arrays, {})
    with pytest.raises(ValueError, match="expected 1 arrays, as the config names, got 4"):
        receive_parameters(model, arrays, {"array-names": json.dumps(["x"])})


def test_a_message_without_arrays():
    content = RecordDict({"config": settings(), "metrics": MetricRecord({"x": 1})})
    with pytest.raises(ValueError, match="one array record in the message, got none"):
        apply_adapter(make_model(2), message(content))


def test_a_private_reply_tells_nothing_but_the_noised_update():
    asked = {"dp-clip": 0.5, "dp-noise-multiplier": 1.0}
    model, incoming = make_model(4), train_message(state(2, seed=1), **asked)
    apply_adapter(model, incoming)
    reply = make_reply(
        model, incoming, num_examples=77, loss=0.3, metrics={"accuracy": 0.9}, steps=4
    )
    assert dict(reply.content["metrics"]) == {"num-examples": 1}
    arrays, weight, metrics = fit_reply(
        model, settings(**asked), num_examples=77, metrics={"accuracy": 0.9}, steps=4
    )
    assert (len(arrays), weight, metrics) == (len(state(2, seed=1)), 1, {})
