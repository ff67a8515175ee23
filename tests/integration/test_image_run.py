"""Rounds on a folder of images with models made here, one of them in Flower's Ray engine."""

import json

import pytest
from flwr.app import Context, RecordDict
from peft import PeftModel

from fedlora_app import client_app, server_app
from fedlora_app.config.keys import RunConfig
from fedlora_app.evaluation import evaluate
from fedlora_app.tasks import make_task
from run_simulation import main
from tests.app.test_images import classes, save_model
from tests.fakes import FakeGrid
from tests.integration.conftest import records
from tests.integration.test_options import BASE, NODES, Nodes


def tiny(folder, **changes):
    """Return config keys of a run on a folder of images with a model made here."""
    config = {
        "task": "image-classification",
        "data.name": classes(folder / "d", "abc", each=20),
        "data.partition": "iid",
        "data.min-samples": 4,
        "model.name": save_model(folder / "m", "ViT"),
        "rounds": 1,
        "train.steps": 2,
        "train.precision": "float32",
        "ranks.list": "2,4",
        "sampling.fraction": 1.0,
    }
    return [f"{key}={value}" for key, value in {**config, **changes}.items()]


def test_images_in_folders_are_learned_and_the_adapter_loads_in_peft(tmp_path):
    out = tmp_path / "out"
    assert main(["--clients", "2", "--output", str(out), "--config", *tiny(tmp_path)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [r["status"] for r in records(out, "client")] == ["ok", "ok"]
    assert summary["rejected"] == 0

    task = make_task(RunConfig.from_flat(json.loads((out / "config.json").read_text())))
    test = task.test_rows()
    model = PeftModel.from_pretrained(task.model(test.about, seed=7), str(out / "adapter"))
    found = evaluate(task, model, task.encode(test), batch_size=8)
    assert abs(found["accuracy"] - summary["accuracy"]) < 1e-6
    assert abs(found["loss"] - summary["loss"]) < 1e-4


@pytest.mark.parametrize("rule", ["replication", "flexlora", "flora", "fedex"])
def test_rules_take_convolutions(tmp_path, monkeypatch, rule):
    monkeypatch.setattr("fedlora_app.report.folder.plot_run", lambda *_: [])
    flat = {
        **BASE,
        "task": "image-classification",
        "aggregation": rule,
        "data.name": str(classes(tmp_path / "d", each=15)),
        "model.name": str(save_model(tmp_path / "m", "ResNet")),
        "output": str(tmp_path / "run"),
    }
    flat = RunConfig.from_flat(flat).to_flat()
    nodes = Nodes(flat)
    client_app._resident_model.cache_clear()
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    server_app.main(FakeGrid(NODES, nodes), context)
    assert not nodes.failed
    assert {r["status"] for r in records(tmp_path / "run", "client")} == {"ok"}
