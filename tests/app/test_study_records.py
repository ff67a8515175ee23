"""The records of a study, packed and unpacked elsewhere, say what they said."""

import json
import tarfile

from fedlora_app.compare.study import Study
from studies.pack_records import packed

FILE = """
clients = 2
seeds = [1]
target = 0.5
[settings.one]
[arms.a]
[arms.b]
"""


def test_what_is_unpacked_is_done(tmp_path):
    (tmp_path / "small.toml").write_text(FILE)
    here, there = tmp_path / "here", tmp_path / "there"
    study = Study.read(tmp_path / "small.toml")
    done, other = study.runs(here / "small")
    done.folder.mkdir(parents=True)
    adapter = done.folder / "adapter"
    for name, content in (
        ("config.json", {**done.config, "output": str(done.folder)}),
        ("metrics.jsonl", {"kind": "round", "round": 1}),
        ("summary.json", {"accuracy": 0.7, "adapter": str(adapter)}),
        ("plot.json", {}),
    ):
        (done.folder / name).write_text(json.dumps(content) + "\n")
    other.folder.mkdir(parents=True)
    (other.folder / "metrics.jsonl").write_text("")  # a run that was cut off

    assert packed(here / "small", tmp_path / "small.tar.xz") == 1
    with tarfile.open(tmp_path / "small.tar.xz") as archive:
        archive.extractall(there, filter="data")
    again, not_done = study.runs(there / "small")
    assert again.done
    assert not not_done.done
    assert again.records == done.records
    assert {file.name for file in again.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json"}  # fmt: skip
    assert not any(str(tmp_path) in file.read_text() for file in again.folder.iterdir())
    summary = json.loads((again.folder / "summary.json").read_text())
    assert summary["adapter"] == "small/one/a/seed-1/adapter"
