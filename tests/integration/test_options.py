"""A run of the app under each option that changes what travels or who gets which rank.

Server and clients as they are, on a tiny model and without Ray: what one option breaks shows
in a second, and none is documented that has never run.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from flwr.app import Context, Error, RecordDict
from peft import AutoPeftModelForSequenceClassification

from fedlora_app import client_app, server_app
from fedlora_app.config.keys import RunConfig
from fedlora_app.report.page import RunFiles, page
from fedlora_app.report.records import read_records
from strategies.aggregation import AGGREGATIONS, ROBUST
from strategies.optimizers import OPTIMIZERS
from tests.app.test_models import SMALL, folders  # noqa: F401
from tests.fakes import FakeGrid

NODES = [11, 22, 33]
BASE = {
    "rounds": 2,
    "train.steps": 1,
    "train.batch-size": 4,
    "data.max-length": 8,
    "data.min-samples": 4,
    "data.partition": "iid",
    "ranks.list": "2,4",
    "ranks.max": 4,
    "ranks.min": 2,
    "ranks.low": 2,
    "ranks.high": 4,
    "sampling.fraction": 1.0,
    "checkpoint-every": 0,
    "train.precision": "float32",
}
COINS = {"sampling.policy": "independent", "sampling.q": "1.0,1.0,1.0"}
OPTIONS = [
    *({"aggregation": rule} for rule in AGGREGATIONS if rule != "fedit"),
    {"aggregation": "fedit", "ranks.policy": "uniform", "ranks.rank": 4},
    *({"wire-dtype": wire} for wire in ("float16", "bfloat16", "int8")),
    {"lora.dora": True},
    {"lora.dora": True, "wire-dtype": "int8"},
    {"lora.dora": True, "model.head": "mean-pool", "ranks.policy": "uniform"},
    {"lora.target-modules": "dense"},
    {"lora.target-modules": "key,value,dense", "aggregation": "flexlora"},
    {"lora.variant": "pissa", "aggregation": "replication"},
    {"lora.variant": "pissa", "aggregation": "rbla", "lora.scale": 0.5, "wire-dtype": "int8"},
    {"lora.variant": "olora", "aggregation": "fedit", "ranks.policy": "uniform", "ranks.rank": 4},
    {"lora.dropout": 0.5},
    {"lora.scale": 0.5},
    {"weight-by": "clients", "data.partition": "quantity"},
    {"model.head": "mean-pool"},
    {"method": "head"},
    {"method": "local"},
    *({"ranks.policy": policy} for policy in ("uniform", "list", "cycle", "reported", "quality",
                                             "autorank", "self-pruning", "staircase", "capacity")),
    *({"ranks.policy": policy, "ranks.rank": 3} for policy in ("random", "feedback")),
    {"ranks.policy": "autorank", "ranks.capacity": True, "ranks.holders": 0.5},
    {"ranks.policy": "quality", "ranks.validation-rows": 5},
    {"ranks.policy": "autorank", "ranks.reassign-every": 1, "ranks.budget": 3.0},
    {"train.precision": "bfloat16"},
    {"train.schedule": "cosine"},
    {"train.accumulate": 2, "train.group-by-length": True},
    {"train.gradient-checkpointing": True},
    {"train.proximal-mu": 0.1},
    {"clip-norm": 0.5},
    *({"server.robust": robust} for robust in ROBUST),
    *({"server.optimizer": optimizer} for optimizer in OPTIMIZERS),
    {"server.robust": "krum", "server.robust-options": "liars=0.3"},
    {"server.optimizer": "adam", "server.optimizer-options": "learning_rate=0.02"},
    {"ranks.policy": "autorank", "ranks.criteria": "volume,gini-simpson", "ranks.weights": "1,2"},
    {"data.cache": False},
    COINS,
    {**COINS, "aggregation": "flora"},
    {"sampling.policy": "weighted"},
    {"sampling.policy": "statistical"},
    {"clock.profile": "lab"},
    {"evaluate.clients": 0.0},
    {"round.quorum": 0.5},
    {"round.deadline": "auto"},
    {"round.deadline": 30, "round.staleness": "0"},
    {"round.over-selection": 0.5, "sampling.clients": 2},
    {"round.mode": "buffered", "round.buffer": 2, "round.busy": 3, "wire-dtype": "int8"},
    {"round.mode": "asynchronous", "round.staleness": 0.5},
    *({"clock.profile": "lab", **option} for option in (
        {"round.quorum": 2.0},
        {"round.deadline": 1e-3, "round.staleness": "drop"},
        {"round.over-selection": 0.5, "sampling.clients": 2},
        {"round.mode": "buffered", "round.buffer": 2, "ranks.policy": "autorank"},
        {"round.mode": "asynchronous", "aggregation": "flexlora", "round.staleness": 1},
        {"round.mode": "auto", "sampling.policy": "planned", "round.staleness": 0.5},
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):  # noqa: F811
    """Save a tiny encoder that lacks pooler and head, and rows of two classes."""
    folder = tmp_path_factory.mktemp("options")
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, num_attention_heads=2)
    transformers.BertForMaskedLM(config).save_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    tokenizer.save_pretrained(folder / "model")
    rows = [f"{a} {b},{a}" for a in ("oil", "bank") for b in ("price", "rate") for _ in range(12)]
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return {"model.name": str(folder / "model"), "data.name": str(folder)}


class Nodes:
    """The client app on three nodes, each with a Flower state that lasts."""

    def __init__(self, flat):
        self.failed = []
        self.contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": i, "num-partitions": 3, "max-rank": 4},
                state=RecordDict(),
                run_config=flat,
            )
            for i, node in enumerate(NODES)
        }

    def __call__(self, message):
        try:
            reply = client_app.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower reports it
            self.failed.append(error)
            return Error(code=2, reason=str(error))
        if reply.has_error():
            self.failed.append(reply.error.reason)
            return reply.error
        return reply.content


def named(option):
    return " ".join(f"{key}={value}" for key, value in option.items())


@pytest.mark.parametrize("option", OPTIONS, ids=named)
def test_a_run_with_each_option(files, tmp_path, monkeypatch, option):
    monkeypatch.setattr("fedlora_app.report.folder.plot_run", lambda *_: [])  # half the time
    flat = {**BASE, **files, "output": str(tmp_path / "run"), **option}
    if option.get("ranks.policy") == "list":
        flat["ranks.list"] = "2,4,4"
    flat = RunConfig.from_flat(flat).to_flat()
    nodes = Nodes(flat)
    client_app._resident_model.cache_clear()
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    server_app.main(FakeGrid(NODES, nodes), context)

    assert not nodes.failed
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    clients = [r for r in records if r["kind"] == "client"]
    waits = not any(key.startswith("round.") for key in option)
    assert {r["status"] for r in clients} <= ({"ok"} if waits else {"ok", "late"}), clients
    assert any(r["status"] == "ok" for r in clients) or option.get("round.staleness") == "drop"
    if flat["weight-by"] == "clients":
        assert {r["num-examples"] for r in clients} == {1}
    if flat["round.mode"] == "auto":
        (way,) = (r for r in records if r["kind"] == "way")
        assert way["alternatives"][way["way"]] == min(filter(None, way["alternatives"].values()))
        text = page(RunFiles.read(tmp_path / "run"))
        assert f"Chosen before the run: {way['way']}" in text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["labels"] == ["bank", "oil"]
    assert summary["accuracy"] >= 0
    # it loads in plain PEFT, with its base by name, and scores what the run says
    if flat["model.head"] == "mean-pool" or flat["method"] == "local":
        return
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        str(tmp_path / "run" / "adapter"), num_labels=2
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files["model.name"], pad_token="</s>")
    text = (Path(files["data.name"]) / "test.csv").read_text()
    lines = [line.rsplit(",", 1) for line in text.splitlines()[1:]]
    labels = torch.tensor([summary["labels"].index(label) for _, label in lines])
    with torch.no_grad():
        batch = tokenizer([text for text, _ in lines], return_tensors="pt")
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
    if flat["ranks.validation-rows"] == 0:
        near = 0.02 if flat["train.precision"] == "bfloat16" else 1e-3
        assert float(loss) == pytest.approx(summary["loss"], abs=near)
