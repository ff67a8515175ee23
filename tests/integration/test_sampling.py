"""Planned sampling in Ray's engine, and private updates from the real client app."""

import json

import numpy as np
import pytest

from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.report.folder import read_records
from fedlora_app.timing import Timing
from strategies.messages import from_record
from strategies.privacy import Privacy, PrivateRun
from strategies.wallclock import retime
from tests.integration.conftest import SMALL, records
from tests.integration.test_rules import FLAT, App, run

PLANNED = {
    **SMALL,
    "rounds": 5,
    "aggregation": "fslora",
    "model.name": "packaged:minilm-l3",
    "ranks.policy": "uniform",
    "ranks.rank": 8,
    "sampling.policy": "planned",
    "sampling.pilots": "true",
    "sampling.pilot-rounds": 2,
    "sampling.pilot-fractions": "0.9,0.4",
    "clock.profile": "phones",
    "evaluate.clients": 0.0,
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    from run_simulation import main

    folder = tmp_path_factory.mktemp("runs") / "planned"
    config = [f"{key}={value}" for key, value in PLANNED.items()]
    assert main(["--clients", "6", "--output", str(folder), "--config", *config]) == 0
    return folder


def test_a_planned_run_ends_with_a_plan_and_a_clock(planned):
    (pilots,), plans = records(planned, "pilots"), records(planned, "plan")
    assert len(pilots["losses"][0]) == len(pilots["losses"][1]) == 3  # start and two rounds
    assert pilots["alpha"] is None or plans
    books = records(planned, "round")
    totals = [book["clock_total"] for book in books]
    assert totals == sorted(totals)
    assert totals[-1] > 0
    weights = {r["client"]: r for r in records(planned, "client")}
    assert {w["steps"] for w in weights.values()} == {3}
    assert (planned / "accuracy-over-time.png").exists()
    summary = json.loads((planned / "summary.json").read_text())
    assert summary["clock_seconds"] == pytest.approx(totals[-1], abs=1e-3)


def test_timing_a_run_again_on_its_own_network_gives_its_own_times(planned):
    config = RunConfig.from_flat(json.loads((planned / "config.json").read_text()))
    (clock,) = records(planned, "clock")
    again = Timing(config).clock(**{k: clock[k] for k in ("base_flops", "rank_flops", "steps")})
    times = [t.seconds for t in retime(read_records(planned / "metrics.jsonl"), again)]
    recorded = [book["clock_seconds"] for book in records(planned, "round")]
    assert times[-5:] == pytest.approx(recorded[-5:], rel=1e-4)


def test_nothing_but_a_clipped_and_noised_update_leaves_a_private_client():
    settings = {"privacy.noise-multiplier": 0.01, "privacy.clip": 0.2, "evaluate.clients": 0.0}
    config = RunConfig.from_flat({**FLAT, **settings})
    app = App(config)
    privacy = PrivateRun(Privacy(clip=0.2, noise_multiplier=0.01))
    _, told, _ = run(
        "rbla", config=config, app=app, rounds=1, ranks=(4,), privacy=privacy, evaluate_fraction=0.0
    )
    trained = [(m, r) for m, r in app.replies if m.metadata.message_type == "train"]
    assert len(trained) == 3
    for message, reply in trained:
        assert dict(reply.content["fitres.metrics"]) == {}
        assert reply.content["fitres.num_examples"]["num_examples"] == 1
        before = from_record(message.content["fitins.parameters"])
        after = from_record(reply.content["fitres.parameters"])
        moved = np.sqrt(sum(float((after[k] - before[k]).square().sum()) for k in after))
        size = sum(t.numel() for t in after.values())
        # The step is clipped to 0.2 and the noise has a norm of 0.002 · √size.
        expected = np.hypot(0.2, 0.002 * np.sqrt(size))
        assert moved == pytest.approx(expected, rel=0.05)
    (book,) = [r for r in told if r["kind"] == "round"]
    assert book["train_loss"] is None
    assert book["epsilon_local"] > 0


def test_a_message_cannot_ask_a_private_client_for_less(caplog):
    settings = {"privacy.noise-multiplier": 1.0, "evaluate.clients": 0.0}
    config = RunConfig.from_flat({**FLAT, **settings})
    _, told, app = run("rbla", config=config, app=App(config), rounds=1)  # no noise asked for
    reasons = [r["reason"] for r in told if r.get("status") == "rejected"]
    assert len(reasons) == 3
    # Why is in the node's own log; what leaves it is the kind of error and its place alone.
    assert all("ValueError in mechanism.py" in reason for reason in reasons)
    logged = [record.getMessage() for record in caplog.records]
    assert sum("insists on dp-noise-multiplier" in line for line in logged) == 3
    told = {key for _, reply in app.replies for key in reply.content}
    assert all(key.startswith("getproperties") for key in told)  # no scores on its rows either


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"sampling.policy": "planned", "sampling.alpha": 1.0}, "set both"),
        (
            {"sampling.policy": "planned", "sampling.pilots": True, "rounds": 10},
            "nothing would be planned",
        ),
        (
            {
                "sampling.policy": "planned",
                "sampling.pilots": True,
                "sampling.alpha": 1.0,
                "sampling.beta": 1.0,
            },
            "leave out one or the other",
        ),
        ({"sampling.q": "0.5,2"}, "above 0 and up to 1"),
        ({"sampling.policy": "independent", "aggregation": "hetlora"}, "norms"),
        ({"clock.profile": "nowhere"}, "clock.profile: expected measured"),
        ({"clock.deadline": 3.0}, "simulated clocks"),
        (
            {
                "sampling.policy": "independent",
                "sampling.estimator": "ratio",
                "sampling.server-rate": 0.5,
            },
            "estimator = 'unbiased'",
        ),
        (
            {"sampling.policy": "weighted", "sampling.fraction": 0.005},
            "expected participants|q_min",
        ),
        (
            {
                "aggregation": "fslora",
                "aggregation-options": "ratio=0.5",
                "sampling.policy": "planned",
                "rounds": 20,
            },
            "ratio of 'fslora' at 1",
        ),
    ],
)
def test_impossible_samplings_are_refused_before_anything_starts(keys, problem):
    with pytest.raises(ConfigError, match=problem):
        read_config(keys)
