"""Peak memory by phase, against blocks of a known size."""

from pathlib import Path

import pytest
import torch
from torch import nn

from strategies.memory import PHASES, PhaseMemory
from strategies.training import train_loop

MB = 1_000_000


def test_a_phase_has_its_own_peak():
    memory = PhaseMemory(torch.device("cpu"))
    with memory.phase("load"):
        torch.ones(60 * MB)  # 240 MB, given back at once
    with memory.phase("forward"):
        pass
    load, forward = memory.peaks["memory_load_mb"], memory.peaks["memory_forward_mb"]
    assert load >= 240
    if Path("/proc/self/clear_refs").exists():
        assert load - forward == pytest.approx(240, abs=20)
    assert {f"memory_{phase}_mb" for phase in PHASES} >= memory.peaks.keys()


class Hungry(nn.Module):
    """Needs 160 MB on the way there, of which nothing stays."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x, labels):
        with torch.no_grad():
            torch.ones(40 * MB).sum()
        return type("Out", (), {"loss": (self.weight * x.mean() - labels.float().mean()).sum()})


def test_the_loop_says_what_each_phase_took():
    batches = [{"x": torch.ones(2, n), "labels": torch.ones(2)} for n in (3, 3, 3, 9)]
    done = train_loop(Hungry(), batches)
    assert set(done.memory) == {f"memory_{phase}_mb" for phase in PHASES[1:]}
    if Path("/proc/self/clear_refs").exists():
        more = done.memory["memory_forward_mb"] - done.memory["memory_optimizer_mb"]
        assert more == pytest.approx(160, abs=20)
    assert set(done.metrics()) == {"loss", "seconds", "steps"}


def test_it_looks_where_the_peak_may_be(monkeypatch):
    memory, looks = PhaseMemory(torch.device("cpu")), []
    monkeypatch.setattr(memory, "_peak", lambda: looks.append(1) or 1e6)
    seen = []
    for step in ((5, 5, 4), (5, 4, 1), (5, 5, 1), (1, 6, 6), (6, 1, 1)):
        for size in step:
            memory.batch(size)
            with memory.phase("forward"):
                pass
        with memory.phase("optimizer"):
            pass
        seen.append(len(looks))
    assert seen == [4, 8, 8, 9, 9]  # all of two steps, then the larger batch
    monkeypatch.setattr(memory, "_peak", lambda: None)  # where nobody knows
    memory.batch(10)
    with memory.phase("backward"):
        pass
    assert memory.peaks == {"memory_forward_mb": 1.0, "memory_optimizer_mb": 1.0}
