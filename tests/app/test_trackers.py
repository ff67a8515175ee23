"""Runs followed elsewhere: what each tracker's own library reads back from a local folder."""

import csv
import errno
import json
import subprocess
import sys
from typing import ClassVar

import pytest

from fedlora_app.config.keys import RunConfig
from fedlora_app.report.trackers import TRACKERS, make_trackers, tracking_problems
from fedlora_app.report.trackers.base import Tracker, scalars
from tests.app.test_report import clocked_run, round_record, write_run

CLOCK = [(0, 0), (1, 4), (2, 13), (3, 28), (4, 34)]


def follow(folder, *names, **config):
    """Write a whole run to trackers, as a server does, and return its folder."""
    run = write_run(folder / "mine", clocked_run(), summary={"accuracy": 0.5, "loss": 1.25})
    config = RunConfig.from_flat({"tracking": ",".join(names), "seed": 7, **config})
    with make_trackers(config, run) as found:
        for record in clocked_run():
            found(record)
        found.finish()
    return run


def test_scalars_of_a_round():
    record = {**round_record(2, clock_seconds=3.0, planned_seconds=None), "clients_accuracy": 0.5}
    found = scalars(record)
    assert found["server/accuracy"] == 0.4
    assert found["clients/accuracy"] == 0.5
    assert found["time/clock_seconds"] == 3.0
    assert "time/planned_seconds" not in found
    assert "clients/total" not in found


@pytest.mark.parametrize("config", [{"tensorboard": True}, {}])
def test_tensorboard_reads_what_was_written(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = follow(tmp_path, *([] if config else ["tensorboard"]), **config)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("time/clock_total")] == CLOCK
    assert [e.value for e in events.Scalars("bytes/up")] == [0, 500, 500, 500, 500]
    assert [e.value for e in events.Scalars("final/loss")] == [1.25]
    tags = events.Tags()["tensors"]
    assert {"config/text_summary", "clients/text_summary"} <= set(tags)
    (text,) = events.Tensors("config/text_summary")
    assert b'"seed": 7' in text.tensor_proto.string_val[0]


@pytest.mark.slow  # it makes a database
def test_mlflow_reads_what_was_written(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    run = follow(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("fedlora")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["seed"] == "7"
    assert len(found.data.params) == len(RunConfig().to_flat())
    history = client.get_metric_history(found.info.run_id, "time/clock_total")
    assert sorted((metric.step, metric.value) for metric in history) == CLOCK
    assert found.data.metrics["final/accuracy"] == 0.5
    kept = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert kept == {"clients.csv", "report.html"}
    local = client.download_artifacts(found.info.run_id, "clients.csv", str(tmp_path))
    with open(local, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["client"] for row in rows} == {
        str(r["client"]) for r in clocked_run() if r["kind"] == "client"
    }
    config = RunConfig.from_flat({"tracking": "mlflow"})
    with make_trackers(config, run, resume_round=2):
        pass
    assert len(client.search_runs([experiment.experiment_id])) == 1  # it goes on with the same


def test_wandb_keeps_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    run = follow(tmp_path, "wandb")
    (kept,) = (run / "wandb").glob("offline-run-*/*.wandb")
    records = list(offline_records(kept))
    history = [dict(pairs) for kind, pairs in records if kind == "history"]
    clock = [(line["_step"], line["time/clock_total"]) for line in history
             if "time/clock_total" in line]  # fmt: skip
    assert clock == CLOCK
    assert any(line.get("final/accuracy") == 0.5 for line in history)
    assert any(key.startswith("clients.") for line in history for key in line)
    assert any(kind == "artifact" for kind, _ in records)
    assert any(pairs.get("seed") == 7 for kind, pairs in records if kind == "run")


def offline_records(file):
    """Yield the kind of each record of a .wandb file and its items.

    A LevelDB log: after 7 bytes of its own, blocks of 32 KiB with pieces of records, each after 4
    bytes of checksum, 2 of its length and 1 that says whether it is whole, first, middle or last.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a piece
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole, found = b"", record.WhichOneof("record_type")
            items = record.history.item if found == "history" else record.run.config.update
            yield found, {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def test_trackio_reads_what_was_written(tmp_path):
    pytest.importorskip("trackio")
    # In a process of its own, for trackio takes its folder from the environment once.
    code = """
import json, os, sys
from pathlib import Path
os.environ.pop("TRACKIO_DIR", None)
from tests.app.test_trackers import follow
run = follow(Path(sys.argv[1]), "trackio")
import trackio
(found,) = trackio.Api().runs("fedlora")
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("fedlora", found.name)
clock = [(line["step"], line["time/clock_total"]) for line in logs if "time/clock_total" in line]
tables = [line["clients"] for line in logs if "clients" in line]
print("FOUND", json.dumps([found.name, found.config["seed"], clock, len(tables)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    name, seed, clock, tables = json.loads(done.stdout.partition("FOUND ")[2].partition("\n")[0])
    assert (name, seed, [tuple(pair) for pair in clock], tables) == ("mine", 7, CLOCK, 1)
    assert list((tmp_path / "trackio").rglob("report.html"))


class Noted(Tracker):
    """Notes what it is told."""

    title, needs, extra = "Notes", "json", "notes"

    made: ClassVar[list] = []

    def begin(self):
        self.told = []
        self.made.append(self)

    def scalars(self, values, step):
        self.told.append(("scalars", step))

    def table(self, name, head, rows):
        assert all(len(row) == len(head) for row in rows)
        self.told.append(("table", name))

    def file(self, path):
        self.told.append(("file", path.name))

    def close(self, *, completed):
        self.told.append(("close", completed))


class Full(Noted):
    """Has no room from the second round on."""

    title = "Full"

    def scalars(self, values, step):
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().scalars(values, step)


class Away(Noted):
    """Does not answer."""

    title = "Away"

    def begin(self):
        raise ConnectionError("nobody answers")


def test_what_a_tracker_raises_ends_it_and_not_the_run(tmp_path, caplog, monkeypatch):
    caplog.set_level("WARNING", logger="flwr")
    for kind in (Noted, Full, Away):
        monkeypatch.setitem(TRACKERS, kind.__name__.lower(), kind)
    monkeypatch.setattr(Noted, "made", made := [])
    follow(tmp_path, "full", "away", "noted", "noted")
    full, noted = made
    assert caplog.text.count("Away gets nothing of this run: nobody answers") == 1
    assert caplog.text.count("Full gets no more of this run: [Errno 28]") == 1
    assert full.told == [("scalars", 0), ("scalars", 1)]
    steps = [("scalars", step) for step in range(5)]
    last = [("scalars", 4), ("table", "clients"), ("file", "report.html"), ("close", True)]
    assert noted.told == [*steps, *last]


def test_a_run_that_fails_closes_its_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(Noted, "made", made := [])
    monkeypatch.setitem(TRACKERS, "noted", Noted)
    trackers = make_trackers(RunConfig.from_flat({"tracking": "noted"}), tmp_path)
    with pytest.raises(ValueError, match="thirteen"), trackers:
        raise ValueError("thirteen")
    assert made[0].told == [("close", False)]


def test_what_cannot_be_followed_is_said_at_the_door(monkeypatch):
    def problems(**flat):
        return tracking_problems(RunConfig.from_flat(flat))

    assert problems() == []
    (said,) = problems(tracking="mlfow")
    assert said == (
        "tracking: expected some of tensorboard, mlflow, wandb, trackio, with commas; got 'mlfow'"
    )
    for name in ("tensorboard", "mlflow", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        (said,) = problems(tracking=name)
        assert said.endswith(f"is not installed; run: pip install 'fedlora[{name}]'")
    assert problems(tensorboard=True)[0].startswith("tensorboard: TensorBoard is not installed")
    with pytest.raises(RuntimeError, match=r"pip install 'fedlora\[tensorboard\]'"):
        make_trackers(RunConfig.from_flat({"tensorboard": True}), None)
