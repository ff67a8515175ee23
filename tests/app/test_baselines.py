"""What a federation is compared with: the same training, alone, tuned on, or in one place."""

import json

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedlora_app import client_app, server_app
from fedlora_app.baselines import together, training_of
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.data.rows import train_validation_split
from fedlora_app.report.records import of_kind, read_records
from tests.app.trained import summary, text_files
from tests.fakes import FakeGrid
from tests.integration.test_options import BASE, NODES, Nodes


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("fedlora_app.report.folder.plot_run", lambda *_: [])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return text_files(tmp_path_factory.mktemp("files"))


def ran(files, output, nodes=NODES, failing=(), **changes):
    """Return the folder of a run of the app on some nodes."""
    flat = RunConfig.from_flat({**BASE, **files, "output": str(output), **changes}).to_flat()
    read_config(flat)
    client_app._resident_model.cache_clear()
    answer = Nodes(flat)
    for i, node in enumerate(nodes):
        share = {"partition-id": i, "num-partitions": len(nodes)}
        answer.contexts[node] = Context(1, node, share, RecordDict(), flat)
    server_app.main(FakeGrid(nodes, answer), Context(1, 0, {}, RecordDict(), flat))
    assert bool(answer.failed) == bool(failing)
    return output


AMOUNTS = {
    "steps": {"train.steps": 2},
    "epochs": {"train.steps": 0, "train.epochs": 1.0, "train.batch-size": 25},  # 1.7 batches a pass
}


@pytest.mark.parametrize("amount", AMOUNTS)
def test_alone_is_what_a_federation_of_one_does(files, tmp_path, amount):
    settings = {
        "rounds": 2, "train.round-decay": 0.5, "train.schedule": "linear", "min-nodes": 1,
        "lora.dropout": 0.2, "ranks.policy": "uniform", "ranks.rank": 4, **AMOUNTS[amount],
    }  # fmt: skip
    found = [
        load_file(ran(files, tmp_path / method, nodes=[11], method=method, **settings)
                  / "adapter" / "adapter_model.safetensors")
        for method in ("lora", "local")
    ]  # fmt: skip
    moved = max(float(tensor.abs().max()) for key, tensor in found[0].items() if "lora_B" in key)
    assert moved > 1e-4
    for key, tensor in found[0].items():
        assert np.allclose(tensor, found[1][key], atol=1e-6), key
    steps = {
        method: sum(r["steps"] for r in of_kind(read_records(tmp_path / method / "metrics.jsonl"),
                                                "client"))
        for method in ("lora", "local")
    }  # fmt: skip
    assert steps["lora"] == steps["local"] == 4


def test_every_client_tunes_on_and_the_model_stays(files, tmp_path):
    settings = {"rounds": 2, "train.learning-rate": 0.05, "sampling.fraction": 0.4,
                "train.steps": 3, "aggregation": "flora"}  # fmt: skip
    plain = ran(files, tmp_path / "lora", **settings)
    tuned = ran(files, tmp_path / "personal", method="personal", **settings,
                **{"train.personal-steps": 9})  # fmt: skip
    for name in ("loss", "accuracy"):
        assert summary(tuned)[name] == pytest.approx(summary(plain)[name], abs=1e-6)
    records = read_records(tuned / "metrics.jsonl")
    assert [r["round"] for r in of_kind(records, "round")] == [0, 1, 2]
    (own,) = [r for r in records if r["kind"] == "personal"]
    assert len(own["clients"]) == 3  # also those that were in no round
    rows = np.array([c["rows"] for c in own["clients"]])
    for key, name in (("before_loss", "own_loss_global"), ("after_loss", "own_loss")):
        values = np.array([c[key] for c in own["clients"]])
        assert summary(tuned)[name] == pytest.approx((values * rows).sum() / rows.sum())
        assert summary(tuned)[f"{name}_worst"] == max(values)
    assert summary(tuned)["own_loss"] < summary(tuned)["own_loss_global"]
    assert summary(tuned)["bytes_up"] == summary(plain)["bytes_up"]


def test_all_rows_in_one_place_see_as_many_rows(files, tmp_path):
    settings = {"rounds": 2, "sampling.fraction": 0.7, "train.steps": 2, "evaluate.clients": 1.0}
    run = ran(files, tmp_path / "central", method="central", **settings)
    records = read_records(run / "metrics.jsonl")
    clients = of_kind(records, "client")
    assert [r["steps"] for r in clients] == [4, 4]  # two of three clients, two steps each
    assert {r["rank"] for r in clients} == {4}
    assert len({r["node"] for r in of_kind(records, "client-evaluation")}) == 3
    config = RunConfig.from_flat({"train.steps": 0, "train.epochs": 3.0, "sampling.fraction": 0.5})
    assert training_of(config, {"all-rows": 1}, 10).epochs == 1.5


def test_rows_in_one_place_are_those_that_clients_train_on():
    config = RunConfig(seed=3)
    shares = [np.array([4, 9, 2, 7, 30]), np.array([1, 3, 5, 8, 11, 12])]
    kept, held_out = together(shares, config)
    assert sorted([*kept, *held_out]) == sorted([*shares[0], *shares[1]])
    fraction = config.data.validation_fraction
    for share in shares:
        mine = train_validation_split(range(len(share)), fraction, config.seed)[0]
        assert {*share[mine]} <= {*kept}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "personal", "privacy.noise-multiplier": 1.0}, "own rows, which a private run"),
        ({"method": "central", "privacy.noise-multiplier": 1.0}, "puts all rows in one place"),
        ({"method": "central", "sampling.policy": "weighted"}, "set it to 'fraction'"),
    ],
)
def test_what_cannot_be_measured(keys, message):
    private = {"privacy.clip": 1.0, "ranks.policy": "uniform"}
    with pytest.raises(ConfigError, match=message):
        read_config({**private, **keys} if "privacy.noise-multiplier" in keys else keys)


def test_a_real_site_keeps_its_rows(files, tmp_path):
    flat = RunConfig.from_flat({**BASE, **files, "method": "central"}).to_flat()
    node = {"data-path": files["data.name"]}
    client = client_app.LoRAClient(RunConfig.from_flat(flat), node, RecordDict())
    about = json.dumps({"labels": ["bank", "oil"]})
    with pytest.raises(ValueError, match="rows of real sites cannot be put in one place"):
        client._held({"task-info": about, "all-rows": 1})
