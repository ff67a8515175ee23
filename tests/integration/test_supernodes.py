"""The same app, unchanged, on a real SuperLink and two SuperNodes with data of their own."""

import csv
import json
import time

from fedlora_app.config import DataConfig
from fedlora_app.data import load_train
from fedlora_app.superlink import SuperLink
from tests.integration.conftest import ROOT, SMALL, records


def test_two_supernodes_with_their_own_data_and_limits(tmp_path):
    rows = load_train(DataConfig())
    for site in range(2):
        with (tmp_path / f"site{site}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(site, 400, 2):
                writer.writerow([rows.texts[i], rows.label_names[rows.labels[i]]])
    folder = tmp_path / "run"
    with SuperLink() as link:
        limits = (4, 16)
        for site, limit in enumerate(limits):
            path = tmp_path / f"site{site}.csv"
            link.start_supernode(f'data-path="{path}" max-rank={limit}')
        run = link.run(
            ROOT,
            {**SMALL, "output": str(folder), "ranks.policy": "reported", "ranks.max": 16},
        )
        started = time.monotonic()
        lines = list(link.stream(run))
        status = link.status(run)
    assert status.completed, (status, lines[-20:], time.monotonic() - started)
    done = records(folder, "client")
    assert sorted((r["round"], r["rank"]) for r in done) == [(1, 4), (1, 16), (2, 4), (2, 16)]
    assert all(r["status"] == "ok" for r in done)
    assert {r["num-examples"] for r in done} == {180.0}  # 200 less a tenth for validation
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
