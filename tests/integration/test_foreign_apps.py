"""Two Flower apps as others write them, moved to FedLoRA by the docs alone.

One has Message API clients with a training loop of their own and reports batches; the other
``NumPyClient``s with FedProx and an old-style server with a strategy of its own.
"""

import copy
from functools import cache

import peft
import pytest
import torch
import transformers as tf
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import FitIns
from torch.utils.data import DataLoader, TensorDataset

from strategies import FedLoRA, save_adapter
from strategies.client import (
    apply_adapter,
    make_reply,
    receive,
    receive_parameters,
    register_profile,
    send_parameters,
    training_metrics,
)
from strategies.legacy import LegacyFedLoRA
from strategies.messages import from_record, to_record
from strategies.ranks import AutoRank, ListRank
from tests.fakes import FakeGrid, Nodes, Proxy, serve_old_style

NODES = [7001, 12, 930]
RANK, SCALE, BATCH = 8, 2.0, 16
RULES = ["replication", "fedex", "flora"]


@cache
def pretrained():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, num_labels=2, initializer_range=0.3,
    )  # fmt: skip
    return tf.AutoModelForSequenceClassification.from_config(config)


def bare_model():
    return copy.deepcopy(pretrained())  # old-style servers run their clients in threads


def loader_of(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(rows, BATCH, shuffle=True, generator=generator)


def lora_model(rank=RANK):
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules=["query", "value"],
        modules_to_save=["classifier"], lora_dropout=0.0, task_type="SEQ_CLS",
    )  # fmt: skip
    return peft.get_peft_model(bare_model(), config)


def rows_of(partition):
    """Texts of random tokens; the first one says the label. Sites differ in size."""
    g = torch.Generator().manual_seed(100 + partition)
    ids = torch.randint(2, 8, (64 + 32 * partition, 10), generator=g)
    return TensorDataset(ids, (ids[:, 0] < 5).long())


HELD = []  # the ranks that were really trained


def fit(model, loader, epochs=2, proximal=0.0):
    """Train as such apps do: a loop of their own over what requires gradients."""
    HELD.extend({p.shape[0] for name, p in model.named_parameters() if "lora_A" in name})
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    total = 0.0
    for _ in range(epochs):
        for ids, labels in loader:
            loss = model(input_ids=ids, labels=labels).loss
            near = sum((p - s).square().sum() for p, s in zip(parameters, start, strict=True))
            optimizer.zero_grad()
            (loss + proximal / 2 * near).backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def score(model, rows):
    ids, labels = rows.tensors
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits


def logits_of(model):
    return score(model, rows_of(9))[1]


def loss_of(logits):
    return torch.nn.functional.cross_entropy(logits, rows_of(9).tensors[1]).item()


@pytest.fixture(autouse=True)
def nothing_held():
    HELD.clear()


# ----- app A: Message API, own loop, batches instead of rows ----------------------------------


def message_app(applies=True, make=lora_model):
    app = ClientApp()

    def losses_and_labels(context):
        rows = rows_of(context.node_config["partition-id"])
        return score(lora_model(), rows)[0], rows.tensors[1]

    register_profile(app, losses_and_labels)

    @app.train()
    def train(message, context):
        model = make()
        if applies:
            apply_adapter(model, message, context)
        loader = loader_of(rows_of(context.node_config["partition-id"]), context.node_id)
        loss = fit(model, loader)
        return make_reply(
            model, message, num_examples=len(loader), context=context, metrics={"train_loss": loss}
        )

    @app.evaluate()
    def evaluate(message, context):
        model = make()
        apply_adapter(model, message, context)
        rows = rows_of(context.node_config["partition-id"])
        losses, logits = score(model, rows)
        accuracy = (logits.argmax(1) == rows.tensors[1]).float().mean().item()
        return make_reply(
            model, message, num_examples=len(rows), loss=losses.mean().item(),
            metrics={"accuracy": accuracy},
        )  # fmt: skip

    return app


def start(app, rounds=3, arrays=None, **options):
    records = []
    settings = {"ranks": ListRank([2, 4, 8]), "scale": SCALE, "listeners": [records.append]}
    nodes = Nodes(app, NODES)
    if arrays is None:
        arrays = to_record(peft.get_peft_model_state_dict(lora_model()))
    result = FedLoRA(**{**settings, **options}).start(
        grid=FakeGrid(NODES, nodes), initial_arrays=arrays, num_rounds=rounds
    )
    return result, records


def clients(records):
    return [r for r in records if r["kind"] == "client"]


def saved_alone(arrays, folder):
    """Return the logits of the server's model, and of what was saved in plain PEFT."""
    server = lora_model()
    receive(server, from_record(arrays), {"lora-scale": SCALE})
    expected = logits_of(server)
    save_adapter(arrays, folder, scale=SCALE, task_type="SEQ_CLS")
    return expected, logits_of(peft.PeftModel.from_pretrained(bare_model(), str(folder)))


@pytest.mark.parametrize("rule", RULES)
def test_a_message_api_app(rule, tmp_path):
    result, records = start(message_app(), aggregation=rule)
    assert [r["status"] for r in clients(records)] == ["ok"] * 9, clients(records)
    assert sorted(HELD[:3]) == [2, 4, 8]
    expected, found = saved_alone(result.arrays, tmp_path / "adapter")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    first, last = loss_of(logits_of(lora_model())), loss_of(expected)
    assert last < 0.8 * first


def test_profiles_in_rows_and_weights_in_batches(tmp_path):
    result, records = start(message_app(), ranks=AutoRank(2, 8), aggregation="rbla")
    assert [r["status"] for r in clients(records)] == ["ok"] * 9, clients(records)
    assert len({r["rank"] for r in clients(records)}) > 1
    expected, found = saved_alone(result.arrays, tmp_path / "adapter")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Wrapped(torch.nn.Module):
    """As DataParallel names what is in it."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        return self.module(**inputs)


def other_targets():
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    return peft.get_peft_model(bare_model(), config)


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ({"applies": False}, "call apply_adapter"),
        ({"make": bare_model}, "it has no LoRA layers: pass what peft.get_peft_model returned"),
        ({"make": lambda: Wrapped(lora_model())}, "DataParallel: pass the unwrapped model"),
        ({"make": other_targets}, "server and client must build the same model"),
    ],
)
def test_a_wrong_client_says_what_to_do(app, reason):
    _, records = start(message_app(**app), rounds=1, evaluate_fraction=0)
    found = clients(records)
    assert [r["status"] for r in found] == ["rejected"] * 3
    assert all(reason in r["reason"] for r in found), found


# ----- app C: NumPyClients with FedProx, an old-style server with a strategy of its own --------


class ProxClient(NumPyClient):
    def __init__(self, context):
        self.context, self.model = context, lora_model()
        self.partition = int(context.node_config["partition-id"])
        self.rows = rows_of(self.partition)

    def get_properties(self, config):
        return {"partition-id": self.partition}

    def fit(self, parameters, config):
        receive_parameters(self.model, parameters, config, self.context.state)
        loader = loader_of(self.rows, self.partition)
        loss = fit(self.model, loader, proximal=float(config["proximal_mu"]))
        metrics = {"train_loss": loss, **training_metrics(self.model, config)}
        arrays = send_parameters(self.model, config, self.context.state)
        return arrays, len(self.rows), metrics

    def evaluate(self, parameters, config):
        receive_parameters(self.model, parameters, config, self.context.state)
        losses, _ = score(self.model, self.rows)
        return losses.mean().item(), len(self.rows), {}


class FedProx(LegacyFedLoRA):
    """What such projects write: a number for the clients in, the bytes of the round out."""

    def __init__(self, *args, proximal_mu, **options):
        super().__init__(*args, **options)
        self.proximal_mu, self.sent = proximal_mu, []

    def configure_fit(self, server_round, parameters, client_manager):
        chosen = super().configure_fit(server_round, parameters, client_manager)
        self.sent.append([sum(map(len, ins.parameters.tensors)) for _, ins in chosen])
        return [
            (proxy, FitIns(ins.parameters, {**ins.config, "proximal_mu": self.proximal_mu}))
            for proxy, ins in chosen
        ]


@pytest.mark.parametrize("rule", RULES)
def test_numpy_clients_with_an_old_style_server_of_ones_own(rule, tmp_path):
    records = []
    engine = FedLoRA(
        client_api="numpy", aggregation=rule, ranks=ListRank([2, 4, 8]), scale=SCALE,
        listeners=[records.append],
    )  # fmt: skip
    strategy = FedProx(
        engine, peft.get_peft_model_state_dict(lora_model()), num_rounds=3, proximal_mu=0.01
    )
    nodes = Nodes(numpy_app(), NODES)
    history, _ = serve_old_style(strategy, [Proxy(str(n), n, nodes) for n in NODES], 3)
    assert [r["status"] for r in clients(records)] == ["ok"] * 9, clients(records)
    assert sorted(HELD[:3]) == [2, 4, 8]
    assert [len(sizes) for sizes in strategy.sent] == [3, 3, 3]
    assert len(set(strategy.sent[0])) == 3  # each rank has its own slice
    assert len(history.losses_distributed) == 3
    expected, found = saved_alone(strategy.result.arrays, tmp_path / "adapter")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    first, last = loss_of(logits_of(lora_model())), loss_of(expected)
    assert last < 0.8 * first


def numpy_app():
    return ClientApp(client_fn=lambda context: ProxClient(context).to_client())


@pytest.mark.parametrize(
    ("make", "api", "other"), [(numpy_app, "message", "numpy"), (message_app, "numpy", "message")]
)
def test_clients_of_the_other_kind_are_named(make, api, other):
    _, records = start(make(), rounds=1, evaluate_fraction=0, client_api=api)
    found = [r["reason"] for r in clients(records)]
    assert len(found) == 3
    assert all(f"set client_api = '{other}'" in reason for reason in found), found


@pytest.mark.parametrize(
    ("arrays", "settings", "said"),
    [
        (lambda: bare_model().state_dict(), {}, "hold no LoRA module.*get_peft_model_state_dict"),
        (lambda: lora_model().state_dict(), {}, "pass what peft.get_peft_model_state_dict returns"),
        (lambda: peft.get_peft_model_state_dict(lora_model(4)), {}, "has rank 4.*with r = 8"),
        (None, {"fraction_train": 0.5}, r"is sampling=FractionSampling\(fraction\) here"),
        (None, {"ranks": [2, 4]}, "expected a RankPolicy or its name"),
        (None, {"aggregation": "flexora"}, "did you mean 'flexlora'"),
    ],
)
def test_a_wrong_server_says_what_to_do(arrays, settings, said):
    record = to_record(arrays()) if arrays else None
    with pytest.raises((TypeError, ValueError), match=said):
        start(message_app(), rounds=1, arrays=record, **settings)
    assert not HELD
