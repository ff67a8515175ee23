"""Two rounds of the real model on the real data in Flower's Ray engine."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedlora_app.config.keys import RunConfig
from fedlora_app.evaluation import evaluate
from fedlora_app.launch.superlink import SuperLink
from fedlora_app.tasks import make_task
from tests.integration.conftest import ROOT, SMALL, own_scores, records


def test_outputs_are_all_there(simulated):
    for name in ("config.json", "metrics.jsonl", "summary.json", "accuracy.png", "loss.png",
                 "bytes.png", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors"):  # fmt: skip
        assert (simulated / name).stat().st_size > 0, name
    config = json.loads((simulated / "config.json").read_text())
    assert RunConfig.from_flat(config).to_flat() == config
    assert config["rounds"] == 2
    summary = json.loads((simulated / "summary.json").read_text())
    assert (summary["ended"], summary["never_took_part"]) == ("all 2 rounds are done", [])
    for key in ("rounds", "accuracy", "macro_f1", "loss", "seconds", "bytes_up", "bytes_down"):
        assert summary[key] > 0, key
    assert summary["adapter"] == str(simulated / "adapter")
    assert summary["rejected"] == 0


def test_a_client_of_rank_r_trains_and_sends_rank_r(simulated):
    done = records(simulated, "client")
    assert sorted(r["rank"] for r in done) == [4, 4, 8, 8, 16, 16, 32, 32]
    assert all(r["status"] == "ok" and r["bytes_up"] == r["bytes_down"] for r in done)
    # 12 projections of 384 x 384: every rank entry is 12 * 768 float32 values
    size = {r["rank"]: r["bytes_up"] for r in done}
    for low, high in ((4, 8), (8, 16), (16, 32)):
        assert size[high] - size[low] == (high - low) * 12 * 768 * 4
    for r in done:
        assert r["seconds"] > 0
        assert r["num-examples"] > 0
        assert np.isfinite(r["loss"])
    books = records(simulated, "round")
    assert [b["round"] for b in books] == [0, 1, 2]
    for book in books[1:]:
        own = [r for r in done if r["round"] == book["round"]]
        assert book["bytes_up"] == sum(r["bytes_up"] for r in own)
        assert book["clients_accuracy_worst"] <= book["clients_accuracy"]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1"])
def test_a_round_keeps_every_score_of_the_clients_own_evaluation(simulated, name):
    books, expected = records(simulated, "round")[1:], own_scores(simulated, name)
    assert [own["clients"] for own in expected] == [4, 4]
    for book, own in zip(books, expected, strict=True):
        assert book[f"clients_{name}"] == pytest.approx(own["mean"])
        assert book[f"clients_{name}_worst"] == pytest.approx(own["low"])
        assert 0 <= own["low"] < book[f"clients_{name}"] <= 1
        assert book[f"clients_{name}_spread"] > 0
    assert books[-1]["clients_macro_f1"] != books[-1]["clients_accuracy"]


def test_the_adapter_loads_in_peft_to_the_same_predictions(simulated):
    config = RunConfig.from_flat(json.loads((simulated / "config.json").read_text()))
    summary = json.loads((simulated / "summary.json").read_text())
    task = make_task(config)
    test = task.test_rows()
    base = task.model(test.about, seed=7)  # any seed
    model = PeftModel.from_pretrained(base, str(simulated / "adapter"))
    score = evaluate(task, model, task.encode(test), batch_size=64)
    assert score["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-3)
    assert score["loss"] == pytest.approx(summary["loss"], rel=1e-4)


def test_golden_run(simulated):
    """Numbers of this very run, noted down once: numeric drift does not pass in silence."""
    golden = json.loads((ROOT / "tests" / "integration" / "golden.json").read_text())
    books = records(simulated, "round")
    for key, expected in golden.items():
        got = [b[key] for b in books[-len(expected) :]]
        assert got == pytest.approx(expected, rel=0.02, abs=0.01), key


@pytest.mark.slow
def test_flwr_run_gives_the_same_result(simulated, tmp_path):
    """``flwr run`` on a SuperLink the user started: the same seed, the same adapter."""
    folder = tmp_path / "again"
    with SuperLink(simulation=True) as link:
        run = link.run(
            ROOT,
            {**SMALL, "output": str(folder)},
            {"num-supernodes": 4, "client-resources-num-cpus": 2},  # one client at a time
        )
        for _ in link.stream(run):
            pass
        status = link.status(run)
    assert status.completed, status
    ours = load_file(simulated / "adapter" / "adapter_model.safetensors")
    theirs = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [("round=3", "did you mean 'rounds'"), ("aggregation=fedit", "averages equal ranks only")],
)
def test_a_wrong_config_is_one_clear_error(change, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_simulation.py"), "--config", change],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
