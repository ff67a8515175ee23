"""Two rounds of every rule with the real model and the real client app, without a network."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from peft import PeftModel

from fedlora_app import client_app
from fedlora_app.config.keys import RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.held_out import effective_adapter
from fedlora_app.models.loading import build_model
from fedlora_app.models.lora import add_lora
from fedlora_app.server_app import initial_model
from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS, make_aggregator
from strategies.client import load_adapter, receive
from strategies.messages import from_record, to_record
from strategies.model import GlobalModel
from strategies.ranks import ListRank
from tests.fakes import FakeGrid

LABELS = ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]
ABOUT = {"labels": LABELS}
FLAT = {
    "train.steps": 1,
    "train.batch-size": 4,
    "train.precision": "float32",  # rounding is not what is tested here
    "data.max-length": 8,
    "ranks.list": "2,4",
}
CONFIG = RunConfig.from_flat(FLAT)
NODES = [11, 22, 33]


class App:
    """The client app on three nodes, each with a Flower state that lasts."""

    def __init__(self, config=CONFIG):
        self.contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": i, "num-partitions": 10},
                state=RecordDict(),
                run_config=config.to_flat(),
            )
            for i, node in enumerate(NODES)
        }
        self.replies = []

    def __call__(self, message):
        reply = client_app.app(message, self.contexts[message.metadata.dst_node_id])
        if reply.has_error():
            return reply.error
        self.replies.append((message, reply))
        return reply.content


class Forgetful(App):
    """Nodes that lose their Flower state after every message."""

    def __call__(self, message):
        content = super().__call__(message)
        self.contexts[message.metadata.dst_node_id].state = RecordDict()
        return content


def run(rule, *, rounds=2, ranks=(2, 4), config=CONFIG, app=None, **options):
    from flwr.app import ConfigRecord

    adapter = initial_model(read_config(config.to_flat()), ABOUT)[1].adapter
    records = []
    strategy = FedLoRA(
        aggregation=make_aggregator(rule) if isinstance(rule, str) else rule,
        ranks=ListRank(list(ranks), cycle=True),
        client_api="numpy",
        scale=config.lora.scale,
        listeners=[records.append],
        **options,
    )
    settings = ConfigRecord({"task-info": json.dumps(ABOUT)})
    app = app or App(config)
    result = strategy.start(
        FakeGrid(NODES, app),
        to_record(adapter.to_state_dict()),
        num_rounds=rounds,
        train_config=settings,
        evaluate_config=settings,
    )
    return result.arrays, records, app


def logits(model):
    ids = torch.arange(4 * 6).reshape(4, 6) % 1000 + 1000
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def base(seed=3):
    return build_model(CONFIG.model, num_labels=len(LABELS), seed=seed)


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_two_rounds_of_every_rule_and_its_adapter_in_peft(rule, tmp_path):
    ranks = (4, 4) if rule == "fedit" else (2, 4)
    arrays, records, _app = run(rule, ranks=ranks)
    clients = [r for r in records if r["kind"] == "client"]
    assert [r["status"] for r in clients] == ["ok"] * 6, clients
    assert all(np.isfinite(r["loss"]) for r in clients)
    evaluated = [r for r in records if r["kind"] == "client-evaluation"]
    assert len(evaluated) == 6

    start = initial_model(read_config(FLAT), ABOUT)[1].adapter
    final = effective_adapter(arrays, CONFIG.lora.scale)
    moved = [float((final.delta(m) - start.delta(m)).norm()) for m in start.pairs]
    assert (min(moved) > 0) == (rule != "fedsa")  # its B stays with the clients

    # what a client merges and trains on has the same effect as the exported adapter
    model = add_lora(base(), CONFIG.lora, rank=1, seed=0)
    load_adapter(model, final)
    expected = logits(model)
    if make_aggregator(rule).merges_base:
        settings = {"lora-scale": CONFIG.lora.scale}
        merged = add_lora(base(), CONFIG.lora, rank=1, seed=0)
        receive(merged, from_record(arrays), settings)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert float((expected - logits(add_lora(base(), CONFIG.lora, rank=1, seed=0))).norm()) > 0
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(base(seed=99), str(tmp_path)).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rule", "up"), [("ffa", "B"), ("rolora", "BA"), ("fedsa", "AA")])
def test_rules_of_one_factor_send_half(rule, up):
    _, _records, app = run(rule)
    sent = {}
    for message, reply in app.replies:
        if message.metadata.message_type != "train":
            continue
        config = message.content["fitins.config"]
        number = config["server-round"]
        factor = up[(number - 1) % len(up)]
        assert config["lora-send"] == factor
        assert config["lora-train"] == {"ffa": "B", "fedsa": "AB"}.get(rule, factor)
        arrays = list(reply.content["fitres.parameters"].values())
        assert len(arrays) == 12 + 2  # one factor a module, and the head
        rank = config["lora-rank"]
        sent[rank] = sum(len(a.data) for a in arrays)
    # twelve 384-wide projections, one factor, float32
    assert sent[4] - sent[2] == 2 * 12 * 384 * 4


def test_fedsa_keeps_b_on_the_client():
    _, _, app = run("fedsa")
    for context in app.contexts.values():
        kept = from_record(context.state["fedlora.kept"])
        assert len(kept) == 12
        assert all(".lora_B." in key and bool(t.any()) for key, t in kept.items())
    downloads = [
        json.loads(m.content["fitins.config"]["array-names"])
        for m, _ in app.replies
        if m.metadata.message_type == "train"
    ]
    assert not any(".lora_B." in name for names in downloads for name in names)
    # the state is what makes the second round differ: without it B starts at zero again
    arrays, *_ = run("fedsa")
    wiped, *_ = run("fedsa", app=Forgetful())
    assert {k: v.data for k, v in arrays.items()} != {k: v.data for k, v in wiped.items()}


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_merges_travel_to_clients_and_leave_the_base_as_it_was(rule):
    arrays, records, _app = run(rule, rounds=3)
    model = GlobalModel.from_tensors(from_record(arrays), CONFIG.lora.scale)
    assert model.merged.pairs
    rounds = [r for r in records if r["kind"] == "round"]
    # The merges are counted. A first step moves B alone, which leaves fedex nothing to merge.
    assert rounds[2]["bytes_down"] > rounds[0]["bytes_down"]
    assert rounds[2]["bytes_up"] == rounds[0]["bytes_up"]
    # one client's merge does not stay for the next: a later run of another rule is unaffected
    clean, *_ = run("rbla")
    client_app._resident_model.cache_clear()
    expected, *_ = run("rbla")
    assert {k: v.data for k, v in clean.items()} == {k: v.data for k, v in expected.items()}


def test_replication_by_quality_gets_its_quality():
    options = {"holder_weights": "quality"}
    _, records, _ = run(make_aggregator("replication", **options), rounds=1)
    clients = [r for r in records if r["kind"] == "client"]
    assert all(r["status"] == "ok" and 0 < r["quality"] <= 1 for r in clients)


def test_fslora_trains_a_block_at_its_own_scale():
    _, _, app = run("fslora", rounds=1)
    trains = [m for m, _ in app.replies if m.metadata.message_type == "train"]
    for message in trains:
        config = message.content["fitins.config"]
        assert config["lora-scale"] == pytest.approx(CONFIG.lora.scale * 4 / config["lora-rank"])


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
def test_every_wire_type_goes_both_ways(wire):
    exact, full, _ = run("rbla")
    arrays, records, _ = run("rbla", wire_dtype=wire)
    assert all(r["status"] == "ok" for r in records if r["kind"] == "client")
    exact, got = (effective_adapter(a, CONFIG.lora.scale) for a in (exact, arrays))
    for module in exact.pairs:
        error = (got.delta(module) - exact.delta(module)).norm() / exact.delta(module).norm()
        assert error < 0.5  # two rounds of Adam from rounded numbers; the codec has its own test
    share = sum(r["bytes_up"] for r in records if r["kind"] == "round") / sum(
        r["bytes_up"] for r in full if r["kind"] == "round"
    )
    assert share < {"float16": 0.6, "bfloat16": 0.6, "int8": 0.5}[wire]


def test_a_rank_4_client_moves_a_quarter_of_a_rank_16_one():
    config = RunConfig.from_flat({**FLAT, "ranks.list": "4,16"})
    _, records, _ = run("replication", rounds=1, ranks=(4, 16), config=config)
    clients = {r["rank"]: r for r in records if r["kind"] == "client"}
    head = 8 * 384 * 4 + 8 * 4
    for way in ("bytes_up", "bytes_down"):
        low, high = (clients[r][way] - head for r in (4, 16))
        assert low / high == pytest.approx(1 / 4, rel=0.03)  # 128 bytes of header an array
