"""Clients of two processes of Flower's Ray engine that train in one batch of one of them."""

import pytest
import torch
from safetensors.torch import load_file

from run_simulation import main
from tests.app.test_images import classes, save_model
from tests.integration.conftest import records


@pytest.mark.slow
def test_a_run_ends_where_it_ends_with_each_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    config = {
        "task": "image-classification",
        "data.name": classes(tmp_path / "d", "abc", each=20),
        "data.partition": "iid",
        "data.min-samples": 4,
        "model.name": save_model(tmp_path / "m", "ViT"),
        "rounds": 2,
        "train.steps": 3,
        "train.precision": "float32",
        "ranks.list": "2,4",
        "sampling.fraction": 1.0,
    }
    ends = []
    for together in (1, 2):
        out = tmp_path / f"out-{together}"
        keys = [f"{k}={v}" for k, v in {**config, "simulate.clients-per-process": together}.items()]
        assert main(["--clients", "4", "--output", str(out), "--config", *keys]) == 0
        assert {r["status"] for r in records(out, "client")} == {"ok"}
        ends.append(load_file(out / "adapter" / "adapter_model.safetensors"))
        met = list(tmp_path.glob("fedlora-together-*/*/leader"))
        assert bool(met) == (together > 1)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-5)
