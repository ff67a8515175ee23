"""The same app, unchanged, on a real SuperLink and two SuperNodes with data of their own."""

import csv
import json
import time

import pytest

from fedlora_app.config.keys import RunConfig
from fedlora_app.launch.superlink import SuperLink
from fedlora_app.tasks import make_task
from tests.integration.conftest import ROOT, SMALL, records


@pytest.mark.parametrize(
    "rule", ["fedsa", *(pytest.param(r, marks=pytest.mark.slow) for r in ("replication", "flora"))]
)
def test_two_supernodes_with_their_own_data_and_limits(rule, tmp_path):
    """What fedsa keeps on a node lasts in its Flower state, whatever becomes of its client."""
    rows = make_task(RunConfig()).train_rows()
    for site in range(2):
        with (tmp_path / f"site{site}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(site, 400, 2):
                writer.writerow([rows.items[i], rows.about["labels"][rows.targets[i]]])
    folder = tmp_path / "run"
    with SuperLink() as link:
        limits = (4, 16)
        for site, limit in enumerate(limits):
            path = tmp_path / f"site{site}.csv"
            link.start_supernode(f'data-path="{path}" max-rank={limit}', warm=True)
        run = link.run(
            ROOT,
            {
                **SMALL,
                "output": str(folder),
                "aggregation": rule,
                "ranks.policy": "reported",
                "ranks.max": 16,
            },
        )
        started = time.monotonic()
        lines = list(link.stream(run))
        status = link.status(run)
    assert status.completed, (status, lines[-20:], time.monotonic() - started)
    done = records(folder, "client")
    assert sorted((r["round"], r["rank"]) for r in done) == [(1, 4), (1, 16), (2, 4), (2, 16)]
    assert all(r["status"] == "ok" for r in done)
    assert {r["num-examples"] for r in done} == {180.0}  # 200 less a tenth for validation
    if rule == "fedsa":
        # half of every pair travels; and a B that had been lost would show in the loss
        assert all(r["bytes_up"] == r["bytes_down"] for r in done)
        by_rank = {r["rank"]: r["bytes_up"] for r in done}
        assert by_rank[16] - by_rank[4] == 12 * 12 * 384 * 4
        first, second = (sum(r["loss"] for r in done if r["round"] == n) for n in (1, 2))
        assert second < first
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
