"""What runs on a GPU does what it does on a CPU."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_app.after.evaluate import evaluate_run
from fedlora_app.compare.runs import compare as compare_arms
from fedlora_app.config.keys import RunConfig
from fedlora_app.config.precision import with_precision
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import make_task
from fedlora_app.training import train
from run_simulation import main
from strategies.client import adapter_state
from tests.app.test_bits import folder, rows, settings  # noqa: F401
from tests.app.test_together import LoraConfig, TrainConfig, bert, compare, jobs, llama
from tests.app.test_together import rows as texts
from tests.app.trained import KINDS, finished, summary
from tests.integration.conftest import records
from tests.integration.test_image_run import tiny


def trained(model, *, device, monkeypatch, **told):
    monkeypatch.setattr("fedlora_app.training.default_device", lambda: torch.device(device))
    outcome = train(model, texts(20, 12, 0), TrainConfig(batch_size=5, **told), seed=3)
    return outcome, {k: v.detach().cpu().clone() for k, v in adapter_state(model).items()}


@pytest.mark.parametrize("make", [bert, llama])
def test_it_learns_what_a_cpu_learns(make, monkeypatch):
    (cpu, expected), (gpu, found) = (
        trained(make(), device=device, monkeypatch=monkeypatch, steps=6)
        for device in ("cpu", "cuda")
    )
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-4)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes(monkeypatch):
    found = [
        trained(bert(0.1, 0.1), device="cuda", monkeypatch=monkeypatch, steps=6)[1]
        for _ in range(2)
    ]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_memory_is_told_by_phase(monkeypatch):
    outcome, _ = trained(bert(), device="cuda", monkeypatch=monkeypatch, steps=2)
    assert {"memory_forward_mb", "memory_backward_mb"} <= outcome.memory.keys()
    assert all(value > 0 for value in outcome.memory.values())


@pytest.mark.parametrize("make", [bert, llama])
def test_clients_in_one_batch_learn_what_each_learns_alone(make):
    model = make()
    compare(model, jobs(model, TrainConfig(steps=3, batch_size=4)), rtol=1e-3)


def test_programs_start_as_copies_that_can_use_it():
    code = "from fedlora_app.launch import copies as c; c.preload(c.MODELS + c.LATER); "
    said = subprocess.check_output([sys.executable, "-c", f"{code}print(c.spoiled())"], text=True)
    assert said.strip().endswith("False")


def test_auto_is_bfloat16():
    assert with_precision(RunConfig()).train.precision == "bfloat16"
    assert with_precision(RunConfig(aggregation="fedex")).train.precision == "float32"


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw-8bit"])
def test_a_base_of_few_bits_learns(folder, rows, kind, optimizer):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    told = with_precision(settings(folder, rows, kind, **{"train.precision": "auto"}))
    task = make_task(told)
    inputs = task.for_training(task.encode(task.train_rows()))
    base = task.model({}, seed=0, precision=told.train.precision)
    model = add_lora(base, LoraConfig(), rank=4, seed=0)
    frozen = {n: p.detach().cpu().clone() for n, p in model.named_parameters()
              if not p.requires_grad}  # fmt: skip
    config = replace(told.train, steps=15, learning_rate=0.02, optimizer=optimizer)
    first = train(model, inputs, replace(config, steps=1), seed=0).loss
    assert train(model, inputs, config, seed=0).loss < first
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter.cpu(), frozen[name]), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_of_every_task_and_what_it_leaves(tmp_path, kind):
    run = finished(tmp_path, kind)
    found, told = evaluate_run(run, output=tmp_path / "e")["scores"], summary(run)
    for name in found.keys() & told.keys():
        assert found[name] == pytest.approx(told[name], abs=1e-3), name


@pytest.mark.parametrize("together", [1, 4])
def test_clients_of_a_simulation_share_a_gpu(tmp_path, together):
    out = tmp_path / "out"
    keys = tiny(
        tmp_path, **{"rounds": 2, "train.precision": "auto", "ranks.list": "2,4,3",
                     "simulate.clients-per-process": together},
    )  # fmt: skip
    arguments = ["--clients", "4", "--gpus-per-client", "0.25", "--output", str(out)]
    assert main([*arguments, "--config", *keys]) == 0
    assert [r["status"] for r in records(out, "client")] == ["ok"] * 8
    assert np.isfinite(json.loads((out / "summary.json").read_text())["loss"])
    for record in records(out, "client"):
        assert record["precision-bits"] == 16


def test_clients_of_a_study_share_a_gpu(tmp_path):
    strings = ("task", "data.name", "data.partition", "model.name", "train.precision", "ranks.list")
    keys = dict(key.split("=", 1) for key in tiny(tmp_path))
    config = (f"{k} = {json.dumps(v) if k in strings else v}\n" for k, v in keys.items())
    file = tmp_path / "study.toml"
    file.write_text(
        f"clients = 2\nseeds = [1, 2]\ntarget = 0.9\n[config]\n{''.join(config)}"
        '[settings.one]\n[arms.support]\naggregation = "support"\n'
    )
    assert compare_arms(file, tmp_path / "out", jobs=2, gpus=0.5) == 0
    for seed in (1, 2):
        run = tmp_path / "out" / "study" / "one" / "support" / f"seed-{seed}"
        assert [r["status"] for r in records(run, "client")] == ["ok"] * 2
        # Of a GPU it is what torch has taken there; of the CPU it would be all of the process.
        assert all(0 < r["memory_forward_mb"] < 200 for r in records(run, "client"))
