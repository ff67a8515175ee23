"""What a run chooses with round.mode = "auto", before anybody was asked."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedlora_app.config.keys import ConfigError
from fedlora_app.config.read import read_config
from fedlora_app.ways import settled
from strategies import FedLoRA
from strategies.messages import to_record
from strategies.sampling import FractionSampling, PlannedSampling
from strategies.wallclock import Exponential, SimulatedClock
from tests.fakes import random_adapter

AUTO = {
    "round.mode": "auto", "sampling.policy": "planned", "clock.profile": "phones",
    "aggregation": "fedit", "ranks.policy": "uniform", "ranks.rank": 4,
}  # fmt: skip
COST = {"base_flops": 1e10, "rank_flops": 1e7, "steps": 3}


def settle(clock, clients=30, **changes):
    parts = read_config({**AUTO, **changes})
    strategy = FedLoRA(
        aggregation=parts.rule, ranks=parts.policy, sampling=parts.sampler, clock=clock
    )
    arrays = to_record(random_adapter(4, seed=0).to_state_dict())
    told = []
    settled_parts = settled(parts, strategy, arrays, clients, told.append)
    (record,) = told
    waiting = settled_parts.waiting
    assert record["buffer"] == (waiting.buffer if waiting.mode == "buffered" else 0)
    assert record["deadline"] == float(waiting.deadline)
    return settled_parts


def test_the_way_of_least_seconds_is_taken_with_what_belongs_to_it():
    parts = settle(SimulatedClock("phones", **COST))
    ways = {
        "synchronous": (PlannedSampling, not parts.waiting.closes),
        "deadline": (PlannedSampling, bool(parts.waiting.deadline)),
        "buffered": (FractionSampling, parts.waiting.mode == "buffered"),
    }
    assert any(isinstance(parts.sampler, kind) and fits for kind, fits in ways.values())
    if parts.waiting.mode == "buffered":
        assert parts.sampler.clients == parts.waiting.busy
        assert 1 <= parts.waiting.buffer <= parts.waiting.busy <= 30


def test_a_run_whose_late_replies_do_not_count_has_rounds():
    parts = settle(SimulatedClock("phones", **COST), **{"round.staleness": "drop"})
    assert parts.waiting.mode == "synchronous"
    assert isinstance(parts.sampler, PlannedSampling)


def test_the_choice_is_that_of_the_planner(monkeypatch):
    away = Exponential(rng=np.random.default_rng(0), share=0.5, seconds=60)
    clock, seen = SimulatedClock("rural", **COST, availability=away), []

    def ways(self, outlook, **options):
        seen.append((outlook, options))
        buffered = SimpleNamespace(busy=7, buffer=3)
        return SimpleNamespace(
            way="buffered", buffered=buffered, deadline=0.0, summary=str, alternatives={}
        )

    monkeypatch.setattr(PlannedSampling, "ways", ways)
    parts = settle(clock, clients=12, **{"round.staleness": "1"})
    assert (parts.waiting.mode, parts.waiting.buffer, parts.waiting.busy) == ("buffered", 3, 7)
    assert parts.waiting.staleness == 1
    outlook, options = seen[0]
    assert outlook.clock is clock
    assert list(outlook.ranks) == [4] * 12
    assert outlook.upload_bytes[1] > 0
    assert options["staleness"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling.policy": "fraction"}, "set sampling.policy"),
        ({"clock.profile": "measured"}, "simulated clock"),
        ({"round.deadline": "5"}, "chooses the deadline as well"),
        ({"clock.deadline": 5.0}, "chooses the deadline as well"),
    ],
)
def test_what_auto_cannot_do_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**AUTO, **changes})
