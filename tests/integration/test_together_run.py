"""Clients of two processes of Flower's Ray engine that train in one batch of one of them."""

import pytest
import torch
from safetensors.torch import load_file

from run_simulation import main
from tests.integration.conftest import records
from tests.integration.test_image_run import tiny


@pytest.mark.slow
def test_a_run_ends_where_it_ends_with_each_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    keys = tiny(tmp_path, **{"rounds": 2, "train.steps": 3})
    ends = []
    for together in (1, 2):
        out = tmp_path / f"out-{together}"
        own = [*keys, f"simulate.clients-per-process={together}"]
        assert main(["--clients", "4", "--output", str(out), "--config", *own]) == 0
        assert {r["status"] for r in records(out, "client")} == {"ok"}
        ends.append(load_file(out / "adapter" / "adapter_model.safetensors"))
        met = list(tmp_path.glob("fedlora-together-*/*/leader"))
        assert bool(met) == (together > 1)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-5)
